"""The ops that models call; a table picks the kernel.

Kernels are looked up by op, weight format and device; if none is registered, the plain PyTorch reference
runs. The table is the only mutable state at module level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from godwit.kernels import reference, sdpa, training
from godwit.kernels.reference import (
    apply_rotary_emb,
    causal_conv1d,
    chunk_gated_delta_rule,
    gdn_gates,
    l2_normalize,
    recurrent_gated_delta_rule,
    replay_delta_rule,
    rotary_cos_sin,
    rotary_frequencies,
    swiglu,
    topk_softmax,
)
from godwit.qtensor import QuantTensor

__all__ = [
    "apply_rotary_emb",
    "attention",
    "causal_conv1d",
    "causal_conv1d_packed",
    "chunk_gated_delta_rule",
    "embed",
    "gated_delta_rule_rows",
    "gdn_gates",
    "l2_normalize",
    "linear",
    "moe_experts",
    "paged_attention",
    "recurrent_gated_delta_rule",
    "register",
    "replay_delta_rule",
    "rms_norm",
    "rms_norm_gated",
    "rotary_cos_sin",
    "rotary_frequencies",
    "store_kv",
    "swiglu",
    "topk_softmax",
    "use_training_kernels",
]

_TABLE: dict[tuple[str, str, str], Callable[..., Any]] = {
    ("attention", "dense", "cpu"): sdpa.attention,
    ("attention", "dense", "cuda"): sdpa.attention,
    ("paged_attention", "dense", "cpu"): sdpa.paged_attention,
    ("paged_attention", "dense", "cuda"): sdpa.paged_attention,
}


def register(op: str, weight_format: str, device: str, kernel: Callable[..., Any]) -> None:
    """Make ``kernel`` the implementation of ``op`` for a weight format and a device type."""
    _TABLE[op, weight_format, device] = kernel


def _lookup(
    op: str, x: Tensor, fallback: Callable[..., Any], weight_format: str = "dense"
) -> Callable[..., Any]:
    return _TABLE.get((op, weight_format, x.device.type), fallback)


def linear(x: Tensor, w: Tensor | QuantTensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., in] @ w [out, in].T + bias``."""
    result: Tensor = _lookup("linear", x, reference.linear, _format_of(w))(x, w, bias)
    return result


def embed(ids: Tensor, w: Tensor | QuantTensor) -> Tensor:
    """Rows ``ids [T]`` of ``w [V, H]``."""
    result: Tensor = _lookup("embed", ids, F.embedding, _format_of(w))(ids, w)
    return result


def _format_of(w: Tensor | QuantTensor) -> str:
    return w.format if isinstance(w, QuantTensor) else "dense"


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, zero_centered: bool) -> Tensor:
    """See :func:`godwit.kernels.reference.rms_norm`."""
    result: Tensor = _lookup("rms_norm", x, reference.rms_norm)(x, weight, eps, zero_centered=zero_centered)
    return result


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`godwit.kernels.reference.rms_norm_gated`."""
    result: Tensor = _lookup("rms_norm_gated", x, reference.rms_norm_gated)(x, gate, weight, eps)
    return result


def causal_conv1d_packed(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """Convolution and SiLU of whole packed sequences; ``positions [T]`` is zero at the start of each."""
    kernel = _lookup("causal_conv1d_packed", x, reference.causal_conv1d_packed)
    result: Tensor = kernel(x, weight, positions)
    return result


def gated_delta_rule_rows(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, positions: Tensor, row_length: int
) -> Tensor:
    """The chunked delta rule for sequences packed in rows; see :class:`godwit.kernels.training.DeltaRule`."""
    kernel = _lookup("gated_delta_rule_rows", q, training.DeltaRule(compile_parts=False))
    result: Tensor = kernel(q, k, v, g, beta, positions, row_length)
    return result


def moe_experts(x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """See :func:`godwit.kernels.reference.moe_experts`."""
    result: Tensor = _lookup("moe_experts", x, reference.moe_experts)(x, weights, ids, w13, w2)
    return result


def attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int], scale: float
) -> Tensor:
    """Causal grouped-query attention of packed queries; see :func:`godwit.kernels.reference.attention`."""
    result: Tensor = _lookup("attention", q, reference.attention)(q, keys, values, lengths, scale)
    return result


def store_kv(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """See :func:`godwit.kernels.reference.store_kv`."""
    _lookup("store_kv", new, reference.store_kv)(cache, new, slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Sequence[int],
    seq_lens: Sequence[int],
    scale: float,
) -> Tensor:
    """Attention over the blocks of a cache; see :func:`godwit.kernels.reference.paged_attention`."""
    kernel = _lookup("paged_attention", q, reference.paged_attention)
    result: Tensor = kernel(q, k_cache, v_cache, block_tables, lengths, seq_lens, scale)
    return result


def use_training_kernels(device: str = "cpu") -> None:
    """Register the compiled training kernels for a device, until the process exits."""
    register("rms_norm", "dense", device, training.compiled(reference.rms_norm))
    register("rms_norm_gated", "dense", device, training.compiled(reference.rms_norm_gated))
    register("causal_conv1d_packed", "dense", device, training.compiled(reference.causal_conv1d_packed))
    register("gated_delta_rule_rows", "dense", device, training.DeltaRule())
    register("moe_experts", "dense", device, training.MoeExperts())
