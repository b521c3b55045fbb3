"""Quantised tensors: packed matrices of 4, 8 or 16 bits per weight, and quantisation to them.

The layouts are those of ``csrc/kernels.h``: tiles of 16 rows and groups of 32 columns. A row of a group has a
scale (``q8``) or a step (``q4``); in ``q4``, 8 groups share a scale. :mod:`godwit.kernels.packing` is the
same quantisation in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from godwit import _native
from godwit.errors import UsageError

TILE_ROWS = 16  # output rows interleaved in a tile
GROUP = 32  # columns that share a scale (q8) or a step (q4)
SPAN = 8  # groups that share a scale in q4
ALIGNMENT = 64  # of every packed matrix
EXPERT_ALIGNMENT = 4096  # of every expert, so that it can be read from disk separately

#: format -> bytes of codes per group of a tile
CODE_BYTES = {"bf16": 1024, "q8": 512, "q4": 256}
FORMATS = tuple(CODE_BYTES)
#: format -> the largest weight that it can represent
MAX_WEIGHT = {"bf16": 3.3895e38, "q8": 127 * 65504.0, "q4": 105 * 65504.0}
_CHUNK = 1 << 24  # weights of other dtypes converted to float32 at a time


def groups(cols: int) -> int:
    """Groups of a row, padded to an even number."""
    return -(-cols // (2 * GROUP)) * 2


def spans(cols: int) -> int:
    """Spans of a row; the last one may be shorter."""
    return -(-groups(cols) // SPAN)


def num_tiles(rows: int) -> int:
    """Tiles for this many rows."""
    return -(-rows // TILE_ROWS)


def weight_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix ``[rows, cols]``.

    Raises:
        UsageError: an unknown format.
    """
    _check_format(format)
    scales = {"bf16": 0, "q8": 2 * groups(cols), "q4": groups(cols) + 2 * spans(cols)}[format]
    return num_tiles(rows) * _round_up(groups(cols) * CODE_BYTES[format] + scales * TILE_ROWS, ALIGNMENT)


def expert_layout(format13: str, format2: str, hidden: int, intermediate: int) -> tuple[int, int]:
    """Offset of an expert's ``w2``, and the distance between experts, in bytes.

    ``w13 [2 I, H]`` comes first, ``w2 [H, I]`` at the next multiple of 64, the next expert at one of 4096.
    """
    offset2 = _round_up(weight_bytes(format13, 2 * intermediate, hidden), ALIGNMENT)
    return offset2, expert_stride(format13, format2, hidden, intermediate)


def expert_stride(format13: str, format2: str, hidden: int, intermediate: int) -> int:
    """Bytes from one expert to the next."""
    first = _round_up(weight_bytes(format13, 2 * intermediate, hidden), ALIGNMENT)
    return _round_up(first + weight_bytes(format2, hidden, intermediate), EXPERT_ALIGNMENT)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _check_format(format: str) -> None:
    if format not in CODE_BYTES:
        raise UsageError(f"{format!r:.40} is not a weight format; use one of {', '.join(FORMATS)}")


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix ``[rows, cols]`` in one of :data:`FORMATS`; ``data`` are its bytes, uint8 and flat."""

    format: str
    shape: tuple[int, int]
    data: Tensor

    def __post_init__(self) -> None:
        """Check the number of bytes."""
        _check_bytes(self.data, weight_bytes(self.format, *self.shape), f"a {self.format} matrix")

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and padding."""
        return self.data.numel()

    def dequantize(self) -> Tensor:
        """The weights as float32 ``[rows, cols]``."""
        rows, cols = self.shape
        if self.format == "bf16":
            tiles = self.data.view(torch.bfloat16).view(
                num_tiles(rows), groups(cols), GROUP // 2, TILE_ROWS, 2
            )
            full = tiles.permute(0, 3, 1, 2, 4).float()
        else:
            codes, scales, steps = unpack(self)
            whole = codes.to(torch.int16) - (128 if steps is None else (steps >> 4).unsqueeze(-1))
            if steps is not None:
                whole *= (steps & 15).unsqueeze(-1)
                scales = scales.repeat_interleave(SPAN, 2)[:, :, : groups(cols)]
            full = whole.float() * scales.float().unsqueeze(-1)
        return full.reshape(num_tiles(rows) * TILE_ROWS, groups(cols) * GROUP)[:rows, :cols].contiguous()


