"""Weight quantisation in plain PyTorch: the reference for the native packers, which give the same bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from godwit.qtensor import (
    GROUP,
    SPAN,
    TILE_ROWS,
    QuantTensor,
    check_matrix,
    check_range,
    groups,
    num_tiles,
    pack,
    padded_importance,
)

_MAX_SCALE = 65504.0  # the largest number in half precision
_BLOCK = 1 << 16  # weights quantised at a time, so that temporaries stay in a core's cache

# A group's weights are (code - zero) times a width. Candidate widths are relative to the smallest one that
# reaches both extremes, for the two zeros that fit these best.
_WIDTHS = (0.8, 0.88, 0.96)
_ZEROS = (4.0, 11.0)  # the smallest and the largest zero tried
# Candidate scales of a span are relative to the one that maps its largest width to the largest size.
_SCALES = tuple(1.0 - 0.02 * i for i in range(-2, 9))
_SIZES = 15  # largest size of a q4 step, which is size + 16 * zero
_LEAST_SCALE = 2.0**-24  # the smallest positive number in half precision
_TINY = 1e-30  # smaller numbers have no inverse in float32 and no scale in half precision


def quantize(weight: Tensor, format: str, importance: Tensor | None = None) -> QuantTensor:
    """Pack floats ``[rows, cols]``; scales minimise the squared error, weighted by ``importance [cols]``.

    ``importance`` is the weight of a squared error in each column, such as the mean square of its input; None
    weighs all columns equally. Little memory beyond the result is needed, regardless of size.

    Raises:
        UsageError: an unknown format, not a matrix, or weights or importances that cannot be represented.
    """
    check_matrix(weight, format)
    rows, cols = weight.shape
    spread = None if importance is None else _by_group(padded_importance(importance, cols)[None])
    step = max(1, _BLOCK // (groups(cols) * GROUP * TILE_ROWS)) * TILE_ROWS
    blocks = (weight[begin : begin + step].detach().float() for begin in range(0, rows, step))
    data = torch.cat([_pack_block(block, format, spread).data for block in blocks])
    return QuantTensor(format, (rows, cols), data)


def _padded(block: Tensor, rows: int) -> Tensor:
    """``block`` padded with zeros to ``rows`` rows and whole groups."""
    if block.shape == (rows, groups(block.shape[1]) * GROUP):
        return block
    full = torch.zeros(rows, groups(block.shape[1]) * GROUP, dtype=block.dtype)
    full[: block.shape[0], : block.shape[1]] = block
    return full


def _by_group(full: Tensor) -> Tensor:
    """``[rows, cols]`` as ``[32, rows, groups]``, so that sums over a group use whole vectors."""
    return full.view(full.shape[0], -1, GROUP).permute(2, 0, 1).contiguous()


def _pack_block(block: Tensor, format: str, spread: Tensor | None) -> QuantTensor:
    check_range(float(block.abs().max()), format)
    shape = (block.shape[0], block.shape[1])
    full = _padded(block, num_tiles(shape[0]) * TILE_ROWS)
    if format == "bf16":
        pairs = full.bfloat16().contiguous().view(torch.int32).view(-1, TILE_ROWS, full.shape[1] // 2)
        laid = pairs.transpose(1, 2).contiguous()
        return QuantTensor(format, shape, laid.view(torch.uint8).flatten())
    x = _by_group(full)
    weighted = x if spread is None else x * spread
    if format == "q8":
        scales = _q8_scales(x, weighted, spread)
        codes = (x * _inverse(scales.float())).round_().clamp_(-127, 127).add_(128)
        return pack(codes.to(torch.uint8).permute(1, 2, 0).contiguous(), scales, format, shape)
    widths, zeros, sharpness = _q4_widths(x, weighted, spread)
    scales = _q4_scales(widths, zeros, sharpness)
    codes, steps = _q4_codes(x, spread, widths, zeros, scales)
    return pack(codes.to(torch.uint8).permute(1, 2, 0).contiguous(), scales, format, shape, steps)


def _added(x: Tensor) -> Tensor:
    """Pairwise sum over the first dimension, whose size is a power of two."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = x[:half] + x[half:]
    return x[0]


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, or 0 where the scale is (almost) 0."""
    return torch.where(scales.abs() < _TINY, 0.0, scales.reciprocal())


def _rounded(x: Tensor, width: Tensor, zeros: Tensor, out: Tensor) -> Tensor:
    """Round ``x / width`` into ``out``, limited to the values of a 4-bit code minus the zero."""
    torch.mul(x, _inverse(width), out=out).round_()
    return torch.minimum(torch.maximum(out, -zeros, out=out), 15 - zeros, out=out)


def _fit(q: Tensor, weighted: Tensor, spread: Tensor | None, work: Tensor) -> tuple[Tensor, Tensor]:
    """The best width of each group for given integers q, and the cost of a deviation of 1 from it.

    The (weighted) squared error of a width is that of the best one, <q, x> / <q, q>, plus <q, q> times the
    squared difference.
    """
    along = _added(torch.mul(q, weighted, out=work))
    torch.mul(q, q, out=work)
    square = _added(work if spread is None else work.mul_(spread))
    return along * _inverse(square), square


def _q8_scales(x: Tensor, weighted: Tensor, spread: Tensor | None) -> Tensor:
    """Half-precision scales ``[rows, groups]``: the best ones for the codes given by the extreme weight."""
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    q = (x * (_inverse(extreme) * -127)).round_().clamp_(-127, 127)
    scales, _ = _fit(q, weighted, spread, torch.empty_like(x))
    return scales.clamp_(-_MAX_SCALE, _MAX_SCALE).half()


def _q4_widths(x: Tensor, weighted: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Widths and zeros ``[rows, groups]`` of small error, and the cost of deviations from these widths."""
    low, high = x.amin(0).clamp_max_(0).neg_(), x.amax(0).clamp_min_(0)
    middle = (15 * low * _inverse(low + high)).clamp_(*_ZEROS)
    best_gain = torch.full_like(low, -1.0)
    best = (torch.zeros_like(low), torch.full_like(low, 8.0), torch.zeros_like(low))
    q, work = torch.empty_like(x), torch.empty_like(x)
    for zeros in (middle.floor(), middle.ceil()):
        reach = torch.maximum(low / zeros, high / (15 - zeros))
        for factor in _WIDTHS:
            width, square = _fit(_rounded(x, reach * factor, zeros, q), weighted, spread, work)
            gain = width * width * square
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = (
                torch.where(better, width, best[0]),
                torch.where(better, zeros, best[1]),
                torch.where(better, square, best[2]),
            )
    return best


