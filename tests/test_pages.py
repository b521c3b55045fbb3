"""Large pages: what they hold, and where there are none."""

from __future__ import annotations

import mmap

import pytest
import torch

from godwit.pages import LARGE_PAGE, ask_for_large_pages, zeros


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (3, 1 << 20, 2), (4 * LARGE_PAGE + 1,)])
def test_they_are_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = zeros(shape, dtype, "cpu")
    assert torch.equal(made, torch.zeros(shape, dtype=dtype)) and made.dtype == dtype
    assert made.is_contiguous()
    if made.nbytes >= 2 * LARGE_PAGE:
        assert made.data_ptr() % LARGE_PAGE == 0
    made.fill_(1)
    assert bool((made == 1).all()) and not zeros(shape, dtype, "cpu").any()


def test_too_little_memory_is_told_as_torch_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("godwit.pages.mmap.mmap", refuse)
    assert zeros((2 * LARGE_PAGE,), torch.float32, "cpu").shape == (2 * LARGE_PAGE,)
    with pytest.raises(RuntimeError, match="allocate"):
        zeros((1 << 50,), torch.float32, "cpu")


def test_other_devices_get_what_torch_gives() -> None:
    assert zeros((4 * LARGE_PAGE,), torch.float32, "meta").device.type == "meta"


def test_asking_is_no_error_where_it_cannot_be_had() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as area:
        ask_for_large_pages(area)
        assert area[:4] == bytes(4)
