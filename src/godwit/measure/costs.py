"""What a token costs at the least: bytes moved and arithmetic, by the config and the formats of the weights.

A step reads every matrix that one of its tokens needs once, reads the keys and values of each sequence, and
reads and writes each recurrent state. Activations, and the single row of the embedding, are left out. One
multiply-add counts as two operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from godwit.config import AttentionSpec, GatedDeltaNetSpec, LayerSpec, ModelConfig, MoeSpec
from godwit.models.caches import CacheSpec, PagedKVSpec
from godwit.models.causal_lm import CausalLM
from godwit.qtensor import FORMATS, QuantExperts, QuantTensor, weight_bytes


def distinct_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Experts that ``num_tokens`` tokens use together where each takes its own at random."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer; ``nbytes`` of a single one."""

    num_experts: int
    top_k: int
    nbytes: int


@dataclass(frozen=True)
class Costs:
    """Bytes and operations of a model without its module for multi-token prediction.

    Attributes:
        weights: bytes that every step reads, whatever the batch.
        experts: one entry a sparse layer.
        kv_per_token: bytes of keys and values a token leaves.
        state: bytes of recurrent state and convolution window of a sequence.
        flops_per_token: without head and attention scores.
        flops_head: of one row of logits.
        flops_per_context: of attention, for each pair of a token and one that it sees.
    """

    weights: int
    experts: tuple[ExpertLayer, ...]
    kv_per_token: int
    state: int
    flops_per_token: int
    flops_head: int
    flops_per_context: int

    def step_bytes(self, batch: int, depth: float, distinct: Sequence[float] | None = None) -> float:
        """Bytes of a decoding step of ``batch`` sequences with ``depth`` tokens each in the caches.

        Args:
            batch, depth: sequences, and tokens before this step's.
            distinct: experts that the step uses in each sparse layer; None assumes routing at random.
        """
        if distinct is None:
            distinct = [distinct_experts(e.num_experts, e.top_k, batch) for e in self.experts]
        routed = sum(used * layer.nbytes for used, layer in zip(distinct, self.experts, strict=True))
        return self.weights + routed + batch * (self.kv_per_token * (depth + 1) + 2 * self.state)

    def decode_flops(self, depth: float) -> float:
        """Operations for one token and its logits after ``depth`` others."""
        return self.flops_per_token + self.flops_head + self.flops_per_context * (depth + 1)

    def prefill_flops(self, num_tokens: int) -> int:
        """Operations for a prompt and the logits of its last token."""
        pairs = num_tokens * (num_tokens + 1) // 2
        return self.flops_per_token * num_tokens + self.flops_head + self.flops_per_context * pairs


def costs_of(
    config: ModelConfig, formats: Mapping[str, str], caches: Sequence[CacheSpec], other: str = "float32"
) -> Costs:
    """Costs of a model whose parameters are stored in ``formats``.

    Args:
        config: what the model is.
        formats: parameter name -> a packed format or the name of a torch dtype.
        caches: what the trunk's layers keep.
        other: format of the parameters that are not in ``formats``.
    """
    weights, experts = 0, [0] * len(config.layers)
    for name, shape in _shapes(config).items():
        size = stored_bytes(formats.get(name, other), shape)
        top, *rest = name.split(".")
        if ".ffn.experts." in name:
            experts[int(rest[0])] += size
        elif top != "embedding" or config.tie_embeddings:
            weights += size
    hidden = config.hidden_size
    return Costs(
        weights,
        tuple(
            ExpertLayer(layer.ffn.num_experts, layer.ffn.top_k, size)
            for layer, size in zip(config.layers, experts, strict=True)
            if isinstance(layer.ffn, MoeSpec)
        ),
        sum(spec.bytes_per_token for spec in caches if isinstance(spec, PagedKVSpec)),
        sum(spec.bytes_per_sequence for spec in caches if not isinstance(spec, PagedKVSpec)),
        sum(_mixer_flops(layer, hidden) + _ffn_flops(layer, hidden) for layer in config.layers),
        2 * config.vocab_size * hidden,
        sum(
            4 * layer.mixer.num_heads * layer.mixer.head_dim
            for layer in config.layers
            if isinstance(layer.mixer, AttentionSpec)
        ),
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in CausalLM(config, 0).named_parameters()}


def stored_bytes(format: str, shape: Sequence[int]) -> int:
    """Bytes of one tensor, of one expert where there are several (three dimensions)."""
    if format not in FORMATS:
        dtype: torch.dtype = getattr(torch, format)
        count = 1
        for size in shape[-2:]:
            count *= size
        return count * dtype.itemsize
    rows, cols = shape[-2:]
    return weight_bytes(format, rows, cols)


def _mixer_flops(layer: LayerSpec, hidden: int) -> int:
    mixer = layer.mixer
    if isinstance(mixer, GatedDeltaNetSpec):
        rows = mixer.conv_dim + 2 * mixer.value_dim + 2 * mixer.num_v_heads
        # decay 1, read 2, write 2, query 2 for each number of the state, token by token
        delta = 7 * mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim
        return 2 * hidden * rows + 2 * mixer.conv_kernel * mixer.conv_dim + delta
    query = mixer.num_heads * mixer.head_dim
    rows = query * (3 if mixer.output_gate else 2) + 2 * mixer.num_kv_heads * mixer.head_dim
    return 2 * hidden * rows


def _ffn_flops(layer: LayerSpec, hidden: int) -> int:
    ffn = layer.ffn
    if not isinstance(ffn, MoeSpec):
        return 6 * hidden * ffn.intermediate
    shared = 6 * hidden * ffn.shared_intermediate + 2 * hidden if ffn.shared_intermediate else 0
    return 2 * hidden * ffn.num_experts + 6 * hidden * ffn.top_k * ffn.intermediate + shared


def formats_of(model: CausalLM) -> dict[str, str]:
    """How each parameter of a loaded model is stored, by the names that a plain model has."""
    found = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()}
    for name, weight in packed_weights(model):
        if isinstance(weight, QuantTensor):
            found[name] = weight.format
        else:
            found[f"{name}.w13"], found[f"{name}.w2"] = weight.format13, weight.format2
    return found


def packed_weights(model: CausalLM) -> Iterator[tuple[str, QuantTensor | QuantExperts]]:
    """The packed tensors of a model by the names of the parameters that they stand for."""
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, QuantTensor):
                yield f"{prefix}.{attribute}".removeprefix("."), value
            elif isinstance(value, QuantExperts):
                yield prefix, value


def trunk_caches(model: CausalLM) -> list[CacheSpec]:
    """What the layers of ``model`` keep, the module for multi-token prediction left aside."""
    return model.cache_specs()[: len(model.config.layers)]
