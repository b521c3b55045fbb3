"""Every op of the supported models in plain PyTorch: the specification for faster kernels.

All ops are differentiable. Statistics, decays, recurrences and softmaxes are always float32, and results are
cast back to the activation dtype where the published models round.

Shape legend: T packed tokens of all sequences, S sequences, H hidden size, K key heads, V value heads
(V = K * R), D head width (Dk, Dv where they differ), C conv channels or the chunk length, E experts, I expert
width.
``lengths`` lists the number of tokens of each sequence; they sum to T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from godwit.config import RotarySpec

#: Added to the squared norm of queries and keys in the delta rule (Yang et al. 2024, their implementation).
L2_EPS = 1e-6
CHUNK = 64

P = ParamSpec("P")
R = TypeVar("R")


def in_full_precision(op: Callable[P, R]) -> Callable[P, R]:
    """Run ``op`` with autocast off, since it chooses its own dtypes and its recurrences must stay float32."""

    @wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return op(*args, **kwargs)

    return run


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., in] @ w [out, in].T``."""
    return F.linear(x, w, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, zero_centered: bool) -> Tensor:
    """Root-mean-square norm over the last dimension, statistics in float32.

    If ``zero_centered`` (Qwen3-Next), the weight is an offset from one, and only the product is rounded;
    otherwise (Llama, Qwen3) the normalised values are rounded and multiplied in the activation dtype.
    """
    u = x.float()
    normed = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    if zero_centered:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of a value head times ``silu(gate)`` in float32; rounded three times, as in Qwen3-Next."""
    u = x.float()
    normed = (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return ((weight * normed).float() * F.silu(gate.float())).to(x.dtype)


def rotary_frequencies(spec: RotarySpec) -> Tensor:
    """Inverse frequencies ``[dim / 2]`` in float32: default, linear, YaRN or Llama 3."""
    periods = spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim)
    base = 1.0 / periods
    if spec.kind == "linear":
        return base / spec.factor
    if spec.kind == "yarn":
        return _yarn_frequencies(periods, spec)
    if spec.kind == "llama3":
        return _llama3_frequencies(base, spec)
    return base


def _yarn_frequencies(periods: Tensor, spec: RotarySpec) -> Tensor:
    """Peng et al. 2023: interpolate slow frequencies by ``factor``, keep fast ones, ramp between.

    The order of operations is that of ``transformers``: at position 262143 the last bit of a frequency
    changes the angle by a hundredth of a radian.
    """

    def correction(turns: float) -> float:
        ratio = spec.original_max_position / (turns * 2 * math.pi)
        return spec.dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = correction(spec.beta_fast), correction(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (spec.factor * periods) * (1 - keep) + 1.0 / periods * keep


def _llama3_frequencies(base: Tensor, spec: RotarySpec) -> Tensor:
    """Llama 3.1: divide long wavelengths by ``factor``, keep short ones, blend between."""
    wavelength = 2 * math.pi / base
    turns = spec.original_max_position / wavelength
    smooth = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * base / spec.factor + smooth * base


def rotary_cos_sin(
    positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, dim / 2]`` in ``dtype`` of ``positions [T]``; angles are float32 products."""
    angles = positions.float()[:, None] * frequencies.to(positions.device)[None, :]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dim = ``2 * cos.shape[-1]`` components of ``x [T, heads, D]``: i with i + dim / 2."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


