"""Scales and codes for q8 and q4 that minimise the (weighted) squared error.

Weights come as ``[32, rows, groups]``: the 32 columns of a group along the first dimension, so that sums over
a group run over whole vectors. See :mod:`godwit.qtensor` for the formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPAN = 8  # groups that share a scale in q4
MAX_SCALE = 65504.0  # the largest number in half precision

# A group's weights are (code - zero) times a width. Widths are tried relative to the least that reaches both
# extremes, for the two zeros that fit these best.
_WIDTHS = (0.8, 0.88, 0.96)
_ZEROS = (4.0, 11.0)  # the least and the greatest zero that is tried
# A span's scale is tried relative to the one that maps its greatest width to the greatest size.
_SCALES = tuple(1.0 - 0.02 * i for i in range(-2, 9))
_SIZES = 15  # of a q4 step, which is size + 16 * zero
_LEAST_SCALE = 2.0**-24  # the smallest number in half precision
_TINY = 1e-30  # what is smaller has no inverse in float32 and no scale in half precision


def inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or next to it."""
    return torch.where(scales.abs() < _TINY, 0.0, scales.reciprocal())


def _rounded(x: Tensor, width: Tensor, zeros: Tensor, out: Tensor) -> Tensor:
    """``x / width`` to the nearest differences of a code of 4 bits and the zero, in ``out``."""
    torch.mul(x, inverse(width), out=out).round_()
    return torch.minimum(torch.maximum(out, -zeros, out=out), 15 - zeros, out=out)


def _fit(q: Tensor, weighted: Tensor, spread: Tensor | None, work: Tensor) -> tuple[Tensor, Tensor]:
    """The best width of each group for given integers q, and what a deviation of 1 from it costs.

    The (weighted) squared error for a width is that of the best one, <q, x> / <q, q>, plus <q, q> times the
    square of the difference.
    """
    along = torch.mul(q, weighted, out=work).sum(0)
    torch.mul(q, q, out=work)
    square = (work if spread is None else work.mul_(spread)).sum(0)
    return along * inverse(square), square


def q8_scales(x: Tensor, weighted: Tensor, spread: Tensor | None) -> Tensor:
    """Half-precision scales ``[rows, groups]``: the best ones for the codes that the extreme weight gives."""
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    q = (x * (inverse(extreme) * -127)).round_().clamp_(-127, 127)
    scales, _ = _fit(q, weighted, spread, torch.empty_like(x))
    return scales.clamp_(-MAX_SCALE, MAX_SCALE).half()


def q4_widths(x: Tensor, weighted: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Widths and zeros ``[rows, groups]`` with a small error, and what deviations from the widths cost."""
    low, high = x.amin(0).clamp_max_(0).neg_(), x.amax(0).clamp_min_(0)
    middle = (15 * low * inverse(low + high)).clamp_(*_ZEROS)
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
    """The greatest size beside a zero: products with all codes are within a signed byte."""
    return torch.div(127, torch.maximum(zeros, 15 - zeros), rounding_mode="floor").clamp_max_(_SIZES)


def q4_scales(widths: Tensor, zeros: Tensor, sharpness: Tensor) -> Tensor:
    """Half-precision scales ``[rows, spans]`` whose multiples come nearest to the widths of their groups."""
    rows, size = widths.shape
    shape = (rows, -(-size // SPAN), SPAN)

    def spanned(values: Tensor) -> Tensor:
        full = values.new_zeros(rows, shape[1] * SPAN)
        full[:, :size] = values
        return full.view(shape)

    widths, most, sharpness = spanned(widths), spanned(_most(zeros)), spanned(sharpness)
    top = (widths * inverse(most)).amax(2)
    least = torch.where(top > 0, _LEAST_SCALE, 0.0)
    best_cost, best = torch.full_like(top, torch.inf), torch.zeros_like(top)
    for factor in _SCALES:
        scales = torch.maximum((top * factor).clamp_max_(MAX_SCALE).half().float(), least)
        each = scales.unsqueeze(2)
        sizes = torch.minimum((widths * inverse(each)).round_(), most)
        cost = (sizes.mul_(each).sub_(widths).square_() * sharpness).sum(2)
        better = cost < best_cost
        best_cost, best = torch.where(better, cost, best_cost), torch.where(better, scales, best)
    return best.half()


def q4_codes(
    x: Tensor, spread: Tensor | None, widths: Tensor, zeros: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes ``[32, rows, groups]`` and steps: of the sizes around a width, the one with the least error."""
    unit = scales.float().repeat_interleave(SPAN, 1)[:, : widths.shape[1]]
    most = _most(zeros)
    wanted = (widths * inverse(unit)).floor_()
    best_cost, best = torch.full_like(widths, torch.inf), torch.zeros_like(widths)
    q, work = torch.empty_like(x), torch.empty_like(x)
    for more in (0, 1):
        sizes = torch.minimum(wanted + more, most)
        width = sizes * unit
        torch.mul(_rounded(x, width, zeros, q), width, out=work).sub_(x).square_()
        cost = (work if spread is None else work.mul_(spread)).sum(0)
        better = cost < best_cost
        best_cost, best = torch.where(better, cost, best_cost), torch.where(better, sizes, best)
    zeros = torch.where(best > 0, zeros, 8.0)
    codes = _rounded(x, best * unit, zeros, q).add_(zeros)
    return codes, (best + 16 * zeros).to(torch.uint8)
