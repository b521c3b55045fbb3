"""The block types of GGUF tensors: sizes, their values in float32, and which of them q8 holds exactly.

Values come from the ``gguf`` package, the reference of every type. A type "is q8" where each group of 32 is
an integer from -127 to 127 times one half-precision scale: it is then packed without any rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

GROUP = 32


@dataclass(frozen=True)
class BlockType:
    """``bytes`` hold ``elements`` of a row. ``dtype``: of plain types; None: they have to be decoded."""

    name: str
    elements: int
    bytes: int
    dtype: torch.dtype | None = None


_PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
#: What llama.cpp rounds activations to, never in files; and a type that ``gguf`` does not decode.
_UNREAD = ("Q8_1", "Q8_K", "Q1_0")
#: Numbers of types that old versions wrote for one CPU.
REPACKED = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
#: The types by their number in files.
TYPES = {
    int(kind): BlockType(kind.name, *gguf.GGML_QUANT_SIZES[kind], _PLAIN.get(kind.name))
    for kind in gguf.GGMLQuantizationType
    if kind.name not in _UNREAD
}


def decode(raw: Tensor, kind: BlockType) -> Tensor:
    """The values of ``raw [..., bytes]``: plain types as they are, all others in float32 ``[..., cols]``."""
    if kind.dtype is not None:
        return raw.clone().view(kind.dtype) if raw.storage_offset() % kind.bytes else raw.view(kind.dtype)
    with np.errstate(all="ignore"):  # infinite and NaN scales are values like others
        values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind.name])
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


# ---- Types that are q8 -------------------------------------------------------------------------------

_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_Blocks = np.ndarray[Any, np.dtype[np.uint8]]
_Groups = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # codes int8 [blocks, 32], scales f16 [blocks]


def as_groups(raw: Tensor, kind: BlockType) -> tuple[Tensor, Tensor] | None:
    """Codes ``int8 [rows, cols]`` and scales ``float16 [rows, cols / 32]``: value = code * scale, exactly.

    None where the type is not q8, or where these blocks hold a code of -128 or a scale that half precision
    does not have.
    """
    split = _GROUPS.get(kind.name)
    if split is None:
        return None
    rows = raw.shape[:-1]
    codes, scales = split(raw.numpy().reshape(-1, kind.bytes))
    if not np.isfinite(scales).all() or codes.min(initial=0) < -127:
        return None
    return (
        torch.from_numpy(np.ascontiguousarray(codes)).view(*rows, -1),
        torch.from_numpy(np.ascontiguousarray(scales)).view(*rows, -1),
    )


def _half(blocks: _Blocks, at: int) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0]


def _nibbles(packed: _Blocks) -> np.ndarray[Any, Any]:
    """The low halves of 16 bytes, then the high ones."""
    return np.concatenate((packed & 15, packed >> 4), 1).view(np.int8)


def _q8_0(blocks: _Blocks) -> _Groups:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0)


def _q4_0(blocks: _Blocks) -> _Groups:
    return _nibbles(blocks[:, 2:]) - np.int8(8), _half(blocks, 0)


def _q5_0(blocks: _Blocks) -> _Groups:
    high = np.unpackbits(np.ascontiguousarray(blocks[:, 2:6]), axis=1, bitorder="little").view(np.int8)
    return _nibbles(blocks[:, 6:]) + (high << 4) - np.int8(16), _half(blocks, 0)


def _iq4_nl(blocks: _Blocks) -> _Groups:
    return _IQ4_NL[_nibbles(blocks[:, 2:])], _half(blocks, 0)


def _mxfp4(blocks: _Blocks) -> _Groups:
    with np.errstate(over="ignore"):
        scales = np.ldexp(np.float64(1), blocks[:, 0].astype(np.int32) - 128)
        halves = scales.astype(np.float16)
    halves[halves != scales] = np.inf  # no half-precision number
    return _MXFP4[_nibbles(blocks[:, 1:])], halves


_GROUPS: dict[str, Callable[[_Blocks], _Groups]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
}
