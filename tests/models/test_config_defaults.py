"""A field that a config leaves out means what the configuration class of ``transformers`` makes of it.

Which fields are read is recorded while a full config is read, so a new field is tested without a change here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from godwit.config import AttentionSpec, DenseSpec, GatedDeltaNetSpec, ModelConfig, MoeSpec
from godwit.config_fields import DEFAULTS
from godwit.errors import CheckpointError, GodwitError
from tests.models.families import VOCAB

transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "initializer_range": 0.01,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "rope_theta": 12345.0,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
}
_SPARSE = {"num_experts_per_tok": 3, "moe_intermediate_size": 20, "router_aux_loss_coef": 0.5}
_MIXED = {"mlp_only_layers": [1], "decoder_sparse_step": 2, "norm_topk_prob": True}
_SHARED = {"shared_expert_intermediate_size": 28}

#: Every field that a config of the type can state, with values other than the defaults.
FULL: Mapping[str, Mapping[str, Any]] = {
    "qwen3_next": {
        **_COMMON, **_DELTA, **_SPARSE, **_MIXED, **_SHARED, "num_experts": 12, "norm_topk_prob": False
    },
    "qwen3": {**_COMMON, "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2},
    "qwen3_moe": {**_COMMON, **_SPARSE, **_MIXED, "num_experts": 12, "use_sliding_window": False},
    "mixtral": {
        **_COMMON, "num_local_experts": 5, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.5,
        "sliding_window": None,
    },
    "llama": {**_COMMON, "mlp_bias": True},
    "qwen3_5_text": {**_COMMON, **_DELTA},
    "qwen3_5_moe_text": {**_COMMON, **_DELTA, **_SPARSE, **_SHARED, "num_experts": 12},
}  # fmt: skip
#: Wrappers read the same fields in their text part.
WRAPPERS = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}


class Recorded(dict[str, Any]):
    """A config that remembers which of its fields were asked for."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def fields_read(model_type: str) -> list[str]:
    """Fields of the full config of a model type that reading it looks at."""
    raw = Recorded({"model_type": model_type, **FULL[model_type]})
    ModelConfig.from_dict(raw)
    return sorted(raw.asked & FULL[model_type].keys())


def cases() -> Iterator[Any]:
    for model_type in FULL:
        for name in fields_read(model_type):
            yield pytest.param(model_type, (name,), id=f"{model_type}-{name}")
        yield pytest.param(model_type, tuple(FULL[model_type]), id=f"{model_type}-everything")


def library_says(theirs: Any, config: ModelConfig) -> None:
    """Compare a config with the attributes of the library's object for the same file."""
    assert config.vocab_size == theirs.vocab_size
    assert config.hidden_size == theirs.hidden_size
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.max_position == theirs.max_position_embeddings
    assert config.initializer_range == theirs.initializer_range
    assert len(config.layers) == theirs.num_hidden_layers
    coefficient = getattr(theirs, "router_aux_loss_coef", None)
    assert coefficient in (None, config.router_aux_coef)
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * len(config.layers)
    for index, (layer, kind) in enumerate(zip(config.layers, kinds, strict=True)):
        if kind == "linear_attention":
            assert isinstance(layer.mixer, GatedDeltaNetSpec)
            same_delta(theirs, layer.mixer)
        else:
            assert isinstance(layer.mixer, AttentionSpec)
            same_attention(theirs, layer.mixer)
        if isinstance(layer.ffn, MoeSpec):
            same_experts(theirs, layer.ffn)
        else:
            assert isinstance(layer.ffn, DenseSpec)
            assert layer.ffn.intermediate == theirs.intermediate_size
            assert layer.ffn.bias == getattr(theirs, "mlp_bias", False)
        assert isinstance(layer.ffn, MoeSpec) == sparse(theirs, index)


def sparse(theirs: Any, index: int) -> bool:
    if not hasattr(theirs, "num_experts_per_tok"):
        return False
    dense = getattr(theirs, "mlp_only_layers", None) or []
    return index not in dense and (index + 1) % getattr(theirs, "decoder_sparse_step", 1) == 0


def same_attention(theirs: Any, mixer: AttentionSpec) -> None:
    heads = theirs.num_attention_heads
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    assert (mixer.num_heads, mixer.num_kv_heads) == (heads, theirs.num_key_value_heads)
    assert mixer.head_dim == width
    assert mixer.bias == (getattr(theirs, "attention_bias", False) and theirs.model_type != "mixtral")
    rotary = theirs.rope_parameters
    assert mixer.rotary.theta == rotary["rope_theta"]
    assert mixer.rotary.dim == int(width * rotary.get("partial_rotary_factor", 1.0))