@dataclass(frozen=True, eq=False)
class QuantExperts:
    """The experts of a layer: ``w13 [2 I, H]`` and ``w2 [H, I]`` of expert e start at byte ``e * stride``."""

    format13: str
    format2: str
    num_experts: int
    hidden: int
    intermediate: int
    stride: int
    offset2: int
    data: Tensor

    def __post_init__(self) -> None:
        """Check that sizes, offsets and bytes are consistent."""
        layout = expert_layout(self.format13, self.format2, self.hidden, self.intermediate)
        if (self.offset2, self.stride) != layout:
            raise UsageError(
                f"experts with w2 at byte {self.offset2} of {self.stride} do not match their formats' layout"
            )
        _check_bytes(self.data, self.num_experts * self.stride, f"{self.num_experts} experts")

    @property
    def nbytes(self) -> int:
        """Bytes of all experts, including padding."""
        return self.data.numel()

    def expert(self, index: int) -> tuple[QuantTensor, QuantTensor]:
        """Views of ``w13`` and ``w2`` of one expert."""
        begin = index * self.stride
        shape13, shape2 = (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)
        second = begin + self.offset2
        return (
            QuantTensor(
                self.format13, shape13, self.data[begin : begin + weight_bytes(self.format13, *shape13)]
            ),
            QuantTensor(
                self.format2, shape2, self.data[second : second + weight_bytes(self.format2, *shape2)]
            ),
        )


