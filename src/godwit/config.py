"""ModelConfig: a model's architecture, read from the ``config.json`` of every supported family.

Families differ only here: the modules of ``godwit.models`` are built from these frozen records and do not
know the family. Field meanings follow the ``transformers`` configuration classes of the
model types in :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NoReturn

from godwit.config_fields import Fields, read_config_json
from godwit.config_rotary import RotarySpec, read_rotary
from godwit.errors import CheckpointError, UnsupportedModelError

__all__ = [
    "FAMILIES", "AttentionSpec", "DenseSpec", "Family", "FfnSpec", "GatedDeltaNetSpec", "LayerSpec",
    "MixerSpec", "ModelConfig", "MoeSpec", "RotarySpec", "read_config_json",
]  # fmt: skip

#: Far beyond the largest models; a limit, since each layer and expert takes memory before any weight is read.
MAX_LAYERS = 1024
MAX_EXPERTS = 2**18  # of all layers
MAX_WIDTH = 2**20  # of all heads of a layer


@dataclass(frozen=True)
class Family:
    """What ``config.json`` does not state about a family."""

    title: str
    norm: Literal["zero_centered", "plain"]
    qk_norm: bool = False
    output_gate: bool = False
    hybrid: bool = False
    router: Literal["none", "qwen", "mixtral"] = "none"
    renormalize: bool | None = None  # None: the file's norm_topk_prob decides
    mixed: bool = False  # the file may make some layers dense
    shared_expert: bool = False
    gdn_packing: Literal["interleaved", "split"] = "interleaved"
    expert_names: Literal["qwen", "mixtral"] = "qwen"
    fused_experts: bool = False  # checkpoints hold the experts of a layer in one tensor


_QWEN35 = Family("Qwen3.5 / 3.6", "zero_centered", True, True, True, gdn_packing="split")
_QWEN35_MOE = Family(
    "Qwen3.5 / 3.6 MoE",
    "zero_centered",
    True,
    True,
    True,
    "qwen",
    True,
    shared_expert=True,
    gdn_packing="split",
    fused_experts=True,
)

#: ``model_type`` -> family. Wrapper types (``qwen3_5`` with a ``text_config``) map like their text model.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen3_next": Family(
            "Qwen3-Next", "zero_centered", True, True, True, "qwen", mixed=True, shared_expert=True
        ),
        "qwen3": Family("Qwen3", "plain", qk_norm=True),
        "qwen3_moe": Family("Qwen3-MoE", "plain", qk_norm=True, router="qwen", mixed=True),
        "mixtral": Family("Mixtral", "plain", router="mixtral", renormalize=True, expert_names="mixtral"),
        "llama": Family("Llama 3", "plain"),
        "qwen3_5": _QWEN35,
        "qwen3_5_text": _QWEN35,
        "qwen3_5_moe": _QWEN35_MOE,
        "qwen3_5_moe_text": _QWEN35_MOE,
    }
)


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
    part: ClassVar[str] = "attention"
    flops_of_state: ClassVar[int] = 0

    @property
    def flops_per_pair(self) -> int:
        """Operations for each pair of a token and one that it attends to: its score, and its value added."""
        return 4 * self.num_heads * self.head_dim

    def heads(self) -> dict[str, int]:
        """Numbers and widths of heads, for reports."""
        return {"heads": self.num_heads, "kv_heads": self.num_kv_heads, "head_dim": self.head_dim}


@dataclass(frozen=True)
class GatedDeltaNetSpec:
    """Gated DeltaNet: value head ``h`` reads key head ``h // (num_v_heads / num_k_heads)``."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel: int
    part: ClassVar[str] = "delta"
    flops_per_pair: ClassVar[int] = 0

    @property
    def flops_of_state(self) -> int:
        """Operations of a token with the state: decay 1, read 2, write 2, query 2 for each number."""
        return 7 * self.num_v_heads * self.head_k_dim * self.head_v_dim

    def heads(self) -> dict[str, int]:
        """Numbers and widths of heads, for reports."""
        keys = {"key_heads": self.num_k_heads, "value_heads": self.num_v_heads}
        return {**keys, "key_dim": self.head_k_dim, "value_dim": self.head_v_dim}

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
    num_experts: ClassVar[int] = 0
    top_k: ClassVar[int] = 0
    shared_intermediate: ClassVar[int] = 0


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

    def untied(self) -> ModelConfig:
        """The same model with a separate output head, also in ``raw``."""
        raw = {**self.raw, "tie_word_embeddings": False}
        if isinstance(text := raw.get("text_config"), Mapping):
            raw["text_config"] = {**text, "tie_word_embeddings": False}
        return replace(self, tie_embeddings=False, raw=raw)

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
        """Build from a parsed ``config.json``.

        Raises:
            UnsupportedModelError: the model type or a feature of it is not supported.
            CheckpointError: a field is missing or makes no sense.
        """
        return _ConfigReader(raw).model()

    @staticmethod
    def from_file(path: str | Path) -> ModelConfig:
        """Read ``config.json`` (the file, or a directory that holds it)."""
        return ModelConfig.from_dict(read_config_json(path))


