"""ModelConfig: what a model is, read from the ``config.json`` of every supported family.

Families differ here and nowhere else: the modules of ``godwit.models`` are built from these frozen records
and never ask which family they serve. Field meanings follow the ``transformers`` configuration classes of the
model types in :data:`FAMILIES`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from godwit.errors import CheckpointError, UnsupportedModelError

MAX_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Family:
    """The facts of a family that its ``config.json`` does not state."""

    title: str
    norm: Literal["zero_centered", "plain"]
    qk_norm: bool = False
    output_gate: bool = False
    hybrid: bool = False
    router: Literal["none", "qwen", "mixtral"] = "none"
    renormalize: bool | None = None  # None: the file's norm_topk_prob decides
    shared_expert: bool = False
    gdn_packing: Literal["interleaved", "split"] = "interleaved"
    expert_names: Literal["qwen", "mixtral"] = "qwen"


_QWEN35 = Family("Qwen3.5 / 3.6", "zero_centered", True, True, True, gdn_packing="split")
_QWEN35_MOE = Family(
    "Qwen3.5 / 3.6 MoE", "zero_centered", True, True, True, "qwen", True, True, gdn_packing="split"
)

#: ``model_type`` -> family. Wrapper types (``qwen3_5`` with a ``text_config``) map like their text model.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen3_next": Family(
            "Qwen3-Next", "zero_centered", True, True, True, "qwen", None, shared_expert=True
        ),
        "qwen3": Family("Qwen3", "plain", qk_norm=True),
        "qwen3_moe": Family("Qwen3-MoE", "plain", qk_norm=True, router="qwen"),
        "mixtral": Family("Mixtral", "plain", router="mixtral", renormalize=True, expert_names="mixtral"),
        "llama": Family("Llama 3", "plain"),
        "qwen3_5": _QWEN35,
        "qwen3_5_text": _QWEN35,
        "qwen3_5_moe": _QWEN35_MOE,
        "qwen3_5_moe_text": _QWEN35_MOE,
    }
)


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding: ``dim`` rotated dimensions of each head, half-split pairing."""

    dim: int
    theta: float
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class AttentionSpec:
    """Softmax attention with grouped key/value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    output_gate: bool
    rotary: RotarySpec
    bias: bool = False
    output_bias: bool = False


@dataclass(frozen=True)
class GatedDeltaNetSpec:
    """Gated DeltaNet: value head ``h`` reads key head ``h // (num_v_heads / num_k_heads)``."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel: int

    @property
    def key_dim(self) -> int:
        return self.num_k_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        return self.num_v_heads * self.head_v_dim

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_dim + self.value_dim


@dataclass(frozen=True)
class DenseSpec:
    """SwiGLU feed-forward of width ``intermediate``."""

    intermediate: int
    bias: bool = False


@dataclass(frozen=True)
class MoeSpec:
    """Sparse mixture of SwiGLU experts; ``shared_intermediate`` 0 means no shared expert."""

    num_experts: int
    top_k: int
    intermediate: int
    shared_intermediate: int
    renormalize: bool
    weights_in_float32: bool = False


MixerSpec = AttentionSpec | GatedDeltaNetSpec
FfnSpec = DenseSpec | MoeSpec


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: a token mixer and a feed-forward part."""

    mixer: MixerSpec
    ffn: FfnSpec


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. ``num_mtp_layers`` None means: count them in the checkpoint's tensor names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    tie_embeddings: bool
    max_position: int
    num_mtp_layers: int | None
    router_aux_coef: float
    initializer_range: float
    raw: Mapping[str, Any]

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def mtp_layer(self) -> LayerSpec:
        """The decoder layer inside the multi-token-prediction module: always full attention."""
        for layer in reversed(self.layers):
            if isinstance(layer.mixer, AttentionSpec):
                return layer
        raise UnsupportedModelError("a model with MTP needs a full-attention layer to copy its shape")

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
        """Build from a parsed ``config.json``.

        Raises:
            UnsupportedModelError: the model type or a feature of it is not supported.
            CheckpointError: a field is missing or makes no sense.
        """
        return _Reader(raw).model()

    @staticmethod
    def from_file(path: str | Path) -> ModelConfig:
        """Read ``config.json`` (the file, or a directory that holds it)."""
        return ModelConfig.from_dict(read_config_json(path))


def read_config_json(path: str | Path) -> dict[str, Any]:
    """Parse a ``config.json`` with a size limit.

    Raises:
        CheckpointError: no such file, too large, or not a JSON object.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a model directory or its config.json")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file}: larger than {MAX_CONFIG_BYTES >> 20} MiB, so not a model config")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: a model config must be a JSON object, found {type(raw).__name__}")
    return raw


