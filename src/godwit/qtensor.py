"""Quantised tensors: packed matrices of 4, 8 or 16 bits a weight, and how floats become them.

The layouts are those of ``csrc/kernels.h``, byte for byte: tiles of 16 rows, in which the 32 columns of a
group share a scale (``q8``) or a step, of which 8 share a scale (``q4``). Everything here is plain torch; the
native kernels read the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from godwit.errors import UsageError
from godwit.qfit import MAX_SCALE, inverse, q4_codes, q4_scales, q4_widths, q8_scales
from godwit.qfit import SPAN as SPAN

TILE_ROWS = 16  # output rows side by side in a tile
GROUP = 32  # inputs that share a scale, or in q4 a step
ALIGNMENT = 64  # of every packed matrix
EXPERT_ALIGNMENT = 4096  # of every expert: what a disk reads on its own

#: format -> bytes of codes in a group of a tile
CODE_BYTES = {"bf16": 1024, "q8": 512, "q4": 256}
FORMATS = tuple(CODE_BYTES)
#: format -> the greatest multiple of its scale that a weight of either sign can be
_MOST = {"q8": 127, "q4": 105}
_MAX_BF16 = 3.3895e38
_BLOCK = 1 << 16  # weights quantised at a time: the temporaries stay in a core's cache


def groups(cols: int) -> int:
    """Groups of a row, the padding to an even number included."""
    return -(-cols // (2 * GROUP)) * 2


def spans(cols: int) -> int:
    """Spans of a row, the last of which may be shorter."""
    return -(-groups(cols) // SPAN)


def _num_tiles(rows: int) -> int:
    return -(-rows // TILE_ROWS)


def weight_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix ``[rows, cols]``.

    Raises:
        UsageError: an unknown format.
    """
    _check_format(format)
    scales = {"bf16": 0, "q8": 2 * groups(cols), "q4": groups(cols) + 2 * spans(cols)}[format]
    return _num_tiles(rows) * _round_up(groups(cols) * CODE_BYTES[format] + scales * TILE_ROWS, ALIGNMENT)


def expert_layout(format13: str, format2: str, hidden: int, intermediate: int) -> tuple[int, int]:
    """Where an expert's ``w2`` begins and the distance between experts.

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
        raise UsageError(f"{format!r:.40} is not a format of weights; there are {', '.join(FORMATS)}")


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix ``[rows, cols]`` in one of :data:`FORMATS`; ``data`` are its bytes, uint8 and flat."""

    format: str
    shape: tuple[int, int]
    data: Tensor

    def __post_init__(self) -> None:
        """Refuse bytes that are not those of such a matrix."""
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
                _num_tiles(rows), groups(cols), GROUP // 2, TILE_ROWS, 2
            )
            full = tiles.permute(0, 3, 1, 2, 4).float()
        else:
            codes, scales, steps = unpack(self)
            whole = codes.to(torch.int16) - (128 if steps is None else (steps >> 4).unsqueeze(-1))
            if steps is not None:
                whole *= (steps & 15).unsqueeze(-1)
                scales = scales.repeat_interleave(SPAN, 2)[:, :, : groups(cols)]
            full = whole.float() * scales.float().unsqueeze(-1)
        return full.reshape(_num_tiles(rows) * TILE_ROWS, groups(cols) * GROUP)[:rows, :cols].contiguous()


