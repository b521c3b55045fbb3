"""Arrays and packed matrices that the native ops refuse, in one sentence and before anything is written."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from godwit import _native
from tests.kernels.packed import ints, weight, zeros


@pytest.mark.parametrize(
    ("fmt", "rows", "cols", "expected"),
    [
        ("q4", 16, 2048, 64 * 272 + 8 * 32),
        ("q4", 17, 33, 2 * (2 * 272 + 32)),
        ("q4", 1, 100, 1152),
        ("q8", 1, 64, 2 * 544),
        ("q8", 1, 65, 4 * 544),
        ("bf16", 48, 64, 3 * 2048),
    ],
)
def test_bytes_of_a_matrix(fmt: str, rows: int, cols: int, expected: int) -> None:
    assert _native.weight_bytes(fmt, rows, cols) == expected
    made = weight(rows, cols, fmt)
    assert (made.format, made.rows, made.cols, made.nbytes) == (fmt, rows, cols, expected)
    assert fmt in _native.FORMATS


@pytest.mark.parametrize(
    ("fmt", "rows", "cols", "message"),
    [
        ("q5", 4, 4, "There is no weight format named 'q5'; there are bf16, q8 and q4."),
        ("q4", 0, 4, "A weight cannot have 0 rows and 4 columns."),
        ("q4", 4, -1, "A weight cannot have 4 rows and -1 columns."),
        ("q4", 2**31, 2**31, "A weight cannot have"),
        ("q4", 2**62, 2**62, "A weight cannot have"),
    ],
)
def test_impossible_matrices(fmt: str, rows: int, cols: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        _native.weight_bytes(fmt, rows, cols)
    with pytest.raises(ValueError, match=f"^{message}"):
        _native.Weight(fmt, rows, cols, zeros(64))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda n: zeros(n, 8), "data must be aligned to 64 bytes"),
        (lambda n: zeros(n - 64), r"data must have shape \[\d+\], not \[\d+\]"),
        (lambda n: zeros(n)[None], r"data must have shape \[\d+\], not \[1, \d+\]"),
        (lambda n: zeros(n).to(torch.int8), "data must hold uint8"),
        (lambda n: zeros(n).to("meta"), "data must be a CPU tensor or array"),
        (lambda n: bytes, "data must be a CPU tensor or array"),
    ],
)
def test_weight_refuses_other_bytes(data: Callable[[int], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        _native.Weight("q8", 20, 40, data(_native.weight_bytes("q8", 20, 40)))


def test_objects_keep_their_memory_alive() -> None:
    backing = np.zeros(_native.weight_bytes("q8", 16, 64) + 64, np.uint8)
    start = -backing.ctypes.data % 64
    alive = weakref.ref(backing)
    made = _native.Weight("q8", 16, 64, backing[start : start + len(backing) - 64])
    mlp = _native.Mlp(weight(2 * 64, 16), made)
    del backing, made
    gc.collect()
    assert alive() is not None
    del mlp
    gc.collect()
    assert alive() is None


LINEAR: dict[str, tuple[dict[str, Any], str]] = {
    "columns": ({"x": torch.zeros(3, 39)}, r"x must have shape \[any, 40\], not \[3, 39\]"),
    "dimensions": ({"x": torch.zeros(40)}, r"x must have shape \[any, 40\], not \[40\]"),
    "dtype": ({"x": torch.zeros(3, 40, dtype=torch.float64)}, "x must hold float32"),
    "half": ({"x": torch.zeros(3, 40, dtype=torch.bfloat16)}, "x must hold float32"),
    "transposed": ({"x": torch.zeros(40, 3).t()}, "x must be contiguous"),
    "strided": ({"x": torch.zeros(3, 80)[:, ::2]}, "x must be contiguous"),
    "rows": ({"out": torch.zeros(2, 20)}, r"out must have shape \[3, 20\], not \[2, 20\]"),
    "bias": ({"bias": torch.zeros(21)}, r"bias must have shape \[20\], not \[21\]"),
    "bias dtype": ({"bias": torch.zeros(20, dtype=torch.int32)}, "bias must hold float32"),
    "read only": ({"out": np.broadcast_to(np.float32(0), (3, 20))}, "out must be .* that can be written"),
    "unaligned": (
        {"x": np.frombuffer(bytearray(3 * 40 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(3, 40)},
        "x must be aligned to 4 bytes",
    ),
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear_refuses(case: str) -> None:
    changed, message = LINEAR[case]
    out = torch.full((3, 20), torch.nan)
    arguments: dict[str, Any] = {"x": torch.zeros(3, 40), "bias": None, "out": out, **changed}
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        _native.linear(arguments["x"], weight(20, 40), arguments["bias"], arguments["out"])
    assert out.isnan().all()


def test_linear_refuses_overlapping_arrays() -> None:
    both = torch.zeros(7, 20)
    with pytest.raises(ValueError, match="out must not overlap x"):
        _native.linear(both[:4], weight(20, 20), None, both[3:])
    _native.linear(both[:3], weight(20, 20), None, both[3:6])
    assert not both.any()


def test_arrays_of_numpy_and_no_rows_at_all() -> None:
    x = np.ones((2, 40), np.float32)
    x.flags.writeable = False
    out = np.full((2, 20), np.nan, np.float32)
    _native.linear(x, weight(20, 40), np.arange(20, dtype=np.float32), out)
    assert (out == np.arange(20)).all()
    empty = torch.zeros(0, 20)
    _native.linear(torch.zeros(0, 40), weight(20, 40), None, empty)
    _native.rms_norm(empty, torch.ones(20), 1e-6, empty)
    _native.embed(weight(9, 20), ints(), empty)
    assert empty.shape == (0, 20)


@pytest.mark.parametrize("ids", [[0, 9], [-1, 0]])
def test_embed_refuses_rows_that_are_not_there(ids: list[int]) -> None:
    out = torch.full((2, 20), torch.nan)
    with pytest.raises(ValueError, match="ids must lie between 0 and the number of rows of w"):
        _native.embed(weight(9, 20), ints(*ids), out)
    assert out.isnan().all()


@pytest.mark.parametrize("k", [-1, 4])
def test_top_k_refuses_more_than_there_is(k: int) -> None:
    with pytest.raises(ValueError, match="k must lie between 0 and the number of values"):
        _native.top_k(torch.zeros(3), k)
