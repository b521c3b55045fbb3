"""How checkpoint tensors map to the model's parameters, per family, in both directions.

A :class:`Placement` maps a checkpoint tensor to a part of a parameter. Loading writes the tensor there,
saving reads it from there; only this module undoes packed and interleaved layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from godwit.checkpoint.spelling import EMBEDDING, HEAD
from godwit.checkpoint.spelling import canonical_name as canonical_name
from godwit.config import AttentionSpec, DenseSpec, GatedDeltaNetSpec, LayerSpec, ModelConfig, MoeSpec

Index = tuple[slice | int | Tensor, ...]


@dataclass(frozen=True)
class Placement:
    """Checkpoint tensor ``source`` of ``shape`` is ``parameter[index]`` (reshaped)."""

    source: str
    shape: tuple[int, ...]
    target: str
    index: Index = ()


@dataclass(frozen=True)
class Alternatives:
    """Parameters with several layouts on disk; the first option whose names are present applies.

    The first option is that of the family's own checkpoints, and is used for saving.
    """

    options: tuple[tuple[Placement, ...], ...]


Entry = Placement | Alternatives


def name_map(config: ModelConfig, num_mtp: int) -> Iterator[Entry]:
    """All tensors of a checkpoint of ``config``, with canonical names (see :func:`canonical_name`)."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Placement(EMBEDDING, (vocab, hidden), "embedding.weight")
    for index, layer in enumerate(config.layers):
        yield from _layer(f"model.layers.{index}.", f"layers.{index}.", layer, config)
    yield Placement("model.norm.weight", (hidden,), "norm.weight")
    if not config.tie_embeddings:
        yield Placement(HEAD, (vocab, hidden), "head.weight")
    if num_mtp:
        yield Placement("mtp.pre_fc_norm_embedding.weight", (hidden,), "mtp.embedding_norm.weight")
        yield Placement("mtp.pre_fc_norm_hidden.weight", (hidden,), "mtp.hidden_norm.weight")
        yield Placement("mtp.fc.weight", (hidden, 2 * hidden), "mtp.fc.weight")
        yield Placement("mtp.norm.weight", (hidden,), "mtp.norm.weight")
        yield from _layer("mtp.layers.0.", "mtp.layers.0.", config.mtp_layer, config)


def _layer(source: str, target: str, layer: LayerSpec, config: ModelConfig) -> Iterator[Entry]:
    hidden = config.hidden_size
    yield Placement(source + "input_layernorm.weight", (hidden,), target + "input_norm.weight")
    yield Placement(source + "post_attention_layernorm.weight", (hidden,), target + "ffn_norm.weight")
    yield from _ENTRIES[type(layer.mixer)](source, target + "mixer.", layer.mixer, config)
    yield from _ENTRIES[type(layer.ffn)](source, target + "ffn.", layer.ffn, config)


def _attention(layer: str, target: str, spec: AttentionSpec, config: ModelConfig) -> Iterator[Placement]:
    source, hidden = layer + "self_attn.", config.hidden_size
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    gates = query if spec.output_gate else 0
    rows: dict[str, Tensor | slice] = {
        "q_proj": _query_and_gate_rows(spec) if spec.output_gate else slice(0, query),
        "k_proj": slice(query + gates, query + gates + kv),
        "v_proj": slice(query + gates + kv, query + gates + 2 * kv),
    }
    sizes = {"q_proj": query + gates, "k_proj": kv, "v_proj": kv}
    for name, index in rows.items():
        yield Placement(f"{source}{name}.weight", (sizes[name], hidden), target + "in_proj.weight", (index,))
        if spec.bias:
            yield Placement(f"{source}{name}.bias", (sizes[name],), target + "in_proj.bias", (index,))
    yield Placement(source + "o_proj.weight", (hidden, query), target + "out_proj.weight")
    if spec.output_bias:
        yield Placement(source + "o_proj.bias", (hidden,), target + "out_proj.bias")
    if spec.qk_norm:
        yield Placement(source + "q_norm.weight", (spec.head_dim,), target + "q_norm.weight")
        yield Placement(source + "k_norm.weight", (spec.head_dim,), target + "k_norm.weight")


@lru_cache(maxsize=4)  # the same for all layers of a model
def _query_and_gate_rows(spec: AttentionSpec) -> Tensor:
    """Target row of each row of a gated q_proj, which holds query then gate head by head."""
    heads = torch.arange(spec.num_heads)[:, None] * spec.head_dim + torch.arange(spec.head_dim)[None, :]
    return torch.cat((heads, heads + spec.num_heads * spec.head_dim), 1).flatten()


def _delta(layer: str, target: str, spec: GatedDeltaNetSpec, config: ModelConfig) -> Iterator[Entry]:
    source, hidden = layer + "linear_attn.", config.hidden_size
    layouts = _delta_interleaved(source, target, spec, hidden), _delta_split(source, target, spec, hidden)
    for options in zip(*layouts, strict=True):
        yield Alternatives(options if config.family.gdn_packing == "interleaved" else options[::-1])
    yield Placement(source + "conv1d.weight", (spec.conv_dim, 1, spec.conv_kernel), target + "conv_weight")
    yield Placement(source + "A_log", (spec.num_v_heads,), target + "A_log")
    yield Placement(source + "dt_bias", (spec.num_v_heads,), target + "dt_bias")
    yield Placement(source + "norm.weight", (spec.head_v_dim,), target + "norm_weight")
    yield Placement(source + "out_proj.weight", (hidden, spec.value_dim), target + "out_proj.weight")