@dataclass(frozen=True, eq=False)
class QuantExperts:
    """The experts of a layer: ``w13 [2 I, H]`` and ``w2 [H, I]`` of expert e from byte ``e * stride`` on."""

    format13: str
    format2: str
    num_experts: int
    hidden: int
    intermediate: int
    stride: int
    offset2: int
    data: Tensor

    def __post_init__(self) -> None:
        """Refuse sizes and bytes that do not belong together."""
        layout = expert_layout(self.format13, self.format2, self.hidden, self.intermediate)
        if (self.offset2, self.stride) != layout:
            raise UsageError(
                f"experts with w2 at byte {self.offset2} of {self.stride} are not laid out for their formats"
            )
        _check_bytes(self.data, self.num_experts * self.stride, f"{self.num_experts} experts")

    @property
    def nbytes(self) -> int:
        """Bytes of all experts, padding included."""
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
    """The bytes of one expert in a :class:`QuantExperts`, with zeros between its parts and after them."""
    rows, hidden = w13.shape
    if w2.shape != (hidden, rows // 2) or rows % 2:
        raise UsageError(f"w13 {list(w13.shape)} and w2 {list(w2.shape)} are not of one expert")
    offset2, stride = expert_layout(w13.format, w2.format, hidden, rows // 2)
    joined = torch.zeros(stride, dtype=torch.uint8)
    joined[: w13.nbytes] = w13.data
    joined[offset2 : offset2 + w2.nbytes] = w2.data
    return joined


def _check_bytes(data: Tensor, wanted: int, what: str) -> None:
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != wanted or not data.is_contiguous():
        raise UsageError(
            f"{what} takes {wanted} contiguous bytes, not {data.dtype} of shape {list(data.shape)}"
        )


def pack(
    codes: Tensor, scales: Tensor, format: str, shape: tuple[int, int], steps: Tensor | None = None
) -> QuantTensor:
    """Lay out a matrix of ``tiles * 16`` rows.

    Args:
        codes: ``[rows, groups, 32]`` uint8.
        scales: half precision, ``[rows, groups]`` of q8 and ``[rows, spans]`` of q4.
        format: q8 or q4.
        shape: of the matrix, without padding.
        steps: ``[rows, groups]`` uint8, of q4 only.
    """
    tiles, size = _num_tiles(shape[0]), groups(shape[1])
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
    """``[tiles * 16, n]`` as ``[tiles, n * 16]``, the 16 rows of a tile side by side."""
    return values.view(tiles, TILE_ROWS, -1).transpose(1, 2).reshape(tiles, -1)


def unpack(weight: QuantTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes ``[tiles, 16, groups, 32]``, scales ``[tiles, 16, groups or spans]`` and, of q4, steps.

    They are uint8, half precision and uint8 ``[tiles, 16, groups]``; padding is included.
    """
    tiles, size = _num_tiles(weight.shape[0]), groups(weight.shape[1])
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

    ``importance`` is how much the square of an error in a column matters, such as the mean square of its
    input; None takes all columns as equal. Memory beyond the result is small, whatever the size.

    Raises:
        UsageError: an unknown format, no matrix, or weights or importances that cannot be represented.
    """
    _check_format(format)
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise UsageError(f"only matrices of floats can be packed, not {weight.dtype} of {list(weight.shape)}")
    rows, cols = weight.shape
    spread = None if importance is None else _spread(importance, cols)
    step = max(1, _BLOCK // (groups(cols) * GROUP * TILE_ROWS)) * TILE_ROWS
    # bfloat16 that stays bfloat16 is only laid out anew.
    work = torch.bfloat16 if format == "bf16" and weight.dtype == torch.bfloat16 else torch.float32
    blocks = (
        _pack_block(weight[begin : begin + step].detach().to("cpu", work), format, spread)
        for begin in range(0, rows, step)
    )
    if rows <= step:
        return next(blocks)
    out = torch.empty(weight_bytes(format, rows, cols), dtype=torch.uint8)
    at = 0
    for packed in blocks:
        out[at : at + packed.nbytes] = packed.data
        at += packed.nbytes
    return QuantTensor(format, (rows, cols), out)


def _spread(importance: Tensor, cols: int) -> Tensor:
    """Importances as ``[32, 1, groups]`` around 1, and 0 for missing columns."""
    found = importance.detach().to("cpu", torch.float32)
    if found.shape != (cols,) or not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise UsageError(f"importance must be {cols} finite numbers from 0 up, one a column")
    mean = float(found.double().mean())
    # A floor keeps columns that the calibration never saw from being rounded at will.
    scaled = found / mean + 1e-3 if mean > 0 else torch.ones(cols)
    return _by_group(_padded(scaled[None], 1))


def _padded(block: Tensor, rows: int) -> Tensor:
    """Zeros around ``block``, up to ``rows`` rows and whole groups."""
    if block.shape == (rows, groups(block.shape[1]) * GROUP):
        return block
    full = torch.zeros(rows, groups(block.shape[1]) * GROUP, dtype=block.dtype)
    full[: block.shape[0], : block.shape[1]] = block
    return full


def _by_group(full: Tensor) -> Tensor:
    """``[rows, cols]`` as ``[32, rows, groups]``: sums over a group then run over whole vectors."""
    return full.view(full.shape[0], -1, GROUP).permute(2, 0, 1).contiguous()


def _pack_block(block: Tensor, format: str, spread: Tensor | None) -> QuantTensor:
    _check_range(block, format)
    shape = (block.shape[0], block.shape[1])
    full = _padded(block, _num_tiles(shape[0]) * TILE_ROWS)
    if format == "bf16":
        pairs = full.bfloat16().contiguous().view(torch.int32).view(-1, TILE_ROWS, full.shape[1] // 2)
        laid = pairs.transpose(1, 2).contiguous()
        return QuantTensor(format, shape, laid.view(torch.uint8).flatten())
    x = _by_group(full)
    weighted = x if spread is None else x * spread
    if format == "q8":
        scales = q8_scales(x, weighted, spread)
        codes = (x * inverse(scales.float())).round_().clamp_(-127, 127).add_(128)
        return pack(codes.to(torch.uint8).permute(1, 2, 0).contiguous(), scales, format, shape)
    widths, zeros, sharpness = q4_widths(x, weighted, spread)
    scales = q4_scales(widths, zeros, sharpness)
    codes, steps = q4_codes(x, spread, widths, zeros, scales)
    return pack(codes.to(torch.uint8).permute(1, 2, 0).contiguous(), scales, format, shape, steps)


def _check_range(block: Tensor, format: str) -> None:
    limit = _MAX_BF16 if format == "bf16" else MAX_SCALE * _MOST[format]
    extreme = float(block.abs().max())
    if not extreme <= limit:  # also where it is NaN
        raise UsageError(f"{format} takes finite weights of at most {limit:g}, and one is {extreme:g}")