def _most(zeros: Tensor) -> Tensor:
    """The largest size for a zero such that products with all codes fit a signed byte."""
    return torch.div(127, torch.maximum(zeros, 15 - zeros), rounding_mode="floor").clamp_max_(_SIZES)


def _q4_scales(widths: Tensor, zeros: Tensor, sharpness: Tensor) -> Tensor:
    """Half-precision scales ``[rows, spans]`` whose multiples best match the widths of their groups."""
    rows, size = widths.shape
    shape = (rows, -(-size // SPAN), SPAN)

    def spanned(values: Tensor) -> Tensor:
        full = values.new_zeros(rows, shape[1] * SPAN)
        full[:, :size] = values
        return full.view(shape)

    widths, most, sharpness = spanned(widths), spanned(_most(zeros)), spanned(sharpness)
    top = (widths * _inverse(most)).amax(2)
    least = torch.where(top > 0, _LEAST_SCALE, 0.0)
    best_cost, best = torch.full_like(top, torch.inf), torch.zeros_like(top)
    for factor in _SCALES:
        scales = torch.maximum((top * factor).clamp_max_(_MAX_SCALE).half().float(), least)
        each = scales.unsqueeze(2)
        sizes = torch.minimum((widths * _inverse(each)).round_(), most)
        cost = _added((sizes.mul_(each).sub_(widths).square_() * sharpness).movedim(2, 0))
        better = cost < best_cost
        best_cost, best = torch.where(better, cost, best_cost), torch.where(better, scales, best)
    return best.half()


def _q4_codes(
    x: Tensor, spread: Tensor | None, widths: Tensor, zeros: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes ``[32, rows, groups]`` and steps; of the two sizes nearest a width, the one with less error."""
    unit = scales.float().repeat_interleave(SPAN, 1)[:, : widths.shape[1]]
    most = _most(zeros)
    wanted = (widths * _inverse(unit)).floor_()
    best_cost, best = torch.full_like(widths, torch.inf), torch.zeros_like(widths)
    q, work = torch.empty_like(x), torch.empty_like(x)
    for more in (0, 1):
        sizes = torch.minimum(wanted + more, most)
        width = sizes * unit
        torch.mul(_rounded(x, width, zeros, q), width, out=work).sub_(x).square_()
        cost = _added(work if spread is None else work.mul_(spread))
        better = cost < best_cost
        best_cost, best = torch.where(better, cost, best_cost), torch.where(better, sizes, best)
    zeros = torch.where(best > 0, zeros, 8.0)
    codes = _rounded(x, best * unit, zeros, q).add_(zeros)
    return codes, (best + 16 * zeros).to(torch.uint8)