class _ConfigReader:
    """Reads one raw config."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        text = raw.get("text_config")
        self.text: Mapping[str, Any] = text if isinstance(text, Mapping) else raw
        inner, outer = self.text.get("model_type"), raw.get("model_type")
        # The type of a supported wrapper takes precedence over that of its text part.
        kind = outer if isinstance(outer, str) and outer in FAMILIES else inner or outer
        if not isinstance(kind, str) or kind not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            found = "a config without model_type" if kind is None else f"model type {kind!r:.60}"
            raise UnsupportedModelError(f"{found} is not supported; Godwit runs: {known}")
        self.model_type = kind
        self.family = FAMILIES[self.model_type]
        self.fields = Fields(self.text, kind)

    def model(self) -> ModelConfig:
        self._refuse_unsupported()
        fields = self.fields
        num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
        kinds = self._layer_types(num_layers)
        attention = self._attention()
        delta = self._delta() if "linear_attention" in kinds else None
        layers = []
        for index, kind in enumerate(kinds):
            mixer = delta if kind == "linear_attention" and delta is not None else attention
            layers.append(LayerSpec(mixer, self._ffn(index)))
        num_experts = sum(layer.ffn.num_experts for layer in layers if isinstance(layer.ffn, MoeSpec))
        if num_experts > MAX_EXPERTS:
            raise CheckpointError(f"the config has {num_experts} experts in total, more than {MAX_EXPERTS}")
        return ModelConfig(
            model_type=self.model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            layers=tuple(layers),
            norm_eps=fields.number("rms_norm_eps"),
            tie_embeddings=self._tied(),
            max_position=attention.rotary.context(fields.integer("max_position_embeddings")),
            num_mtp_layers=self._num_mtp_layers(),
            router_aux_coef=fields.number("router_aux_loss_coef"),
            initializer_range=fields.number("initializer_range"),
            raw=dict(self.raw),
        )

    def _tied(self) -> bool:
        """Whether the embedding is the output head too; a wrapper may say so at either level."""
        tied = self.fields.flag("tie_word_embeddings")
        if self.text is self.raw or "tie_word_embeddings" not in self.raw:
            return tied
        return Fields(self.raw, self.model_type).flag("tie_word_embeddings") or tied

    def _num_mtp_layers(self) -> int | None:
        name = "mtp_num_hidden_layers" if "mtp_num_hidden_layers" in self.text else "num_nextn_predict_layers"
        count = None if self.text.get(name) is None else self.fields.integer(name, low=0)
        if count is not None and count > 1:
            raise UnsupportedModelError(f"{name} is {count}; Godwit runs models with 0 or 1 MTP layers")
        return count

    def _refuse_unsupported(self) -> None:
        act = self.fields.get("hidden_act")
        if act != "silu":
            raise UnsupportedModelError(f"hidden_act {act!r:.60} is not supported, only silu is")
        if self._windowed():
            raise UnsupportedModelError("attention with a sliding_window is not supported")

    def _windowed(self) -> bool:
        """Whether some layer uses sliding-window attention."""
        if self.model_type == "llama":
            return False
        if self.model_type != "mixtral" and not self.text.get("use_sliding_window"):
            return False
        if not self.fields.get("sliding_window"):
            return False
        if self.model_type != "qwen3":
            return True
        kinds = self.text.get("layer_types")
        if isinstance(kinds, list):
            return "sliding_attention" in kinds
        return self.fields.integer("max_window_layers", low=0) < self.fields.integer("num_hidden_layers")

    def _layer_types(self, num_layers: int) -> list[str]:
        kinds = self.text.get("layer_types")
        if kinds is None:
            interval = self.fields.integer("full_attention_interval") if self.family.hybrid else 1
            return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)]
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise CheckpointError(f"config field layer_types must list {num_layers} layers")
        for kind in kinds:
            if kind != "full_attention" and not (kind == "linear_attention" and self.family.hybrid):
                raise UnsupportedModelError(f"layer type {kind!r:.60} is not supported for this model type")
        return kinds

    def _attention(self) -> AttentionSpec:
        fields = self.fields
        heads = fields.integer("num_attention_heads", high=65536)
        hidden = fields.integer("hidden_size")
        kv_null = heads if self.model_type in ("llama", "mixtral", "qwen3") else None
        kv_heads = fields.integer("num_key_value_heads", high=65536, null=kv_null)
        dim_null = max(1, hidden // heads) if self.model_type in ("llama", "mixtral", "qwen3_moe") else None
        head_dim = fields.integer("head_dim", high=65536, null=dim_null)
        if heads * head_dim > MAX_WIDTH:
            raise CheckpointError(
                f"{heads} attention heads of {head_dim} are wider than {MAX_WIDTH} in total"
            )
        if heads % kv_heads:
            self._not_divisible("num_key_value_heads", kv_heads, "num_attention_heads", heads)
        if self.model_type == "llama" and hidden % heads:
            self._not_divisible("num_attention_heads", heads, "hidden_size", hidden)
        bias = self.model_type != "mixtral" and fields.flag("attention_bias")
        if (gate := self.family.output_gate) and not self.text.get("attn_output_gate", True):
            raise UnsupportedModelError("attn_output_gate false is not supported for this model type")
        rotary = read_rotary(fields, head_dim, partial=self.family.hybrid)
        return AttentionSpec(heads, kv_heads, head_dim, self.family.qk_norm, gate, rotary, bias, bias)

    def _delta(self) -> GatedDeltaNetSpec:
        spec = GatedDeltaNetSpec(
            num_k_heads=self.fields.integer("linear_num_key_heads", high=65536),
            num_v_heads=self.fields.integer("linear_num_value_heads", high=65536),
            head_k_dim=self.fields.integer("linear_key_head_dim", high=65536),
            head_v_dim=self.fields.integer("linear_value_head_dim", high=65536),
            conv_kernel=self.fields.integer("linear_conv_kernel_dim", high=1024),
        )
        if spec.conv_dim > MAX_WIDTH:
            raise CheckpointError(
                f"the linear attention heads are {spec.conv_dim} wide, more than {MAX_WIDTH}"
            )
        if spec.num_v_heads % spec.num_k_heads:
            names = "linear_num_key_heads", "linear_num_value_heads"
            self._not_divisible(names[0], spec.num_k_heads, names[1], spec.num_v_heads)
        return spec

    def _not_divisible(self, divisor: str, by: int, name: str, value: int) -> NoReturn:
        parts = self.fields.stated(divisor, by), self.fields.stated(name, value)
        raise CheckpointError(" do not divide ".join(parts))

    def _ffn(self, index: int) -> FfnSpec:
        family, fields = self.family, self.fields
        experts = self._num_experts(index)
        if not experts:
            bias = self.model_type == "llama" and fields.flag("mlp_bias")
            return DenseSpec(fields.integer("intermediate_size"), bias)
        top_k = fields.integer("num_experts_per_tok", high=experts)
        width = "intermediate_size" if family.router == "mixtral" else "moe_intermediate_size"
        shared = fields.integer("shared_expert_intermediate_size", low=0) if family.shared_expert else 0
        renormalize = fields.flag("norm_topk_prob") if family.renormalize is None else family.renormalize
        return MoeSpec(experts, top_k, fields.integer(width), shared, renormalize, family.router == "mixtral")

    def _num_experts(self, index: int) -> int:
        """Number of experts of a layer; 0 if it is dense."""
        if self.family.router == "none" or self._is_dense(index):
            return 0
        # transformers saves Qwen3-MoE's number under Mixtral's name too, and reads that one first
        names = {"mixtral": ("num_experts", "num_local_experts")}
        names["qwen3_moe"] = ("num_local_experts", "num_experts")
        given = (name for name in names.get(self.model_type, ()) if name in self.text)
        return self.fields.integer(next(given, "num_experts"), low=0, high=2**20)

    def _is_dense(self, index: int) -> bool:
        if not self.family.mixed:
            return False
        dense_layers = self.text.get("mlp_only_layers") or []
        if not isinstance(dense_layers, list):
            raise CheckpointError("config field mlp_only_layers must list layer numbers")
        return index in dense_layers or (index + 1) % self.fields.integer("decoder_sparse_step") != 0
