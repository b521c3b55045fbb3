"""Token mixers: gated softmax attention over paged KV, and Gated DeltaNet over a recurrent state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from godwit.config import AttentionSpec, GatedDeltaNetSpec, MixerSpec, ModelConfig
from godwit.kernels import ops
from godwit.models.batch import ForwardBatch
from godwit.models.caches import Caches, PagedKV, RecurrentState
from godwit.models.layers import Linear, RotaryEmbedding, build_norm


class Attention(nn.Module):
    """Causal grouped-query attention, optionally with q/k norms and a sigmoid gate on its output.

    The input projection is one matrix with rows query | gate | key | value; the gate's rows are optional.
    """

    cache_dtype: torch.dtype | None = None  # of keys and values; None: that of the weights

    def __init__(self, spec: AttentionSpec, config: ModelConfig) -> None:
        super().__init__()
        self.spec = spec
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.split = [query, query if spec.output_gate else 0, kv, kv]
        self.in_proj = Linear(config.hidden_size, sum(self.split), spec.bias)
        self.out_proj = Linear(query, config.hidden_size, spec.output_bias)
        self.q_norm = build_norm(spec.head_dim, config) if spec.qk_norm else None
        self.k_norm = build_norm(spec.head_dim, config) if spec.qk_norm else None
        self.rotary = RotaryEmbedding(spec.rotary)

    def forward(self, x: Tensor, batch: ForwardBatch, caches: Caches | None, cache: object | None) -> Tensor:
        """``x [T, H]`` normalised hidden states to ``[T, H]``."""
        heads = (-1, self.spec.head_dim)
        q, gate, k, v = self.in_proj(x).split(self.split, -1)
        q, k, v = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.rotary(batch.positions, q.dtype)
        q, k = ops.apply_rotary_emb(q, cos, sin), ops.apply_rotary_emb(k, cos, sin)
        out = self._attend(q, k, v, batch, cache).flatten(1)
        if self.spec.output_gate:
            out = out * gate.sigmoid()
        result: Tensor = self.out_proj(out)
        return result

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch, cache: object | None) -> Tensor:
        """``q [T, heads, D]`` over each whole sequence; new keys and values are stored in the cache first."""
        scale = self.spec.head_dim**-0.5
        if not isinstance(cache, PagedKV) or batch.slot_mapping is None or batch.block_tables is None:
            keys, values = torch.split(k, batch.lengths), torch.split(v, batch.lengths)
            return ops.attention(q, keys, values, batch.lengths, scale)
        ops.store_kv(cache.k, k, batch.slot_mapping)
        ops.store_kv(cache.v, v, batch.slot_mapping)
        return ops.paged_attention(
            q, cache.k, cache.v, batch.block_tables, batch.lengths, batch.seq_lens, scale
        )


class GatedDeltaNet(nn.Module):
    """Linear attention with the gated delta rule (Yang, Kautz, Hatamizadeh 2024) as in Qwen3-Next.

    Projections are kept de-interleaved: ``in_proj_qkvz`` has rows query | key | value | z with heads in
    natural order, ``in_proj_ba`` rows b | a; the convolution sees query | key | value.
    """

    cache_dtype: torch.dtype | None = None  # of the convolution's window; None: that of the weights

    def __init__(self, spec: GatedDeltaNetSpec, config: ModelConfig) -> None:
        super().__init__()
        self.spec = spec
        self.eps = config.norm_eps
        self.in_proj_qkvz = Linear(config.hidden_size, spec.conv_dim + spec.value_dim)
        self.in_proj_ba = Linear(config.hidden_size, 2 * spec.num_v_heads)
        self.conv_weight = nn.Parameter(torch.empty(spec.conv_dim, spec.conv_kernel))
        self.A_log = nn.Parameter(torch.empty(spec.num_v_heads))
        self.dt_bias = nn.Parameter(torch.ones(spec.num_v_heads))
        self.norm_weight = nn.Parameter(torch.ones(spec.head_v_dim))
        self.out_proj = Linear(spec.value_dim, config.hidden_size)

    def forward(self, x: Tensor, batch: ForwardBatch, caches: Caches | None, cache: object | None) -> Tensor:
        """``x [T, H]`` normalised hidden states to ``[T, H]``."""
        spec = self.spec
        mixed, z = self.in_proj_qkvz(x).split((spec.conv_dim, spec.value_dim), -1)
        b, a = self.in_proj_ba(x).chunk(2, -1)
        g, beta = ops.gdn_gates(a, b, self.A_log, self.dt_bias)
        if caches is not None and isinstance(cache, RecurrentState):
            out = self._continue(mixed, g, beta, batch, caches, cache)
        else:
            conv = ops.causal_conv1d_packed(mixed, self.conv_weight, batch.positions)
            if batch.row_length:
                out = ops.gated_delta_rule_rows(
                    *self._heads(conv), g, beta, batch.positions, batch.row_length
                )
            else:
                out, _ = ops.chunk_gated_delta_rule(*self._heads(conv), g, beta, batch.lengths)
        normed = ops.rms_norm_gated(
            out.to(x.dtype), z.unflatten(-1, (spec.num_v_heads, spec.head_v_dim)), self.norm_weight, self.eps
        )
        result: Tensor = self.out_proj(normed.flatten(1))
        return result

    def _heads(self, conv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        q, k, v = torch.split(conv, [spec.key_dim, spec.key_dim, spec.value_dim], -1)
        keys = (spec.num_k_heads, spec.head_k_dim)
        return (
            torch.unflatten(q, -1, keys),
            torch.unflatten(k, -1, keys),
            torch.unflatten(v, -1, (spec.num_v_heads, spec.head_v_dim)),
        )

    def _continue(
        self,
        mixed: Tensor,
        g: Tensor,
        beta: Tensor,
        batch: ForwardBatch,
        caches: Caches,
        cache: RecurrentState,
    ) -> Tensor:
        """Advance each sequence's row, keeping tentative tokens in the journal."""
        rows = list(batch.state_indices)
        history = cache.conv[rows]
        conv, _ = ops.causal_conv1d(
            mixed, self.conv_weight, batch.lengths, history[:, history.shape[1] - cache.history :]
        )
        q, k, v = self._heads(conv)
        outputs = []
        start = 0
        for row, length, tentative, raw in zip(
            rows, batch.lengths, batch.num_tentative, torch.split(mixed, batch.lengths), strict=True
        ):
            span = slice(start, start + length)
            start += length
            cache.conv[row] = torch.cat((cache.conv[row], raw.to(cache.conv.dtype)))[length:]
            state = self._settled(cache, row, caches.pending[row])
            out = self._advance(q[span], k[span], v[span], g[span], beta[span], state, cache, row, tentative)
            outputs.append(out)
        return torch.cat(outputs) if outputs else v.float()

    def _settled(self, cache: RecurrentState, row: int, pending: int) -> Tensor:
        """The state of ``row`` with the tokens that survived in its journal."""
        return ops.replay_delta_rule(
            cache.state[row],
            cache.journal_g[row, :pending],
            cache.journal_k[row, :pending],
            cache.journal_delta[row, :pending],
        )

    def _advance(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        cache: RecurrentState,
        row: int,
        tentative: int,
    ) -> Tensor:
        length = q.shape[0]
        if not tentative and length > 1:
            out, final = ops.chunk_gated_delta_rule(q, k, v, g, beta, [length], state[None])
            cache.state[row] = final[0]
            return out
        # few tokens go one by one, so that a verified draft leaves the same state, bit for bit, as decoding
        out, final, delta = ops.recurrent_gated_delta_rule(q, k, v, g, beta, [length], state[None])
        if not tentative:
            cache.state[row] = final[0]
            return out
        keys = ops.l2_normalize(k).repeat_interleave(self.spec.num_v_heads // self.spec.num_k_heads, 1)
        sure = length - tentative
        cache.state[row] = ops.replay_delta_rule(state, g[:sure], keys[:sure], delta[:sure])
        cache.journal_g[row, :tentative] = g[sure:]
        cache.journal_k[row, :tentative] = keys[sure:]
        cache.journal_delta[row, :tentative] = delta[sure:]
        return out


Mixer = Attention | GatedDeltaNet
_MODULE_OF: Mapping[type, Callable[[Any, ModelConfig], Mixer]] = MappingProxyType(
    {AttentionSpec: Attention, GatedDeltaNetSpec: GatedDeltaNet}
)


def build_mixer(spec: MixerSpec, config: ModelConfig) -> Mixer:
    """The mixer that ``spec`` describes."""
    return _MODULE_OF[type(spec)](spec, config)
