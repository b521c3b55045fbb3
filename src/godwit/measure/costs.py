"""What a token costs at the least: bytes moved and arithmetic, by the config and the formats of the weights.

A step reads every matrix that one of its tokens needs once, reads the keys and values of each sequence, and
reads and writes each recurrent state. Activations, and the single row of the embedding, are left out. One
multiply-add counts as two operations; operations are told apart by what the kernels multiply.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from godwit.config import AttentionSpec, GatedDeltaNetSpec, LayerSpec, ModelConfig, MoeSpec
from godwit.models.caches import CacheSpec, PagedKVSpec
from godwit.models.causal_lm import CausalLM
from godwit.qtensor import FORMATS, QuantExperts, QuantTensor, weight_bytes

#: What is multiplied, fastest first: bytes, pairs of bfloat16, float32.
ARITHMETICS = ("int8", "bfloat16", "float32")
#: What multiplies weights in a format; others are bfloat16. Only packed bf16 weights are widened first.
ARITHMETIC_OF = {"q4": "int8", "q8": "int8", "bf16": "float32", "float32": "float32"}


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
        """The least time they take; ``peaks`` are operations a second of each arithmetic."""
        return self.int8 / peaks["int8"] + self.bfloat16 / peaks["bfloat16"] + self.float32 / peaks["float32"]


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
    flops_per_token: Flops
    flops_head: Flops
    flops_per_context: Flops

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
        config: what the model is.
        formats: parameter name -> a packed format or the name of a torch dtype.
        caches: what the trunk's layers keep.
        other: format of the parameters that are not in ``formats``.
    """
    weights, experts = 0, [0] * len(config.layers)
    shapes = _shapes(config)
    for name, shape in shapes.items():
        size = stored_bytes(formats.get(name, other), shape)
        top, *rest = name.split(".")
        if ".ffn.experts." in name:
            experts[int(rest[0])] += size
        elif top != "embedding" or config.tie_embeddings:
            weights += size
    head = "embedding.weight" if config.tie_embeddings else "head.weight"
    products = {n: _products(config, n, shape) for n, shape in shapes.items() if n.startswith("layers.")}
    per_token = [_flops(formats.get(name, other), count) for name, count in products.items()]
    return Costs(
        weights,
        tuple(
            ExpertLayer(layer.ffn.num_experts, layer.ffn.top_k, size)
            for layer, size in zip(config.layers, experts, strict=True)
            if isinstance(layer.ffn, MoeSpec)
        ),
        sum(spec.bytes_per_token for spec in caches if isinstance(spec, PagedKVSpec)),
        sum(spec.bytes_per_sequence for spec in caches if not isinstance(spec, PagedKVSpec)),
        sum(per_token, Flops(float32=sum(map(_recurrence, config.layers)))),
        _flops(formats.get(head, other), 2 * config.vocab_size * config.hidden_size),
        _context_flops(config, caches),
    )


def _flops(format: str, count: float) -> Flops:
    """Operations with weights in ``format``."""
    return Flops(**{ARITHMETIC_OF.get(format, "bfloat16"): count})


def _products(config: ModelConfig, name: str, shape: Sequence[int]) -> int:
    """Operations of a token with a parameter of a layer: none with the factors of norms and the like."""
    if len(shape) < 2:
        return 0
    ffn = config.layers[int(name.split(".")[1])].ffn
    experts = ffn.top_k if isinstance(ffn, MoeSpec) and ".ffn.experts." in name else 1
    return 2 * experts * shape[-2] * shape[-1]


def _recurrence(layer: LayerSpec) -> int:
    """Operations of the delta rule: decay 1, read 2, write 2, query 2 for each number of the state."""
    mixer = layer.mixer
    if not isinstance(mixer, GatedDeltaNetSpec):
        return 0
    return 7 * mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim


def _context_flops(config: ModelConfig, caches: Sequence[CacheSpec]) -> Flops:
    """Scores and values: two products for each pair of tokens, in the arithmetic of what the caches hold."""
    paged = [spec.dtype for spec in caches if isinstance(spec, PagedKVSpec)]
    mixers = [layer.mixer for layer in config.layers]
    count = sum(4 * mixer.num_heads * mixer.head_dim for mixer in mixers if isinstance(mixer, AttentionSpec))
    return _flops(str(paged[0]).removeprefix("torch.") if paged else "bfloat16", count)


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
