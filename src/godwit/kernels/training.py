"""Training versions of the expensive ops: the results of the reference, at higher throughput.

Shapes are static (rows of a fixed length with packed documents), so that ``torch.compile`` fuses the
element-wise work; matrix products run in bfloat16 under autocast; backward passes that autograd would do
inefficiently are written by hand. A document starts wherever the position is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from godwit.kernels.reference import CHUNK, in_full_precision, l2_normalize

# Log decays are clamped to this: exp(-25) is already far below float32's relative resolution, and smaller
# factors produce subnormal numbers, which are a hundred times slower.
MIN_LOG_DECAY = -25.0
# An expert's rows are padded to a multiple of this, since each new matrix shape is compiled anew.
ROW_TILE = 256


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's if it is on, otherwise that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for fixed shapes, with autocast off inside: the function chooses its own dtypes."""
    return in_full_precision(torch.compile(function, dynamic=False))


class _UnitLowerInverse(torch.autograd.Function):
    """``(I + A)^-1`` for strictly lower A ``[..., C, C]``; the backward pass is two products, not a solve."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        inverse: Tensor = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        flipped: Tensor = inverse.mT
        return -(flipped @ grad @ flipped).tril(-1)


@in_full_precision
def _unit_lower_inverse(a: Tensor) -> Tensor:
    inverse: Tensor = _UnitLowerInverse.apply(a)  # type: ignore[no-untyped-call]
    return inverse


def _delta_prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, positions: Tensor, row_length: int
) -> tuple[Tensor, ...]:
    """The part of the chunked rule that needs neither inverse nor state, in ``N = rows * row_length / C``
    chunks.

    Masks separate the documents in a row: nothing carries over from one to the next.
    """
    chunks, heads, groups = q.shape[0] // CHUNK, v.shape[1], k.shape[1]
    ratio = heads // groups
    keys = l2_normalize(k).view(chunks, CHUNK, groups, -1).transpose(1, 2)
    queries = (l2_normalize(q) * k.shape[-1] ** -0.5).view(chunks, CHUNK, groups, -1).transpose(1, 2)
    values = v.float().view(chunks, CHUNK, heads, -1).transpose(1, 2)
    starts = (positions == 0).view(chunks, CHUNK).long().cumsum(-1)  # document number inside the chunk
    log_decay = g.view(chunks, CHUNK, heads).transpose(1, 2)
    total = log_decay.cumsum(-1)
    place = torch.arange(CHUNK, device=q.device)
    together = (starts[:, :, None] == starts[:, None, :]) & (place[:, None] >= place[None, :])
    gap = (total[..., :, None] - total[..., None, :]).clamp(MIN_LOG_DECAY, 0.0)
    between = torch.where(together[:, None], gap.exp(), 0.0)  # [N, V, C, C]
    strength = beta.view(chunks, CHUNK, heads).transpose(1, 2)[..., None]
    # a token reads the carried state only if its document starts before the chunk
    carried = (starts == 0)[:, None]
    grown = torch.where(carried, total.clamp_min(MIN_LOG_DECAY).exp(), 0.0)[..., None]
    last = (starts == starts[:, -1:])[:, None]
    to_end = torch.where(last, (total[..., -1:] - total).clamp(MIN_LOG_DECAY, 0.0).exp(), 0.0)[..., None]
    survive = grown[..., -1:, :]
    keys_v = keys.repeat_interleave(ratio, 1)
    queries_v = queries.repeat_interleave(ratio, 1)
    similar = (keys @ keys.mT).repeat_interleave(ratio, 1)
    asked = (queries @ keys.mT).repeat_interleave(ratio, 1)
    triangle = (similar * between * strength).tril(-1)
    right = torch.cat((values * strength, keys_v * (strength * grown)), -1)
    from_delta = torch.cat((asked * between, (to_end * keys_v).mT), -2)  # [N, V, C + Dk, C]
    return triangle, right, from_delta, grown * queries_v, survive


def _delta_scan(
    inverse: Tensor, right: Tensor, from_delta: Tensor, queries: Tensor, survive: Tensor, rows: int, dv: int
) -> Tensor:
    """Carry the state from chunk to chunk, all rows at once, two products per step; ``[T, V, Dv]``."""
    written, reads = torch.split(inverse @ right, [dv, queries.shape[-1]], -1)
    from_state = torch.cat((reads, queries), -2)  # [N, V, 2 C, Dk]

    def steps(x: Tensor) -> tuple[Tensor, ...]:
        return torch.unflatten(x, 0, (rows, -1)).unbind(1)

    outputs = []
    state = written.new_zeros(rows, written.shape[1], queries.shape[-1], dv)
    for u, f, d, keep in zip(
        steps(written), steps(from_state), steps(from_delta), steps(survive), strict=True
    ):
        read, asked = (f @ state).chunk(2, -2)
        new, added = torch.split(d @ (u - read), [CHUNK, state.shape[-2]], -2)
        outputs.append(asked + new)
        state = keep * state + added
    stacked = torch.stack(outputs, 1).flatten(0, 1)  # [N, V, C, Dv]
    return stacked.transpose(1, 2).flatten(0, 1)


class DeltaRule:
    """:func:`reference.chunk_gated_delta_rule` for rows of ``row_length`` tokens, a multiple of the chunk."""

    def __init__(self, compile_parts: bool = True) -> None:
        wrap = compiled if compile_parts else in_full_precision
        self.prepare: Callable[..., tuple[Tensor, ...]] = wrap(_delta_prepare)
        self.scan: Callable[..., Tensor] = wrap(_delta_scan)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, positions: Tensor, row_length: int
    ) -> Tensor:
        """Arguments of the reference plus positions ``[T]`` and the row length; ``[T, V, Dv]`` float32."""
        triangle, *rest = self.prepare(q, k, v, g, beta, positions, row_length)
        inverse = _unit_lower_inverse(triangle)
        return self.scan(inverse, *rest, q.shape[0] // row_length, v.shape[-1])


def _combine(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    return (y[places].float() * weights[..., None].float()).sum(1)


def _activate(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def _spread(grad: Tensor, tokens: Tensor, row_weights: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad[tokens].float() * row_weights[:, None]).to(dtype)


def _weight_grad(grad: Tensor, y: Tensor, places: Tensor) -> Tensor:
    return (grad[:, None, :].float() * y[places].float()).sum(-1)


def _activate_grad(h: Tensor, grad: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, -1)
    sigmoid = gate.sigmoid()
    d_gate = grad.float() * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((d_gate, grad.float() * gate * sigmoid), -1).to(h.dtype)


def _sum_places(rows: Tensor, places: Tensor) -> Tensor:
    return rows[places].float().sum(1)


class MoeExperts:
    """:func:`reference.moe_experts` with rows sorted by expert and padded, and its own backward pass."""

    def __init__(self, compile_parts: bool = True) -> None:
        wrap = compiled if compile_parts else in_full_precision
        self.combine, self.activate, self.spread = wrap(_combine), wrap(_activate), wrap(_spread)
        self.weight_grad, self.activate_grad, self.sum_places = (
            wrap(_weight_grad),
            wrap(_activate_grad),
            wrap(_sum_places),
        )

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        """Arguments and result of the reference; the result is float32."""
        out: Tensor = _Experts.apply(x, weights, ids, w13, w2, self)  # type: ignore[no-untyped-call]
        return out


class _Segments:
    """Rows of every expert, padded to whole tiles, in one buffer whose size depends on shapes only."""

    def __init__(self, ids: Tensor, num_experts: int) -> None:
        num_tokens, k = ids.shape
        flat = ids.flatten()
        counts = flat.bincount(minlength=num_experts)
        padded = (counts + ROW_TILE - 1) // ROW_TILE * ROW_TILE
        ends = padded.cumsum(0)
        order = flat.argsort(stable=True)
        firsts = counts.cumsum(0) - counts
        shift = (ends - padded - firsts)[flat[order]]
        rows = torch.arange(num_tokens * k, device=ids.device) + shift
        self.size = -(-num_tokens * k // ROW_TILE) * ROW_TILE + num_experts * ROW_TILE
        self.places = torch.empty_like(flat).index_copy_(0, order, rows).view(num_tokens, k)
        self.tokens = torch.zeros(self.size, dtype=torch.long, device=ids.device).index_copy_(
            0, rows, order // k
        )
        self.slots = rows, order
        bounds = [0, *ends.tolist()]
        self.spans = [slice(a, b) for a, b in pairwise(bounds)]

    def buffer(self, like: Tensor, width: int) -> Tensor:
        """Uninitialised ``[size, width]``, except that rows after the last span are zero."""
        made = like.new_empty(self.size, width)
        made[self.spans[-1].stop :].zero_()
        return made

    def row_weights(self, weights: Tensor) -> Tensor:
        """Weight of each buffer row; zero for padding."""
        rows, order = self.slots
        return weights.new_zeros(self.size, dtype=torch.float32).index_copy_(
            0, rows, weights.flatten().float()[order]
        )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor, parts: MoeExperts
    ) -> Tensor:
        segments = _Segments(ids, w13.shape[0])
        dtype = product_dtype(x)
        low13, low2 = w13.to(dtype), w2.to(dtype)
        rows = x.to(dtype).index_select(0, segments.tokens)
        h = segments.buffer(rows, w13.shape[1])
        for span, w in zip(segments.spans, low13.unbind(0), strict=True):
            torch.mm(rows[span], w.t(), out=h[span])
        act = parts.activate(h)
        y = segments.buffer(rows, x.shape[1])
        for span, w in zip(segments.spans, low2.unbind(0), strict=True):
            torch.mm(act[span], w.t(), out=y[span])
        ctx.save_for_backward(rows, h, act, y, low13, low2, weights)
        ctx.segments, ctx.parts, ctx.x_dtype = segments, parts, x.dtype
        out: Tensor = parts.combine(y, segments.places, weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, act, y, low13, low2, weights = ctx.saved_tensors
        segments, parts = ctx.segments, ctx.parts
        d_weights = parts.weight_grad(grad, y, segments.places).to(weights.dtype)
        d_y = parts.spread(grad, segments.tokens, segments.row_weights(weights), y.dtype)
        d_act, d_w2 = segments.buffer(act, act.shape[1]), torch.empty_like(low2)
        for index, span in enumerate(segments.spans):
            torch.mm(d_y[span], low2[index], out=d_act[span])
            torch.mm(d_y[span].t(), act[span], out=d_w2[index])
        d_h = parts.activate_grad(h, d_act)
        d_rows, d_w13 = segments.buffer(rows, rows.shape[1]), torch.empty_like(low13)
        for index, span in enumerate(segments.spans):
            torch.mm(d_h[span], low13[index], out=d_rows[span])
            torch.mm(d_h[span].t(), rows[span], out=d_w13[index])
        d_x = parts.sum_places(d_rows, segments.places).to(ctx.x_dtype)
        return d_x, d_weights, None, d_w13.float(), d_w2.float(), None


def _entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the losses, and its gradient with respect to the logits."""
    full = logits.float()
    log_total = full.logsumexp(-1)
    chosen = full.gather(-1, targets[:, None])[:, 0]
    probs = (full - log_total[:, None]).exp()
    hit = torch.arange(full.shape[-1], device=full.device)[None, :] == targets[:, None]
    grad = (probs - hit.float()) * weights[:, None]
    return ((log_total - chosen) * weights).sum(), grad.to(logits.dtype)


