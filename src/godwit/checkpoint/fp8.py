"""Block-wise FP8 weights, as in the official Qwen FP8 checkpoints.

A weight ``[..., out, in]`` in E4M3 (the "fn" variant: largest value 448, no infinities) comes with a tensor
of the same name plus ``_scale_inv``, ``[..., ceil(out / 128), ceil(in / 128)]``. Despite that name, weights
are multiplied by the scale: ``W[i, j] = float(q[i, j]) * scale[i // 128, j // 128]``. Source:
``FineGrainedFP8Config`` in transformers and the model cards of the Qwen FP8 releases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from godwit.checkpoint.formats import name_of_quantization
from godwit.errors import CheckpointError, UnsupportedModelError
from godwit.file_kinds import next_step

SCALE_SUFFIX = "_scale_inv"
E4M3_MAX = 448.0
DEFAULT_BLOCK = (128, 128)

# Rows are converted in pieces of about this many elements, so that the float32 temporaries stay small.
_PIECE = 1 << 18


def fp8_block_size(raw_config: Mapping[str, Any], original: str | None = None) -> tuple[int, int]:
    """The block size [out, in] of a scale, from a ``config.json``; 128 x 128 by default.

    ``original`` is the repository of the unquantised weights, for error messages.

    Raises:
        UnsupportedModelError: the config declares another quantisation.
        CheckpointError: the quantisation section is invalid.
    """
    config = _quantization_section(raw_config)
    if config is None:
        return DEFAULT_BLOCK
    if not isinstance(config, Mapping):
        raise CheckpointError(
            "the quantization_config of config.json is not a JSON object; correct or remove it"
        )
    if config.get("quant_method") != "fp8":
        name = name_of_quantization(config)
        raise UnsupportedModelError(
            f"its weights are quantised with {name}, which is not supported; {next_step(original)}"
        )
    for field, known in (("activation_scheme", "dynamic"), ("fmt", "e4m3")):
        if config.get(field, known) != known:
            raise UnsupportedModelError(
                f"its FP8 weights have {field} {config[field]!r:.60}, which is not supported; "
                f"{next_step(original)}"
            )
    sides = config.get("weight_block_size", list(DEFAULT_BLOCK))
    if sides is None:
        raise coarse_scales(original)
    return _block(sides)


def coarse_scales(original: str | None) -> UnsupportedModelError:
    """The error for FP8 weights whose scales are not per block."""
    return UnsupportedModelError(
        f"its FP8 weights have one scale per tensor or channel, but only one per block is supported; "
        f"{next_step(original)}"
    )


def _quantization_section(raw_config: Mapping[str, Any]) -> object:
    text = raw_config.get("text_config")
    for part in (raw_config, text if isinstance(text, Mapping) else {}):
        # Older compressed-tensors files call it "compression_config", MLX files "quantization".
        for key in ("quantization_config", "compression_config", "quantization"):
            if part.get(key) is not None:
                return part[key]
    return None


def _block(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(side) is int for side in value):
        raise CheckpointError(
            f"weight_block_size in config.json is {value!r:.60}, not two whole numbers; correct it"
        )
    rows, columns = value
    if not (1 <= rows <= 2**20 and 1 <= columns <= 2**20):
        raise CheckpointError(
            f"weight_block_size in config.json is {value!r:.60}, which is out of range; correct it"
        )
    return rows, columns


def fp8_scale_shape(shape: tuple[int, ...], block: tuple[int, int] = DEFAULT_BLOCK) -> tuple[int, ...]:
    """Shape of the scales of a weight ``[..., out, in]``."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantize_fp8(
    q: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int] = DEFAULT_BLOCK,
    *,
    out: torch.Tensor | None = None,
    rows: slice | None = None,
) -> torch.Tensor:
    """The weight ``[..., out, in]`` in bfloat16, multiplied in float32 and rounded once.

    If ``out`` is given (same shape, any floating dtype and device), the rounded values are written there.
    Temporaries take a few MiB either way. If ``rows``, a range of the first dimension, is given, only these
    are computed.

    Raises:
        CheckpointError: the scales have the wrong shape, or some of them are not finite.
    """
    shape = tuple(q.shape)
    if len(shape) < 2 or tuple(scale.shape) != fp8_scale_shape(shape, block):
        raise CheckpointError(
            f"FP8 weight of shape {list(shape)} has scales of shape {list(scale.shape)}, "
            f"which do not fit blocks of {block[0]} x {block[1]}; fetch the checkpoint again"
        )
    if rows is not None:
        return _some_rows(q, scale, block, range(*rows.indices(shape[0])))
    scale = scale.to(torch.float32)
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError("an FP8 weight has scales that are not finite; fetch the checkpoint again")
    weight = torch.empty(shape, dtype=torch.bfloat16, device=q.device) if out is None else out
    for matrix, first, last in _pieces(shape):
        values = q[matrix][first:last].to(torch.float32)
        values.mul_(_spread(scale[matrix], block, first, last, shape[-1]))
        weight[matrix][first:last].copy_(values.to(torch.bfloat16))
    return weight


def _some_rows(q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], rows: range) -> torch.Tensor:
    height = block[0] if q.dim() == 2 else 1  # with more dimensions, the first counts matrices, not rows
    first, last = rows.start // height, -(-rows.stop // height)
    begin = first * height
    part = dequantize_fp8(q[begin : last * height], scale[first:last], block)
    return part[rows.start - begin : rows.stop - begin]


def quantize_fp8(
    weight: torch.Tensor, block: tuple[int, int] = DEFAULT_BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``[..., out, in]`` to (E4M3 codes of the same shape, float32 scales).

    The scale of a block is its largest magnitude / 448, or 1 for a block of zeros; codes are rounded to
    nearest, ties to even.

    Raises:
        CheckpointError: fewer than two dimensions, or a value that is not finite.
    """
    shape = tuple(weight.shape)
    if len(shape) < 2:
        raise CheckpointError(
            f"only matrices are stored as block-wise FP8, this tensor has shape {list(shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError("a weight with values that are not finite cannot be stored as FP8")
    scale = _block_amax(weight, block) / E4M3_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    q = torch.empty(shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for matrix, first, last in _pieces(shape):
        values = weight[matrix][first:last].to(torch.float32)
        values = values / _spread(scale[matrix], block, first, last, shape[-1])
        q[matrix][first:last] = values.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return q, scale


def _block_amax(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows, columns = weight.shape[-2:]
    height, width = block[0], min(block[1], max(columns, 1))
    amax = torch.zeros(fp8_scale_shape(tuple(weight.shape), block), dtype=torch.float32, device=weight.device)
    for row in range(amax.shape[-2]):
        band = weight[..., row * height : min(rows, (row + 1) * height), :].abs().amax(dim=-2)
        padded = functional.pad(band, (0, -columns % width))
        amax[..., row, :] = padded.reshape(*padded.shape[:-1], amax.shape[-1], width).amax(dim=-1)
    return amax


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(index of the leading dimensions, first row, last row) of pieces that cover ``shape``."""
    *leading, rows, columns = shape
    step = max(1, _PIECE // max(columns, 1))
    for matrix in itertools.product(*map(range, leading)):
        for first in range(0, rows, step):
            yield matrix, first, min(rows, first + step)


def _spread(scale: torch.Tensor, block: tuple[int, int], first: int, last: int, columns: int) -> torch.Tensor:
    """The scale of every element of rows [first, last) of a matrix with ``columns`` columns."""
    rows = torch.arange(first, last, device=scale.device) // block[0]
    return scale[rows].repeat_interleave(min(block[1], columns), dim=1)[:, :columns]
