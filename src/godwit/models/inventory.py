"""The list of a model's parameters, computed from the config without creating tensors.

Memory plans, costs, packing and reports use this list; no other module parses parameter names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

from godwit.config import AttentionSpec, DenseSpec, GatedDeltaNetSpec, LayerSpec, ModelConfig, MoeSpec
from godwit.errors import CheckpointError

#: The parts of a model and their names in reports, in report order.
PARTS = MappingProxyType(
    {
        "delta": "delta mixers",
        "attention": "attention mixers",
        "routers": "routers",
        "experts": "experts",
        "shared": "shared experts and gates",
        "dense": "dense feed-forward",
        "norms": "norms between",
        "embedding": "embedding",
        "head": "head",
        "mtp": "multi-token prediction",
    }
)

#: Matrices that the built-in recipes do not quantise: routers choose among hundreds of experts by small
#: differences, and the decay and write strength of a delta layer act on its state for thousands of tokens.
#: Both are small.
EXACT = ("router.weight", "in_proj_ba.weight")

_MAX_BYTES = 2**63 - 1  # of one float32 tensor

Shape = tuple[int, ...]
_Rows = Iterator[tuple[str, str, Shape]]  # part, name within the module, shape


@dataclass(frozen=True)
class Parameter:
    """One parameter of :class:`~godwit.models.causal_lm.CausalLM`.

    Attributes:
        name: as in ``CausalLM.named_parameters()``.
        shape: of the unpacked tensor; of a stack of experts the first dimension counts the experts.
        part: a key of :data:`PARTS`.
        layer: number of its decoder layer; None outside of them and in the MTP module.
        top_k: experts of a stack used per token; 0: not a stack.
    """

    name: str
    shape: Shape
    part: str
    layer: int | None = None
    top_k: int = 0

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def active(self) -> int:
        """Elements read to decode one token, without the MTP module and the embedding's row."""
        if self.part in ("embedding", "mtp"):
            return 0
        return self.count * self.top_k // self.shape[0] if self.top_k else self.count

    @property
    def is_matrix(self) -> bool:
        """Whether it becomes a packed matrix. Stacks of experts are packed too, all else is not."""
        whole = len(self.shape) == 2 and self.name.endswith(".weight")
        return whole and not self.name.endswith(".shared_gate.weight")

    @property
    def packed_name(self) -> str:
        """The name of its tensor in a packed file, in which a stack of experts is one tensor."""
        return self.name.rpartition(".")[0] if self.top_k else self.name


def parameters(config: ModelConfig, num_mtp: int) -> list[Parameter]:
    """All parameters of ``CausalLM(config, num_mtp)``, in the order of its ``named_parameters()``.

    Raises:
        CheckpointError: a tensor is too large to address.
        UnsupportedModelError: an MTP module without an attention layer to copy its shape from.
    """
    found = list(_model(config, num_mtp))
    if any(4 * parameter.count > _MAX_BYTES for parameter in found):
        raise CheckpointError("the config describes tensors too large for any machine; fetch it again")
    return found


def count_mtp(names: Iterable[str]) -> int:
    """MTP layers (0 or 1) of a model whose parameters have these names."""
    return int(any(name.startswith("mtp.") for name in names))


def _model(config: ModelConfig, num_mtp: int) -> Iterator[Parameter]:
    table = (config.vocab_size, config.hidden_size)
    yield Parameter("embedding.weight", table, "embedding")
    for index, layer in enumerate(config.layers):
        for parameter in _layer(f"layers.{index}.", layer, config.hidden_size):
            yield replace(parameter, layer=index)
    yield Parameter("norm.weight", table[1:], "norms")
    if num_mtp:
        yield from (replace(parameter, part="mtp") for parameter in _mtp(config))
    if not config.tie_embeddings:
        yield Parameter("head.weight", table, "head")


def _mtp(config: ModelConfig) -> Iterator[Parameter]:
    hidden = config.hidden_size
    yield Parameter("mtp.embedding_norm.weight", (hidden,), "norms")
    yield Parameter("mtp.hidden_norm.weight", (hidden,), "norms")
    yield Parameter("mtp.fc.weight", (hidden, 2 * hidden), "mtp")
    yield from _layer("mtp.layers.0.", config.mtp_layer, hidden)
    yield Parameter("mtp.norm.weight", (hidden,), "norms")


def _layer(prefix: str, layer: LayerSpec, hidden: int) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}input_norm.weight", (hidden,), "norms")
    for part, name, shape in _ROWS[type(layer.mixer)](layer.mixer, hidden):
        yield Parameter(f"{prefix}mixer.{name}", shape, part)
    yield Parameter(f"{prefix}ffn_norm.weight", (hidden,), "norms")
    for part, name, shape in _ROWS[type(layer.ffn)](layer.ffn, hidden):
        top_k = layer.ffn.top_k if part == "experts" else 0
        yield Parameter(f"{prefix}ffn.{name}", shape, part, top_k=top_k)


def _attention(spec: AttentionSpec, hidden: int) -> _Rows:
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    rows = (2 if spec.output_gate else 1) * query + 2 * kv
    yield from _linear(spec.part, "in_proj", rows, hidden, spec.bias)
    yield from _linear(spec.part, "out_proj", hidden, query, spec.output_bias)
    if spec.qk_norm:
        yield spec.part, "q_norm.weight", (spec.head_dim,)
        yield spec.part, "k_norm.weight", (spec.head_dim,)


def _delta(spec: GatedDeltaNetSpec, hidden: int) -> _Rows:
    yield spec.part, "conv_weight", (spec.conv_dim, spec.conv_kernel)
    yield spec.part, "A_log", (spec.num_v_heads,)
    yield spec.part, "dt_bias", (spec.num_v_heads,)
    yield spec.part, "norm_weight", (spec.head_v_dim,)
    yield from _linear(spec.part, "in_proj_qkvz", spec.conv_dim + spec.value_dim, hidden)
    yield from _linear(spec.part, "in_proj_ba", 2 * spec.num_v_heads, hidden)
    yield from _linear(spec.part, "out_proj", hidden, spec.value_dim)


def _dense(spec: DenseSpec, hidden: int) -> _Rows:
    yield from _linear("dense", "w13", 2 * spec.intermediate, hidden, spec.bias)
    yield from _linear("dense", "w2", hidden, spec.intermediate, spec.bias)


def _moe(spec: MoeSpec, hidden: int) -> _Rows:
    yield from _linear("routers", "router", spec.num_experts, hidden)
    yield "experts", "experts.w13", (spec.num_experts, 2 * spec.intermediate, hidden)
    yield "experts", "experts.w2", (spec.num_experts, hidden, spec.intermediate)
    if spec.shared_intermediate:
        yield from _linear("shared", "shared_expert.w13", 2 * spec.shared_intermediate, hidden)
        yield from _linear("shared", "shared_expert.w2", hidden, spec.shared_intermediate)
        yield from _linear("shared", "shared_gate", 1, hidden)


def _linear(part: str, name: str, rows: int, cols: int, bias: bool = False) -> _Rows:
    yield part, f"{name}.weight", (rows, cols)
    if bias:
        yield part, f"{name}.bias", (rows,)


_ROWS: Mapping[type, Callable[[Any, int], _Rows]] = MappingProxyType(
    {AttentionSpec: _attention, GatedDeltaNetSpec: _delta, DenseSpec: _dense, MoeSpec: _moe}
)
