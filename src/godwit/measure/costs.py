"""The least that a token costs: bytes moved and arithmetic, by the config and the formats of the weights.

A step reads each matrix that its tokens need once, reads the keys and values of each sequence, and reads and
writes each recurrent state. Activations, and the single row of the embedding, are left out. One multiply-add
counts as two operations. Operations are counted separately by the arithmetic that computes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from godwit.config import ModelConfig
from godwit.models.caches import CacheSpec, PagedKVSpec
from godwit.models.causal_lm import CausalLM
from godwit.models.inventory import Parameter, parameters
from godwit.qtensor import FORMATS, QuantExperts, QuantTensor, weight_bytes

#: Fastest first.
ARITHMETICS = ("int8", "bfloat16", "float32")
#: The arithmetic of products with weights in a format; bfloat16 for all others. Packed bf16 weights are
#: widened to float32 first.
ARITHMETIC_OF = {"q4": "int8", "q8": "int8", "bf16": "float32", "float32": "float32"}


def distinct_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Expected number of distinct experts that ``num_tokens`` tokens use if each chooses at random."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer; ``nbytes`` of a single one."""

    num_experts: int
    top_k: int
    nbytes: int


@dataclass(frozen=True)
class Flops:
    """Operations by the arithmetic that computes them."""

    int8: float = 0
    bfloat16: float = 0
    float32: float = 0

    @property
    def total(self) -> float:
        return self.int8 + self.bfloat16 + self.float32

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.int8 + other.int8, self.bfloat16 + other.bfloat16, self.float32 + other.float32)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.int8 * factor, self.bfloat16 * factor, self.float32 * factor)

    def seconds(self, peaks: Mapping[str, float]) -> float:
        """The least time for them; ``peaks`` are operations per second of each arithmetic."""
        return self.int8 / peaks["int8"] + self.bfloat16 / peaks["bfloat16"] + self.float32 / peaks["float32"]


@dataclass(frozen=True)
class Costs:
    """Bytes and operations of a model without its MTP module.

    Attributes:
        weights: bytes that every step reads, regardless of the batch.
        experts: one entry per sparse layer.
        kv_per_token: bytes of keys and values that a token adds to the caches.
        state: bytes of recurrent state and convolution window of a sequence.
        flops_per_token: without head and attention scores.
        flops_head: of one row of logits.
        flops_per_context: of attention, for each pair of a token and one that it attends to.
    """

    weights: int
    experts: tuple[ExpertLayer, ...]
    kv_per_token: int
    state: int
    flops_per_token: Flops
    flops_head: Flops
    flops_per_context: Flops

    def step_bytes(self, batch: int, depth: float, distinct: Sequence[float] | None = None) -> float:
        """Bytes of a decoding step of ``batch`` sequences with ``depth`` tokens each in the caches.

        Args:
            batch, depth: sequences, and tokens before this step's.
            distinct: experts that the step uses in each sparse layer; None assumes random routing.
        """
        if distinct is None:
            distinct = [distinct_experts(e.num_experts, e.top_k, batch) for e in self.experts]
        routed = sum(used * layer.nbytes for used, layer in zip(distinct, self.experts, strict=True))
        return self.weights + routed + batch * (self.kv_per_token * (depth + 1) + 2 * self.state)

    def decode_flops(self, depth: float) -> Flops:
        """Operations for one token and its logits after ``depth`` others."""
        return self.flops_per_token + self.flops_head + self.flops_per_context * (depth + 1)

    def prefill_flops(self, num_tokens: int) -> Flops:
        """Operations for a prompt and the logits of its last token."""
        pairs = num_tokens * (num_tokens + 1) // 2
        return self.flops_per_token * num_tokens + self.flops_head + self.flops_per_context * pairs


def costs_of(
    config: ModelConfig, formats: Mapping[str, str], caches: Sequence[CacheSpec], other: str = "float32"
) -> Costs:
    """Costs of a model whose parameters are stored in ``formats``.

    Args:
        config: the model's config.
        formats: parameter name -> a packed format or the name of a torch dtype.
        caches: of the decoder layers.
        other: format of the parameters that are not in ``formats``.

    Raises:
        CheckpointError: the config describes tensors too large for any machine.
    """
    listed = parameters(config, 0)
    weights, experts = 0, dict[int, int]()
    for p in listed:
        size = stored_bytes(formats.get(p.name, other), p.shape)
        if p.top_k and p.layer is not None:
            experts[p.layer] = experts.get(p.layer, 0) + size
        elif p.part != "embedding" or config.tie_embeddings:
            weights += size
    ffns = [layer.ffn for layer in config.layers]
    head = "embedding.weight" if config.tie_embeddings else "head.weight"
    per_token = [_flops(formats.get(p.name, other), _products(p)) for p in listed if p.layer is not None]
    of_state = sum(layer.mixer.flops_of_state for layer in config.layers)
    return Costs(
        weights,
        tuple(ExpertLayer(ffns[i].num_experts, ffns[i].top_k, size) for i, size in experts.items()),
        sum(spec.bytes_per_token for spec in caches),
        sum(spec.bytes_per_sequence for spec in caches),
        sum(per_token, Flops(float32=of_state)),
        _flops(formats.get(head, other), 2 * config.vocab_size * config.hidden_size),
        _context_flops(config, caches),
    )


def _flops(format: str, count: float) -> Flops:
    """Operations with weights in ``format``."""
    return Flops(**{ARITHMETIC_OF.get(format, "bfloat16"): count})


def _products(parameter: Parameter) -> int:
    """Operations of a token with a parameter of a layer; vectors (norms, biases) count as none."""
    if len(parameter.shape) < 2:
        return 0
    return 2 * max(parameter.top_k, 1) * parameter.shape[-2] * parameter.shape[-1]


def _context_flops(config: ModelConfig, caches: Sequence[CacheSpec]) -> Flops:
    """Attention's operations for a pair of tokens, in the arithmetic of the caches' dtype."""
    paged = [spec.dtype for spec in caches if isinstance(spec, PagedKVSpec)]
    count = sum(layer.mixer.flops_per_pair for layer in config.layers)
    return _flops(str(paged[0]).removeprefix("torch.") if paged else "bfloat16", count)


def stored_bytes(format: str, shape: Sequence[int]) -> int:
    """Bytes of one tensor, or of one expert of a stack (three dimensions)."""
    if format not in FORMATS:
        dtype: torch.dtype = getattr(torch, format)
        count = 1
        for size in shape[-2:]:
            count *= size
        return count * dtype.itemsize
    rows, cols = shape[-2:]
    return weight_bytes(format, rows, cols)


def formats_of(model: CausalLM) -> dict[str, str]:
    """The format of each parameter of a loaded model, by the names in an unpacked model."""
    found = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()}
    for name, weight in packed_weights(model):
        if isinstance(weight, QuantTensor):
            found[name] = weight.format
        else:
            found[f"{name}.w13"], found[f"{name}.w2"] = weight.format13, weight.format2
    return found


def packed_weights(model: CausalLM) -> Iterator[tuple[str, QuantTensor | QuantExperts]]:
    """The packed tensors of a model, by the names of the parameters they replace."""
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, QuantTensor):
                yield f"{prefix}.{attribute}".removeprefix("."), value
            elif isinstance(value, QuantExperts):
                yield prefix, value


def trunk_caches(model: CausalLM) -> list[CacheSpec]:
    """The caches of the layers of ``model``, without those of its MTP module."""
    return model.cache_specs()[: len(model.config.layers)]
