"""Native packing against its reference: the same bytes, on every instruction set, at awkward sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from godwit import _native
from godwit.errors import UsageError
from godwit.kernels import packing
from godwit.qtensor import FORMATS, quantize

SHAPES = [(1, 1), (16, 32), (17, 33), (31, 100), (48, 130), (5, 257), (3, 600), (64, 512), (130, 96)]


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before, threads = _native.instruction_set(), _native.num_threads()
    yield
    _native.set_instruction_set(before)
    _native.set_num_threads(threads)


def weights(rows: int, cols: int) -> Tensor:
    """Normal weights with rows of zeros, ties, outliers, and sizes near the ends of half precision."""
    x = torch.randn(rows, cols)
    x[0] = 0
    if rows > 4:
        x[1] = torch.randint(-2, 3, (cols,)).float()  # many ties, some groups with extremes of both signs
        x[2] *= 1e-8
        x[3] *= 3e4
        x[4, ::7] *= 100
    return x


@pytest.mark.parametrize("instruction_set", _native.available_instruction_sets())
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_of_the_reference(shape: tuple[int, int], format: str, instruction_set: str) -> None:
    _native.set_instruction_set(instruction_set)
    x = weights(*shape)
    assert torch.equal(quantize(x, format).data, packing.quantize(x, format).data)


@pytest.mark.parametrize("format", FORMATS)
def test_importance_counts_as_in_the_reference(format: str) -> None:
    x, importance = weights(40, 200), torch.rand(200) ** 4
    wanted = packing.quantize(x, format, importance)
    assert torch.equal(quantize(x, format, importance).data, wanted.data)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_their_float32(format: str, dtype: torch.dtype) -> None:
    x = torch.randn(50, 70).to(dtype)
    assert torch.equal(quantize(x, format).data, quantize(x.float(), format).data)


@pytest.mark.parametrize("format", FORMATS)
def test_the_number_of_threads_changes_nothing(format: str) -> None:
    x = weights(200, 300)
    results = []
    for threads in (1, 2, 3):
        _native.set_num_threads(threads)
        results.append(quantize(x, format).data)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_are_not_side_by_side(format: str) -> None:
    x = torch.randn(70, 128)
    assert torch.equal(quantize(x[:, 3:99], format).data, quantize(x[:, 3:99].clone(), format).data)
    assert torch.equal(quantize(x.T, format).data, quantize(x.T.contiguous(), format).data)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused_wherever_it_is(format: str, bad: float) -> None:
    for place in ((0, 0), (33, 40), (49, 69)):
        x = torch.randn(50, 70)
        x[place] = bad
        with pytest.raises(UsageError, match=f"{format} can represent finite weights"):
            quantize(x, format)


def test_arguments_are_checked() -> None:
    out = torch.empty(_native.weight_bytes("q8", 16, 32), dtype=torch.uint8)
    with pytest.raises(ValueError, match="x must hold float32"):
        _native.pack("q8", torch.ones(16, 32, dtype=torch.float64), out)
    with pytest.raises(ValueError, match="out must have shape"):
        _native.pack("q8", torch.ones(17, 32), out)
    with pytest.raises(ValueError, match="spread must have shape"):
        _native.pack("q8", torch.ones(16, 32), out, torch.ones(32))
    with pytest.raises(ValueError, match="no weight format named 'q2'"):
        _native.pack("q2", torch.ones(16, 32), out)
