"""Building blocks: linear maps, norms, rotary angles and the feed-forward parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from godwit.config import DenseSpec, FfnSpec, ModelConfig, MoeSpec, RotarySpec
from godwit.kernels import ops
from godwit.qtensor import QuantExperts


class Linear(nn.Module):
    """``y = x W^T`` with ``weight [out, in]``, optional bias; the weight's format decides the kernel."""

    def __init__(self, num_in: int, num_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        self.bias = nn.Parameter(torch.zeros(num_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Rows of ``weight [V, H]``."""

    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embed(ids, self.weight)


class RMSNorm(nn.Module):
    """RMS norm whose weight is an offset from one (``zero_centered``) or the factor itself."""

    def __init__(self, size: int, eps: float, *, zero_centered: bool) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.zeros(size) if zero_centered else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, zero_centered=self.zero_centered)


class RotaryEmbedding(nn.Module):
    """Cosines and sines for packed positions; the frequencies are computed once, in float32."""

    def __init__(self, spec: RotarySpec) -> None:
        super().__init__()
        self.scale = spec.attention_factor
        # a plain attribute, so that casting the module never rounds the frequencies
        with torch.device("cpu"):  # also when the model is built on the meta device
            self.frequencies = ops.rotary_frequencies(spec)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``positions [T]`` to two tensors ``[T, dim / 2]``."""
        return ops.rotary_cos_sin(positions, self.frequencies, self.scale, dtype)


class SwiGLU(nn.Module):
    """Gate and up stacked in ``w13 [2 I, H]``, down in ``w2 [H, I]``."""

    def __init__(self, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.w13 = Linear(hidden, 2 * width, bias)
        self.w2 = Linear(width, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.w13.bias is None:
            return ops.swiglu(x, self.w13.weight, self.w2.weight)
        gate, up = self.w13(x).chunk(2, -1)
        out: Tensor = self.w2(nn.functional.silu(gate) * up)
        return out


class Experts(nn.Module):
    """Stacked experts: ``w13 [E, 2 I, H]`` (gate rows, then up rows) and ``w2 [E, H, I]``.

    In a model with packed weights both are in ``packed`` and the parameters do not exist.
    """

    packed: QuantExperts | None = None

    def __init__(self, spec: MoeSpec, hidden: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(spec.num_experts, 2 * spec.intermediate, hidden))
        self.w2 = nn.Parameter(torch.empty(spec.num_experts, hidden, spec.intermediate))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return ops.moe_experts(x, weights, ids, self.w13, self.w2)


class SparseMoeBlock(nn.Module):
    """Router, routed experts and, if the family has one, a gated shared expert."""

    def __init__(self, spec: MoeSpec, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.router = Linear(hidden, spec.num_experts)
        self.experts = Experts(spec, hidden)
        self.shared_expert = SwiGLU(hidden, spec.shared_intermediate) if spec.shared_intermediate else None
        self.shared_gate = Linear(hidden, 1) if spec.shared_intermediate else None

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        logits = self.router(x)
        if router_logits is not None:
            router_logits.append(logits)
        weights, ids = ops.topk_softmax(logits, self.spec.top_k, renormalize=self.spec.renormalize)
        if not self.spec.weights_in_float32:
            weights = weights.to(logits.dtype)
        out: Tensor = self.experts(x, weights, ids)
        if self.shared_expert is not None and self.shared_gate is not None:
            out = out + self.shared_gate(x).sigmoid() * self.shared_expert(x)
        return out


class DenseMlp(SwiGLU):
    """The SwiGLU of a layer without experts; takes the same arguments as the sparse block."""

    def __init__(self, spec: DenseSpec, hidden: int) -> None:
        super().__init__(hidden, spec.intermediate, spec.bias)

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        return super().forward(x)


Ffn = DenseMlp | SparseMoeBlock
_MODULE_OF: Mapping[type, Callable[[Any, int], Ffn]] = MappingProxyType(
    {DenseSpec: DenseMlp, MoeSpec: SparseMoeBlock}
)


def build_ffn(spec: FfnSpec, config: ModelConfig) -> Ffn:
    """The feed-forward part that ``spec`` describes."""
    return _MODULE_OF[type(spec)](spec, config.hidden_size)


def build_norm(size: int, config: ModelConfig) -> RMSNorm:
    """The family's ordinary norm."""
    return RMSNorm(size, config.norm_eps, zero_centered=config.family.norm == "zero_centered")