def _delta_interleaved(
    source: str, target: str, spec: GatedDeltaNetSpec, hidden: int
) -> Iterator[tuple[Placement, ...]]:
    """The projections of queries, keys, values and gates, then those of the gates' sizes; by key heads."""
    total = spec.conv_dim + spec.value_dim
    name = "in_proj_qkvz.weight"
    yield (Placement(source + name, (total, hidden), target + name, (_qkvz_rows(spec),)),)
    pairs = torch.arange(spec.num_v_heads).view(spec.num_k_heads, -1)
    both = torch.cat((pairs, pairs + spec.num_v_heads), 1).flatten()
    name = "in_proj_ba.weight"
    yield (Placement(source + name, (2 * spec.num_v_heads, hidden), target + name, (both,)),)


@lru_cache(maxsize=4)
def _qkvz_rows(spec: GatedDeltaNetSpec) -> Tensor:
    """Target row of each checkpoint row: a key head's group holds its q, k, then its value heads' v and z."""
    groups, key, value = spec.num_k_heads, spec.key_dim, spec.value_dim
    q = torch.arange(key).view(groups, -1)
    v = torch.arange(value).view(groups, -1) + 2 * key
    return torch.cat((q, q + key, v, v + value), 1).flatten()


def _delta_split(
    source: str, target: str, spec: GatedDeltaNetSpec, hidden: int
) -> Iterator[tuple[Placement, ...]]:
    conv, value, heads = spec.conv_dim, spec.value_dim, spec.num_v_heads
    qkvz, ba = target + "in_proj_qkvz.weight", target + "in_proj_ba.weight"
    yield (
        Placement(source + "in_proj_qkv.weight", (conv, hidden), qkvz, (slice(0, conv),)),
        Placement(source + "in_proj_z.weight", (value, hidden), qkvz, (slice(conv, conv + value),)),
    )
    yield (
        Placement(source + "in_proj_b.weight", (heads, hidden), ba, (slice(0, heads),)),
        Placement(source + "in_proj_a.weight", (heads, hidden), ba, (slice(heads, 2 * heads),)),
    )


def _dense(layer: str, target: str, spec: DenseSpec, config: ModelConfig) -> Iterator[Placement]:
    return _swiglu(layer + "mlp.", target, spec.intermediate, config.hidden_size, spec.bias)


def _swiglu(source: str, target: str, width: int, hidden: int, bias: bool) -> Iterator[Placement]:
    parts = {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)}
    for name, rows in parts.items():
        yield Placement(f"{source}{name}.weight", (width, hidden), target + "w13.weight", (rows,))
        if bias:
            yield Placement(f"{source}{name}.bias", (width,), target + "w13.bias", (rows,))
    yield Placement(source + "down_proj.weight", (hidden, width), target + "w2.weight")
    if bias:
        yield Placement(source + "down_proj.bias", (hidden,), target + "w2.bias")


def _moe(layer: str, target: str, spec: MoeSpec, config: ModelConfig) -> Iterator[Entry]:
    hidden = config.hidden_size
    mixtral = config.family.expert_names == "mixtral"
    source = layer + ("block_sparse_moe." if mixtral else "mlp.")
    yield Placement(source + "gate.weight", (spec.num_experts, hidden), target + "router.weight")
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    apart = tuple(_experts_apart(source, target, spec, hidden, names))
    fused = tuple(_experts_fused(source, target, spec, hidden))
    yield Alternatives((fused, apart) if config.family.fused_experts else (apart, fused))
    if spec.shared_intermediate:
        shared = source + "shared_expert."
        yield from _swiglu(shared, target + "shared_expert.", spec.shared_intermediate, hidden, False)
        yield Placement(source + "shared_expert_gate.weight", (1, hidden), target + "shared_gate.weight")


def _experts_apart(
    source: str, target: str, spec: MoeSpec, hidden: int, names: tuple[str, str, str]
) -> Iterator[Placement]:
    width = spec.intermediate
    gate, up, down = names
    w13, w2 = target + "experts.w13", target + "experts.w2"
    for expert in range(spec.num_experts):
        prefix = f"{source}experts.{expert}."
        yield Placement(f"{prefix}{gate}.weight", (width, hidden), w13, (expert, slice(0, width)))
        yield Placement(f"{prefix}{up}.weight", (width, hidden), w13, (expert, slice(width, 2 * width)))
        yield Placement(f"{prefix}{down}.weight", (hidden, width), w2, (expert,))


def _experts_fused(source: str, target: str, spec: MoeSpec, hidden: int) -> Iterator[Placement]:
    count, width = spec.num_experts, spec.intermediate
    yield Placement(source + "experts.gate_up_proj", (count, 2 * width, hidden), target + "experts.w13")
    yield Placement(source + "experts.down_proj", (count, hidden, width), target + "experts.w2")


_ENTRIES: Mapping[type, Callable[[str, str, Any, ModelConfig], Iterator[Entry]]] = MappingProxyType(
    {AttentionSpec: _attention, GatedDeltaNetSpec: _delta, DenseSpec: _dense, MoeSpec: _moe}
)