def join_expert(w13: QuantTensor, w2: QuantTensor) -> Tensor:
    """The bytes of one expert of a :class:`QuantExperts`, padded with zeros."""
    rows, hidden = w13.shape
    if w2.shape != (hidden, rows // 2) or rows % 2:
        raise UsageError(f"w13 {list(w13.shape)} and w2 {list(w2.shape)} are not one expert's shapes")
    offset2, stride = expert_layout(w13.format, w2.format, hidden, rows // 2)
    joined = torch.zeros(stride, dtype=torch.uint8)
    joined[: w13.nbytes] = w13.data
    joined[offset2 : offset2 + w2.nbytes] = w2.data
    return joined


def _check_bytes(data: Tensor, wanted: int, what: str) -> None:
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != wanted or not data.is_contiguous():
        raise UsageError(
            f"{what} needs {wanted} contiguous bytes, not {data.dtype} of shape {list(data.shape)}"
        )


def pack(
    codes: Tensor, scales: Tensor, format: str, shape: tuple[int, int], steps: Tensor | None = None
) -> QuantTensor:
    """Lay out a matrix of ``tiles * 16`` rows.

    Args:
        codes: ``[rows, groups, 32]`` uint8.
        scales: half precision, ``[rows, groups]`` for q8 and ``[rows, spans]`` for q4.
        format: q8 or q4.
        shape: of the matrix, without padding.
        steps: ``[rows, groups]`` uint8, for q4 only.
    """
    tiles, size = num_tiles(shape[0]), groups(shape[1])
    if steps is not None:
        halves = codes.view(tiles, TILE_ROWS, size, 2, 4, 4).permute(3, 0, 2, 4, 1, 5)
        parts = [(halves[0] | (halves[1] << 4)).reshape(tiles, -1), _by_row(steps, tiles)]
    else:
        parts = [codes.view(tiles, TILE_ROWS, size, 8, 4).permute(0, 2, 3, 1, 4).reshape(tiles, -1)]
    parts.append(_by_row(scales, tiles).view(torch.uint8))
    used = sum(part.shape[1] for part in parts)
    parts.append(torch.zeros(tiles, _round_up(used, ALIGNMENT) - used, dtype=torch.uint8))
    return QuantTensor(format, shape, torch.cat(parts, 1).flatten())


def _by_row(values: Tensor, tiles: int) -> Tensor:
    """``[tiles * 16, n]`` as ``[tiles, n * 16]``, interleaving the 16 rows of a tile."""
    return values.view(tiles, TILE_ROWS, -1).transpose(1, 2).reshape(tiles, -1)


def unpack(weight: QuantTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 ``[tiles, 16, groups, 32]``, scales float16 ``[tiles, 16, groups or spans]`` and, for q4,
    steps uint8 ``[tiles, 16, groups]``; including padding.
    """
    tiles, size = num_tiles(weight.shape[0]), groups(weight.shape[1])
    parts = weight.data.view(tiles, -1)
    at = size * CODE_BYTES[weight.format]
    body, tail = parts[:, :at], parts[:, at:].contiguous()

    def rows(values: Tensor) -> Tensor:
        return values.view(tiles, -1, TILE_ROWS).transpose(1, 2)

    if weight.format == "q8":
        codes = body.reshape(tiles, size, 8, TILE_ROWS, 4).permute(0, 3, 1, 2, 4).flatten(3)
        return codes, rows(tail.view(torch.float16)), None
    packed = body.reshape(tiles, size, 4, TILE_ROWS, 4)
    halves = torch.stack((packed & 15, packed >> 4), 2)  # [tiles, groups, half, 4, 16, 4]
    steps, after = tail[:, : size * TILE_ROWS], size * TILE_ROWS + spans(weight.shape[1]) * 2 * TILE_ROWS
    scales = tail[:, size * TILE_ROWS : after].contiguous().view(torch.float16)
    return halves.permute(0, 4, 1, 2, 3, 5).flatten(3), rows(scales), rows(steps.contiguous())


def quantize(weight: Tensor, format: str, importance: Tensor | None = None) -> QuantTensor:
    """Pack floats ``[rows, cols]``; scales minimise the squared error, weighted by ``importance [cols]``.

    ``importance`` is the weight of a squared error in each column, such as the mean square of its input; None
    weighs all columns equally. Little memory beyond the result is needed, regardless of size.

    Raises:
        UsageError: an unknown format, not a matrix, or weights or importances that cannot be represented.
    """
    check_matrix(weight, format)
    rows, cols = weight.shape
    spread = None if importance is None else padded_importance(importance, cols)
    out = torch.empty(weight_bytes(format, rows, cols) + ALIGNMENT, dtype=torch.uint8)
    out = out[-out.data_ptr() % ALIGNMENT :][: out.numel() - ALIGNMENT]
    if weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu":
        step = rows
    else:
        step = max(1, _CHUNK // (cols * TILE_ROWS)) * TILE_ROWS
    tile = weight_bytes(format, 1, cols)
    for begin in range(0, rows, step):
        chunk = weight[begin : begin + step].detach()
        chunk = (chunk if step == rows else chunk.to("cpu", torch.float32)).contiguous()
        part = out[begin // TILE_ROWS * tile :][: weight_bytes(format, chunk.shape[0], cols)]
        check_range(_native.pack(format, chunk, part, spread), format)
    return QuantTensor(format, (rows, cols), out)


def check_matrix(weight: Tensor, format: str) -> None:
    """Raises: UsageError: an unknown format, or a tensor that cannot be packed."""
    _check_format(format)
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise UsageError(f"only float matrices can be packed, not {weight.dtype} of {list(weight.shape)}")


def check_range(extreme: float, format: str) -> None:
    """Raises: UsageError: the largest weight of a matrix is NaN or beyond the range of the format."""
    if not extreme <= MAX_WEIGHT[format]:
        raise UsageError(
            f"{format} can represent finite weights up to {MAX_WEIGHT[format]:g}, but one is {extreme:g}"
        )


def padded_importance(importance: Tensor, cols: int) -> Tensor:
    """Importances scaled to a mean of 1, ``float32 [groups * 32]``, and 0 for padding.

    Raises:
        UsageError: not one finite number >= 0 per column.
    """
    found = importance.detach().to("cpu", torch.float32)
    if found.shape != (cols,) or not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise UsageError(f"importance must be {cols} finite numbers of at least 0, one per column")
    mean = float(found.double().mean())
    # A floor, so that columns that were always zero in calibration are still rounded sensibly.
    scaled = found / mean + 1e-3 if mean > 0 else torch.ones(cols)
    return torch.cat((scaled, scaled.new_zeros(groups(cols) * GROUP - cols)))


def pack_groups(codes: Tensor, scales: Tensor) -> QuantTensor:
    """Pack a matrix of integers times one scale per group as q8, without rounding.

    Args:
        codes: ``[rows, cols]`` int8 from -127 to 127; cols a multiple of 32.
        scales: ``[rows, cols / 32]`` float16, possibly negative.
    """
    rows, cols = codes.shape
    padded = num_tiles(rows) * TILE_ROWS
    full = torch.zeros(padded, groups(cols) * GROUP, dtype=torch.int8)
    full[:rows, :cols] = codes
    wide = torch.zeros(padded, groups(cols), dtype=torch.float16)
    wide[:rows, : scales.shape[1]] = scales
    return pack((full.view(torch.uint8) ^ 128).view(padded, -1, GROUP), wide, "q8", (rows, cols))  # adds 128