class LinearCrossEntropy:
    """Weighted cross entropy of ``hidden @ weight.T``, computing the logits of ``tile`` rows at a time."""

    def __init__(self, tile: int = 1024, compile_parts: bool = True) -> None:
        self.tile = tile
        self.entropy = (compiled if compile_parts else in_full_precision)(_entropy)

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum over rows of ``weights [T]`` times the loss of ``targets [T]`` for ``hidden [T, H]``."""
        kept = -(-int(weights.count_nonzero()) // self.tile) * self.tile
        if kept < hidden.shape[0]:  # skip whole tiles of rows of weight zero
            rows = (weights == 0).to(torch.uint8).argsort(stable=True)[:kept]
            hidden, targets, weights = hidden.index_select(0, rows), targets[rows], weights[rows]
        out: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, weights, self)  # type: ignore[no-untyped-call]
        return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, parts: LinearCrossEntropy
    ) -> Tensor:
        low_h, low_w = hidden.to(product_dtype(hidden)), weight.to(product_dtype(hidden))
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_weight = torch.empty_like(low_h), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], parts.tile):
            span = slice(start, start + parts.tile)
            loss, grad = parts.entropy(low_h[span] @ low_w.t(), targets[span], weights[span])
            total += loss
            torch.mm(grad, low_w, out=d_hidden[span])
            d_weight += grad.t() @ low_h[span]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (d_hidden * grad).to(hidden_dtype), (d_weight * grad).to(weight_dtype), None, None, None