@in_full_precision
def causal_conv1d(
    x: Tensor, weight: Tensor, lengths: Sequence[int], history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU over packed sequences.

    Args:
        x: inputs ``[T, C]``.
        weight: ``[C, kernel]``; the last column multiplies the current token.
        lengths: tokens of each sequence.
        history: raw inputs before each sequence ``[S, kernel - 1, C]``, oldest first; zeros when None.

    Returns:
        Outputs ``[T, C]`` in the dtype of x and the history after the last token ``[S, kernel - 1, C]``.
    """
    width, before = weight.shape[1], weight.shape[1] - 1
    if history is None:
        history = x.new_zeros(len(lengths), before, x.shape[1])
    pieces: list[Tensor] = []
    for past, piece in zip(history.unbind(0), torch.split(x, list(lengths)), strict=True):
        pieces += (past.to(x.dtype), piece)
    padded = torch.cat(pieces)
    span = padded.shape[0] - before
    taps = weight.float().t()
    total = padded[:span].float() * taps[0]
    for tap in range(1, width):
        total = torch.addcmul(total, padded[tap : tap + span].float(), taps[tap])
    ends = torch.tensor([length + before for length in lengths], device=x.device).cumsum(0)
    rows = _owned_rows(lengths, before, x.device)
    out = F.silu(total.index_select(0, rows).to(x.dtype))
    tails = ends[:, None] - torch.arange(before, 0, -1, device=x.device)[None, :]
    return out, padded.index_select(0, tails.flatten()).view(len(lengths), before, x.shape[1])


@in_full_precision
def causal_conv1d_packed(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """:func:`causal_conv1d` without history: inputs before position 0 count as zero."""
    width = weight.shape[1]
    total = x.float() * weight[:, width - 1].float()
    for shift in range(1, width):
        moved = F.pad(x, (0, 0, shift, 0))[: x.shape[0]].float()
        inside = (positions >= shift)[:, None]
        total = total + torch.where(inside, moved, 0.0) * weight[:, width - 1 - shift].float()
    return F.silu(total.to(x.dtype))


def _owned_rows(lengths: Sequence[int], gap: int, device: torch.device) -> Tensor:
    """Index of each packed token if ``gap`` extra rows precede every sequence except the first."""
    counts = torch.tensor(lengths, device=device)
    shift = torch.arange(len(lengths), device=device) * gap
    return torch.arange(sum(lengths), device=device) + torch.repeat_interleave(shift, counts)


def gdn_gates(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay ``g <= 0`` and write strength ``beta`` in (0, 1), both ``[T, V]`` float32.

    As published, the sigmoid is computed in the activation dtype and the decay in float32.
    """
    decay = -a_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return decay, b.sigmoid().float()


def l2_normalize(x: Tensor) -> Tensor:
    """``x / sqrt(sum(x^2) + 1e-6)`` over the last dimension, in float32 (or float64 if x is)."""
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    return u * torch.rsqrt(u.square().sum(-1, keepdim=True) + L2_EPS)


@in_full_precision
def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lengths: Sequence[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gated delta rule by definition, token by token (Yang, Kautz, Hatamizadeh 2024).

    Args:
        q, k: ``[T, K, Dk]``, raw; normalised and scaled here.
        v: ``[T, V, Dv]``; value head h reads key head ``h // R``.
        g, beta: ``[T, V]`` float32.
        lengths: tokens of each sequence.
        initial_state: ``[S, V, Dk, Dv]`` float32, zeros when None; not modified.

    Returns:
        Outputs ``[T, V, Dv]`` float32, final states ``[S, V, Dk, Dv]`` and the written rows
        ``delta [T, V, Dv]``; ``g``, the normalised k and delta suffice to replay a state.
    """
    ratio = v.shape[1] // k.shape[1]
    keys = l2_normalize(k).repeat_interleave(ratio, 1)
    queries = l2_normalize(q).repeat_interleave(ratio, 1) * k.shape[-1] ** -0.5
    values, decay = v.to(keys.dtype), g.exp()
    state = _start_state(initial_state, len(lengths), v.shape[1], k.shape[-1], v.shape[-1], keys)
    order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    rows_by_step: list[Tensor] = []
    outputs: list[Tensor] = []
    deltas: list[Tensor] = []
    finals: list[Tensor | None] = [None] * len(lengths)
    current = state[torch.tensor(order, dtype=torch.long, device=v.device)]
    for step in range(max(lengths, default=0)):
        active = sum(1 for s in order if lengths[s] > step)
        for rank in range(active, current.shape[0]):
            finals[order[rank]] = current[rank]
        rows = starts[order[:active]].to(v.device) + step
        current = current[:active] * decay[rows][..., None, None]
        key = keys[rows][..., None]
        delta = beta[rows][..., None] * (values[rows] - (current * key).sum(-2))
        current = current + key * delta[..., None, :]
        outputs.append((current * queries[rows][..., None]).sum(-2))
        deltas.append(delta)
        rows_by_step.append(rows)
    for rank in range(current.shape[0]):
        finals[order[rank]] = current[rank]
    final = torch.stack([f for f in finals if f is not None]) if lengths else state
    if not outputs:
        return v.new_zeros(v.shape, dtype=keys.dtype), final, v.new_zeros(v.shape, dtype=keys.dtype)
    place = torch.cat(rows_by_step).argsort()
    return torch.cat(outputs)[place], final, torch.cat(deltas)[place]


def replay_delta_rule(state: Tensor, g: Tensor, keys: Tensor, deltas: Tensor) -> Tensor:
    """Apply recorded writes to ``state [V, Dk, Dv]``, bit for bit as the recurrence did.

    ``g [N, V]``, normalised ``keys [N, V, Dk]`` and ``deltas [N, V, Dv]`` of N tokens, oldest first.
    """
    decay = g.exp()
    for step in range(g.shape[0]):
        state = state * decay[step][:, None, None] + keys[step][..., None] * deltas[step][:, None, :]
    return state


@in_full_precision
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lengths: Sequence[int],
    initial_state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule in chunks (WY form): matrix products inside a chunk, one state step per chunk.

    Arguments and the first two results are those of :func:`recurrent_gated_delta_rule`. Sequences are padded
    to whole chunks with zero keys, values and log decays, which have no effect; all chunks are computed at
    once, except that the state passes from chunk to chunk.
    """
    num_seqs, heads, groups = len(lengths), v.shape[1], k.shape[1]
    ratio, dk, dv = heads // groups, k.shape[-1], v.shape[-1]
    layout = _ChunkLayout(lengths, chunk, v.device)

    keys = layout.gather(l2_normalize(k))[:, :, None]  # [N, K, 1, C, Dk]
    queries = layout.gather(l2_normalize(q) * dk**-0.5)[:, :, None]
    values = torch.unflatten(layout.gather(v.to(keys.dtype)), 1, (groups, ratio))  # [N, K, R, C, Dv]
    decay = torch.unflatten(layout.gather(g[..., None])[..., 0], 1, (groups, ratio)).cumsum(
        -1
    )  # [N, K, R, C]
    strength = layout.gather(beta[..., None].to(keys.dtype))
    strength = torch.unflatten(strength, 1, (groups, ratio))  # [N, K, R, C, 1]

    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).tril()
    gap = decay[..., :, None] - decay[..., None, :]
    between = gap.masked_fill(~lower, float("-inf")).exp()
    triangle = (keys @ keys.mT) * between * strength
    grown = decay.exp()[..., None]
    right = torch.cat((values * strength, keys * (strength * grown)), -1)
    # unitriangular: the solver reads ones on the diagonal and nothing above it
    solved = torch.linalg.solve_triangular(triangle, right, upper=False, unitriangular=True)
    written, reads = solved.split((dv, dk), -1)
    weights = (queries @ keys.mT) * between
    to_end = (decay[..., -1:] - decay).exp()[..., None] * keys
    scaled_queries = grown * queries
    total = decay[..., -1].exp()[..., None, None]

    state = _start_state(initial_state, num_seqs, heads, dk, dv, keys)
    current = torch.unflatten(state, 1, (groups, ratio))[layout.order]
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for rows in layout.steps:
        if current.shape[0] > rows.shape[0]:
            finals.append(current[rows.shape[0] :])
            current = current[: rows.shape[0]]
        delta = written[rows] - reads[rows] @ current
        outputs.append(scaled_queries[rows] @ current + weights[rows] @ delta)
        current = total[rows] * current + to_end[rows].mT @ delta
    finals.append(current)
    final = torch.cat(finals[::-1])[layout.order.argsort()].flatten(1, 2)
    if not outputs:
        return values.new_zeros(v.shape), final
    stacked = torch.cat(outputs)[torch.cat(layout.steps).argsort()]
    return layout.scatter(stacked.flatten(1, 2)), final


class _ChunkLayout:
    """The place of each packed token in ``[N chunks, C]`` and the chunks of each sequential step."""

    def __init__(self, lengths: Sequence[int], chunk: int, device: torch.device) -> None:
        self.chunk = chunk
        self.num_tokens = sum(lengths)
        counts = [-(-length // chunk) for length in lengths]
        self.num_chunks = sum(counts)
        firsts = [0]
        for count in counts:
            firsts.append(firsts[-1] + count)
        order = sorted(range(len(lengths)), key=lambda s: -counts[s])
        self.order = torch.tensor(order, dtype=torch.long, device=device)
        self.steps = [
            torch.tensor([firsts[s] + step for s in order if counts[s] > step], device=device)
            for step in range(max(counts, default=0))
        ]
        repeats = torch.tensor(lengths, dtype=torch.long)
        token_starts = repeats.cumsum(0) - repeats
        shift = torch.tensor(firsts[:-1], dtype=torch.long) * chunk - token_starts
        self.places = (torch.arange(self.num_tokens) + torch.repeat_interleave(shift, repeats)).to(device)

    def gather(self, x: Tensor) -> Tensor:
        """``[T, heads, D]`` to ``[N, heads, C, D]``, zeros in the padding."""
        flat = x.new_zeros(self.num_chunks * self.chunk, *x.shape[1:]).index_copy(0, self.places, x)
        return flat.view(self.num_chunks, self.chunk, *x.shape[1:]).transpose(1, 2)

    def scatter(self, x: Tensor) -> Tensor:
        """``[N, heads, C, D]`` back to ``[T, heads, D]``."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


def _start_state(initial: Tensor | None, num_seqs: int, heads: int, dk: int, dv: int, like: Tensor) -> Tensor:
    if initial is None:
        return like.new_zeros(num_seqs, heads, dk, dv)
    return initial.to(like.dtype)


@in_full_precision
def attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int], scale: float
) -> Tensor:
    """Causal grouped-query attention; the queries of a sequence are its last tokens.

    Args:
        q: ``[T, heads, D]``, all sequences packed.
        keys, values: ``[L, kv_heads, D]`` for each sequence, L >= its number of queries.
        lengths: queries of each sequence.
        scale: factor of the scores.

    Returns:
        ``[T, heads, D]`` in the dtype of q; scores and softmax are float32.
    """
    outputs = [
        _attend(query, key, value, scale)
        for query, key, value in zip(torch.split(q, list(lengths)), keys, values, strict=True)
    ]
    return torch.cat(outputs) if outputs else q


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    num_queries, num_keys, ratio = query.shape[0], key.shape[0], query.shape[1] // key.shape[1]
    grouped = torch.unflatten(query.float(), 1, (key.shape[1], ratio)).permute(
        1, 2, 0, 3
    )  # [kv, ratio, Tq, D]
    scores = grouped @ key.float().permute(1, 2, 0)[:, None] * scale
    past = torch.arange(num_keys, device=query.device)[None, :]
    now = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
    probs = scores.masked_fill(past > now, float("-inf")).softmax(-1)
    mixed = probs.to(value.dtype).float() @ value.float().permute(1, 0, 2)[:, None]
    return mixed.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)


def store_kv(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """Write ``new [T, kv_heads, D]`` into ``cache [blocks, block, kv_heads, D]`` at flat slots ``[T]``."""
    cache.view(-1, *cache.shape[2:])[slots] = new.to(cache.dtype)


def gather_kv(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The first ``length`` cached tokens of one sequence ``[length, kv_heads, D]``."""
    block = cache.shape[1]
    used = block_table[: -(-length // block)]
    return cache.index_select(0, used).flatten(0, 1)[:length]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Sequence[int],
    seq_lens: Sequence[int],
    scale: float,
    attend: Callable[..., Tensor] = attention,
) -> Tensor:
    """:func:`attention` with the keys and values in the blocks of a cache.

    Args:
        q: ``[T, heads, D]``, all sequences packed.
        k_cache, v_cache: ``[blocks, block, kv_heads, D]``; they already contain the queries' own tokens.
        block_tables: ``[S, width]`` int64, the blocks of each sequence in order; unused entries are ignored.
        lengths: queries of each sequence.
        seq_lens: tokens of each sequence in the cache, including its queries.
        scale: factor of the scores.
        attend: computes :func:`attention` on the gathered keys and values.

    Returns:
        ``[T, heads, D]`` in the dtype of q.
    """
    tables = list(zip(block_tables, seq_lens, strict=True))
    keys = [gather_kv(k_cache, table, length) for table, length in tables]
    values = [gather_kv(v_cache, table, length) for table, length in tables]
    return attend(q, keys, values, lengths, scale)


def topk_softmax(logits: Tensor, k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Router: float32 softmax over all experts, then the k largest; weights and ids ``[T, k]``."""
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


def swiglu(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """``w2 (silu(gate x) * (up x))`` with gate and up stacked in ``w13 [2 I, H]``; ``w2 [H, I]``."""
    gate, up = F.linear(x, w13).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w2)


def moe_experts(x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Weighted sum of the chosen experts.

    Args:
        x: ``[T, H]``.
        weights, ids: ``[T, k]``.
        w13, w2: ``[E, 2 I, H]`` and ``[E, H, I]``.

    Returns:
        ``[T, H]`` in the dtype of x; a token's k results are summed in float32 and rounded once.
    """
    num_tokens, k = ids.shape
    by_expert = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=w13.shape[0]).tolist()
    rows = torch.split(x.index_select(0, by_expert // k), counts)
    # unbind, since the gradient of a select is a zero-filled copy of the whole stack for each expert
    parts = [
        swiglu(row, gate_up, down)
        for row, gate_up, down in zip(rows, w13.unbind(0), w2.unbind(0), strict=True)
        if row.shape[0]
    ]
    if not parts:
        return torch.zeros_like(x)
    out = torch.cat(parts) * weights.flatten().index_select(0, by_expert)[:, None]
    slots = out.index_select(0, by_expert.argsort()).view(num_tokens, k, -1)
    return slots.float().sum(1).to(x.dtype)