class _Reader:
    """Reads one raw config; keeps the text part and the model type at hand."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        text = raw.get("text_config")
        self.text: Mapping[str, Any] = text if isinstance(text, Mapping) else raw
        kind = self.text.get("model_type") or raw.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            found = "a config without model_type" if kind is None else f"model type {kind!r:.60}"
            raise UnsupportedModelError(f"{found} is not supported; Godwit runs: {known}")
        self.model_type = kind
        self.family = FAMILIES[self.model_type]

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.text.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            wanted = f"a whole number from {low} to {high}"
            raise CheckpointError(f"config field {name} must be {wanted}, found {value!r:.60}")
        return value

    def number(
        self, source: Mapping[str, Any], name: str, default: float | None = None, low: float = 0.0
    ) -> float:
        value = source.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1e12:
            wanted = f"a number from {low:g} to 1e12"
            raise CheckpointError(f"config field {name} must be {wanted}, found {value!r:.60}")
        return float(value)

    def flag(self, name: str, default: bool, source: Mapping[str, Any] | None = None) -> bool:
        value = (self.text if source is None else source).get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"config field {name} must be true or false, found {value!r:.60}")
        return value

    def model(self) -> ModelConfig:
        self._refuse_unsupported()
        num_layers = self.integer("num_hidden_layers", high=4096)
        kinds = self._layer_types(num_layers)
        attention = self._attention()
        delta = self._delta() if "linear_attention" in kinds else None
        layers = []
        for index, kind in enumerate(kinds):
            mixer = delta if kind == "linear_attention" and delta is not None else attention
            layers.append(LayerSpec(mixer, self._ffn(index)))
        wrapped = self.text is not self.raw and self.raw.get("tie_word_embeddings") is None
        tie = self.flag("tie_word_embeddings", False, self.text if wrapped else self.raw)
        return ModelConfig(
            model_type=self.model_type,
            vocab_size=self.integer("vocab_size"),
            hidden_size=self.integer("hidden_size"),
            layers=tuple(layers),
            norm_eps=self.number(self.text, "rms_norm_eps", 1e-6),
            tie_embeddings=tie,
            max_position=self.integer("max_position_embeddings", 32768),
            num_mtp_layers=self._num_mtp_layers(),
            router_aux_coef=self.number(self.text, "router_aux_loss_coef", 0.001),
            initializer_range=self.number(self.text, "initializer_range", 0.02),
            raw=dict(self.raw),
        )

    def _num_mtp_layers(self) -> int | None:
        name = "mtp_num_hidden_layers" if "mtp_num_hidden_layers" in self.text else "num_nextn_predict_layers"
        count = None if self.text.get(name) is None else self.integer(name, low=0)
        if count is not None and count > 1:
            raise UnsupportedModelError(f"{name} is {count}; Godwit runs models with 0 or 1 MTP layers")
        return count

    def _refuse_unsupported(self) -> None:
        act = self.text.get("hidden_act", "silu")
        if act != "silu":
            raise UnsupportedModelError(f"hidden_act {act!r:.60} is not supported, only silu is")
        windowed = self.model_type == "mixtral" or self.text.get("use_sliding_window")
        if windowed and self.text.get("sliding_window"):
            raise UnsupportedModelError("attention with a sliding_window is not supported")

    def _layer_types(self, num_layers: int) -> list[str]:
        if not self.family.hybrid:
            return ["full_attention"] * num_layers
        kinds = self.text.get("layer_types")
        if kinds is None:
            interval = self.integer("full_attention_interval", 4)
            return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)]
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise CheckpointError(f"config field layer_types must list {num_layers} layers")
        for kind in kinds:
            if kind not in ("full_attention", "linear_attention"):
                raise UnsupportedModelError(f"layer type {kind!r} is not supported")
        return kinds

    def _attention(self) -> AttentionSpec:
        heads = self.integer("num_attention_heads", high=65536)
        kv_heads = self.integer("num_key_value_heads", heads, high=65536)
        head_dim = self.integer("head_dim", max(1, self.integer("hidden_size") // heads), high=65536)
        if heads % kv_heads:
            raise CheckpointError(f"{kv_heads} num_key_value_heads do not divide {heads} num_attention_heads")
        bias = self.flag("attention_bias", False)
        if (gate := self.family.output_gate) and not self.text.get("attn_output_gate", True):
            raise UnsupportedModelError("attn_output_gate false is not supported for this model type")
        norm, rotary = self.family.qk_norm, self._rotary(head_dim)
        return AttentionSpec(heads, kv_heads, head_dim, norm, gate, rotary, bias, bias)

    def _delta(self) -> GatedDeltaNetSpec:
        spec = GatedDeltaNetSpec(
            num_k_heads=self.integer("linear_num_key_heads", 16, high=65536),
            num_v_heads=self.integer("linear_num_value_heads", 32, high=65536),
            head_k_dim=self.integer("linear_key_head_dim", 128, high=65536),
            head_v_dim=self.integer("linear_value_head_dim", 128, high=65536),
            conv_kernel=self.integer("linear_conv_kernel_dim", 4, high=1024),
        )
        if spec.num_v_heads % spec.num_k_heads:
            heads = f"{spec.num_k_heads} linear_num_key_heads", f"{spec.num_v_heads} linear_num_value_heads"
            raise CheckpointError(" do not divide ".join(heads))
        return spec

    def _ffn(self, index: int) -> FfnSpec:
        family = self.family
        experts = self._num_experts(index)
        if not experts:
            return DenseSpec(self.integer("intermediate_size"), self.flag("mlp_bias", False))
        top_k = self.integer("num_experts_per_tok", high=experts)
        width = "intermediate_size" if family.router == "mixtral" else "moe_intermediate_size"
        shared = self.integer("shared_expert_intermediate_size", low=0) if family.shared_expert else 0
        renormalize = family.renormalize
        if renormalize is None:
            renormalize = self.flag("norm_topk_prob", self.model_type == "qwen3_next")
        return MoeSpec(experts, top_k, self.integer(width), shared, renormalize, family.router == "mixtral")

    def _num_experts(self, index: int) -> int:
        """Experts of a layer; 0 where it is dense."""
        dense_layers = self.text.get("mlp_only_layers") or []
        if not isinstance(dense_layers, list):
            raise CheckpointError("config field mlp_only_layers must list layer numbers")
        step = self.integer("decoder_sparse_step", 1) if self.family.router == "qwen" else 1
        if self.family.router == "none" or index in dense_layers or (index + 1) % step:
            return 0
        # Mixtral's name, under which transformers 5 also saves Qwen3-MoE's number
        local = self.text.get("num_local_experts") is not None
        return self.integer("num_local_experts" if local else "num_experts", 0, low=0, high=2**20)

    def _rotary(self, head_dim: int) -> RotarySpec:
        params = self.text.get("rope_parameters") or {}
        scaling = self.text.get("rope_scaling") or {}
        if not isinstance(params, Mapping) or not isinstance(scaling, Mapping):
            raise CheckpointError("config fields rope_parameters and rope_scaling must be objects or null")
        names = ("rope_theta", "partial_rotary_factor")
        top = {name: self.text[name] for name in names if self.text.get(name) is not None}
        merged: dict[str, Any] = {**top, **scaling, **params}
        default_partial = 0.25 if self.family.hybrid else 1.0
        dim = int(head_dim * self.number(merged, "partial_rotary_factor", default_partial))
        if not 0 < dim <= head_dim or dim % 2:
            raise CheckpointError(f"partial_rotary_factor cannot rotate {dim} dimensions of {head_dim}")
        theta = self.number(merged, "rope_theta", 10000.0, low=1.001)
        kind = merged.get("rope_type", merged.get("type", "default"))
        if kind in (None, "default", "mrope"):  # text positions are equal on all M-RoPE axes: ordinary rotary
            return RotarySpec(dim, theta)
        if kind not in ("linear", "yarn", "llama3"):
            raise UnsupportedModelError(f"rope type {kind!r:.60} is not default, linear, yarn or llama3")
        return self._scaled_rotary(dim, theta, kind, merged)

    def _scaled_rotary(
        self, dim: int, theta: float, kind: Literal["linear", "yarn", "llama3"], merged: Mapping[str, Any]
    ) -> RotarySpec:
        factor = self.number(merged, "factor", low=1.0)
        length = self.integer("max_position_embeddings", 32768)
        original = self.number(merged, "original_max_position_embeddings", length, low=1.0)
        if kind == "yarn" and any(merged.get(name) for name in ("mscale", "mscale_all_dim")):
            raise UnsupportedModelError("YaRN with mscale is not used by any supported family")
        low_frequency = self.number(merged, "low_freq_factor", 1.0)
        default_attention = 0.1 * math.log(factor) + 1.0 if kind == "yarn" and factor > 1 else 1.0
        return RotarySpec(
            dim,
            theta,
            kind,
            factor,
            int(original),
            beta_fast=self.number(merged, "beta_fast", 32.0, low=0.001),
            beta_slow=self.number(merged, "beta_slow", 1.0, low=0.001),
            attention_factor=self.number(merged, "attention_factor", default_attention),
            truncate=bool(merged.get("truncate", True)),
            low_freq_factor=low_frequency,
            high_freq_factor=self.number(merged, "high_freq_factor", 4.0, low=low_frequency + 0.001),
        )