def same_delta(theirs: Any, mixer: GatedDeltaNetSpec) -> None:
    assert mixer == GatedDeltaNetSpec(
        theirs.linear_num_key_heads,
        theirs.linear_num_value_heads,
        theirs.linear_key_head_dim,
        theirs.linear_value_head_dim,
        theirs.linear_conv_kernel_dim,
    )


def same_experts(theirs: Any, ffn: MoeSpec) -> None:
    assert (ffn.num_experts, ffn.top_k) == (theirs.num_experts, theirs.num_experts_per_tok)
    width = "intermediate_size" if theirs.model_type == "mixtral" else "moe_intermediate_size"
    assert ffn.intermediate == getattr(theirs, width)
    assert ffn.shared_intermediate == getattr(theirs, "shared_expert_intermediate_size", 0)
    if hasattr(theirs, "norm_topk_prob"):
        assert ffn.renormalize == theirs.norm_topk_prob


@pytest.mark.parametrize("model_type", list(FULL))
def test_a_full_config_states_every_field_that_has_a_default(model_type: str) -> None:
    raw = Recorded({"model_type": model_type, **FULL[model_type]})
    ModelConfig.from_dict(raw)
    unstated = {"num_experts", "router_aux_loss_coef"}  # under another name; of sparse models only
    assert raw.asked & DEFAULTS[model_type].keys() <= FULL[model_type].keys() | unstated
    assert len(fields_read(model_type)) >= 13
    library_says(transformers.AutoConfig.for_model(**raw), ModelConfig.from_dict(raw))


@pytest.mark.parametrize(("model_type", "names"), list(cases()))
def test_an_absent_field_has_the_default_of_transformers(model_type: str, names: tuple[str, ...]) -> None:
    raw = {"model_type": model_type, **FULL[model_type]}
    for name in names:
        del raw[name]
    theirs = transformers.AutoConfig.for_model(**raw)
    try:
        config = ModelConfig.from_dict(raw)
    except CheckpointError as error:
        assert not loadable(theirs), error
        assert "the file does not state it" in str(error) and len(str(error)) < 200
        return
    library_says(theirs, config)


def loadable(theirs: Any) -> bool:
    """Whether a model can be made of a config of the library."""
    heads, kv_heads = theirs.num_attention_heads, theirs.num_key_value_heads
    if heads % kv_heads or getattr(theirs, "num_experts_per_tok", 0) > getattr(theirs, "num_experts", 0):
        return False
    values, keys = getattr(theirs, "linear_num_value_heads", 0), getattr(theirs, "linear_num_key_heads", 1)
    return bool(values % keys == 0)


@pytest.mark.parametrize(("wrapper", "text"), sorted(WRAPPERS.items()))
def test_wrappers_have_the_defaults_of_their_text_part(wrapper: str, text: str) -> None:
    for name in fields_read(text):
        fields = {key: value for key, value in FULL[text].items() if key != name}
        theirs = transformers.AutoConfig.for_model(wrapper, text_config=dict(fields)).text_config
        if loadable(theirs):
            library_says(theirs, ModelConfig.from_dict({"model_type": wrapper, "text_config": fields}))


#: Where null is read though the library refuses it (its own code has a meaning for it, or it means "off"),
#: and where it is refused though the library takes it, which then fails in the model.
_NULLS = {("mixtral", "num_key_value_heads"): True, "use_sliding_window": True, "rope_theta": False}


@pytest.mark.parametrize("model_type", list(FULL))
def test_null_is_refused_where_transformers_refuses_it(model_type: str) -> None:
    for name in fields_read(model_type):
        raw = {"model_type": model_type, **FULL[model_type], name: None}
        theirs, config = theirs_of(raw), ours_of(raw)
        if theirs is not None and config is not None:
            library_says(theirs, config)
            continue
        known = _NULLS.get((model_type, name), _NULLS.get(name))
        assert known is (config is not None) or (known is None and config is None and theirs is None), name


def ours_of(raw: Mapping[str, Any]) -> ModelConfig | None:
    try:
        return ModelConfig.from_dict(raw)
    except GodwitError:
        return None


def theirs_of(raw: Mapping[str, Any]) -> Any:
    try:
        return transformers.AutoConfig.for_model(**raw)
    except Exception:  # several kinds, none of them public
        return None
