"""Packed matrices for tests of the native ops."""

from __future__ import annotations

import torch
from torch import Tensor

from godwit import _native


def zeros(num_bytes: int, shift: int = 0) -> Tensor:
    """Zero bytes whose address is ``shift`` beyond a multiple of 64."""
    buffer = torch.zeros(num_bytes + 128, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64 + shift
    return buffer[start : start + num_bytes]


def weight(rows: int, cols: int, fmt: str = "q8") -> _native.Weight:
    return _native.Weight(fmt, rows, cols, zeros(_native.weight_bytes(fmt, rows, cols)))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
