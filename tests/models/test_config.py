"""Configs: the published models to the last parameter, and refusals that say what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from godwit.config import (
    FAMILIES,
    AttentionSpec,
    DenseSpec,
    GatedDeltaNetSpec,
    ModelConfig,
    MoeSpec,
    RotarySpec,
)
from godwit.errors import CheckpointError, GodwitError, UnsupportedModelError
from godwit.kernels.reference import rotary_frequencies
from godwit.models.causal_lm import CausalLM
from godwit.models.names import Alternatives, name_map
from tests.models.families import FAMILIES as TINY
from tests.models.families import Family

#: config.json of Qwen3-Next-80B-A3B-Instruct, as published.
QWEN3_NEXT_80B: Mapping[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
QWEN3_32B: Mapping[str, Any] = {
    **_QWEN3,
    "model_type": "qwen3",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 25600,
}
QWEN3_30B: Mapping[str, Any] = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
QWEN3_235B: Mapping[str, Any] = {
    **QWEN3_30B,
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
}
MIXTRAL: Mapping[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
LLAMA_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}


def without(raw: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}


@pytest.mark.parametrize(
    ("raw", "num_mtp", "expected"),
    [
        pytest.param(QWEN3_NEXT_80B, 0, 79_674_391_296, id="Qwen3-Next-80B-A3B"),
        pytest.param(QWEN3_NEXT_80B, 1, 81_324_862_720, id="Qwen3-Next-80B-A3B with MTP"),
        pytest.param(QWEN3_32B, 0, 32_762_123_264, id="Qwen3-32B"),
        pytest.param(QWEN3_30B, 0, 30_532_122_624, id="Qwen3-30B-A3B"),
        pytest.param(QWEN3_235B, 0, 235_093_634_560, id="Qwen3-235B-A22B"),
        pytest.param(MIXTRAL, 0, 46_702_792_704, id="Mixtral-8x7B"),
        pytest.param(LLAMA_8B, 0, 8_030_261_248, id="Llama-3-8B"),
    ],
)
def test_parameters_of_published_models(raw: Mapping[str, Any], num_mtp: int, expected: int) -> None:
    config = ModelConfig.from_dict(raw)
    with torch.device("meta"):
        model = CausalLM(config, num_mtp)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    in_files = 0
    for entry in name_map(config, num_mtp):
        pieces = entry.options[0] if isinstance(entry, Alternatives) else (entry,)
        in_files += sum(torch.Size(piece.shape).numel() for piece in pieces)
    assert in_files == expected


def test_tensors_of_the_80b_release() -> None:
    entries = name_map(ModelConfig.from_dict(QWEN3_NEXT_80B), 1)
    counts = (len(e.options[0]) if isinstance(e, Alternatives) else 1 for e in entries)
    assert sum(counts) == 75_944


def test_fields_of_the_80b() -> None:
    config = ModelConfig.from_dict(QWEN3_NEXT_80B)
    kinds = [isinstance(layer.mixer, AttentionSpec) for layer in config.layers]
    assert [index for index, full in enumerate(kinds) if full] == list(range(3, 48, 4))
    attention = AttentionSpec(16, 2, 256, True, True, RotarySpec(64, 1e7))
    assert config.layers[3].mixer == config.mtp_layer.mixer == attention
    assert config.layers[0].mixer == GatedDeltaNetSpec(16, 32, 128, 128, 4)
    assert {layer.ffn for layer in config.layers} == {MoeSpec(512, 10, 512, 512, True)}
    assert config.num_mtp_layers is None and not config.tie_embeddings
    assert config.max_position == 262144


def test_explicit_layer_types_win() -> None:
    kinds = ["full_attention", "linear_attention"] * 24
    config = ModelConfig.from_dict({**QWEN3_NEXT_80B, "layer_types": kinds})
    found = [isinstance(layer.mixer, AttentionSpec) for layer in config.layers]
    assert found == [kind == "full_attention" for kind in kinds]


def test_dense_layers_among_sparse_ones() -> None:
    raw = {**QWEN3_NEXT_80B, "mlp_only_layers": [1, 5], "decoder_sparse_step": 2}
    dense = [isinstance(layer.ffn, DenseSpec) for layer in ModelConfig.from_dict(raw).layers[:8]]
    assert dense == [True, True, True, False, True, True, True, False]


def test_number_of_experts_under_either_name() -> None:
    other = {**without(QWEN3_30B, "num_experts"), "num_local_experts": 128}
    assert ModelConfig.from_dict(other).layers == ModelConfig.from_dict(QWEN3_30B).layers


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e6}, RotarySpec(64, 5e6)),
        ({"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}, RotarySpec(64, 5e6)),
        ({"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}}, RotarySpec(128, 5e6)),
        (
            {"rope_theta": 5e6, "rope_scaling": {"type": "linear", "factor": 2}},
            RotarySpec(64, 5e6, "linear", 2.0, 262144),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            RotarySpec(64, 1e7, "yarn", 4.0, 32768, attention_factor=1.1386294361119891),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "attention_factor": 1.0,
                    "truncate": False,
                }
            },
            RotarySpec(64, 1e7, "yarn", 4.0, 262144, truncate=False),
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [11, 11, 10]}}, RotarySpec(64, 1e7)),
    ],
)
def test_rotary_fields_old_and_new(fields: Mapping[str, Any], expected: RotarySpec) -> None:
    mixer = ModelConfig.from_dict({**QWEN3_NEXT_80B, **fields}).layers[3].mixer
    assert isinstance(mixer, AttentionSpec) and mixer.rotary == expected


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # Qwen3's model card: the stated length stays that of training plus an answer
        ({"max_position_embeddings": 40960, "rope_scaling": _YARN}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {**_YARN, "type": "yarn"}}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4}}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {**_YARN, "factor": 2.5}}, 81920),
        ({"max_position_embeddings": 131072, "rope_scaling": _YARN}, 131072),
        # Qwen3-Next's card: 262,144 times 4
        ({"rope_scaling": {**_YARN, "original_max_position_embeddings": 262144}}, 1048576),
        ({"rope_parameters": {**_YARN, "rope_theta": 1e7, "partial_rotary_factor": 0.25}}, 131072),
        ({"rope_parameters": {"rope_theta": 1e7}, "rope_scaling": _YARN}, 131072),
        ({"rope_scaling": {**_YARN, "factor": None}}, 262144),
        ({"original_max_position_embeddings": 65536, "rope_scaling": _YARN}, 262144),
        (
            {"original_max_position_embeddings": 65536, "rope_scaling": {"type": "yarn", "factor": 8.0}},
            524288,
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        # Llama 3.1 states the stretched length
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        ({"rope_scaling": {"type": "default"}}, 262144),
        ({"rope_scaling": None}, 262144),
    ],
)
def test_scaling_lengthens_the_context(fields: Mapping[str, Any], expected: int) -> None:
    assert ModelConfig.from_dict({**QWEN3_NEXT_80B, **fields}).max_position == expected


@pytest.mark.parametrize(
    "section",
    [
        _YARN,
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32768},
    ],
)
def test_yarn_is_read_as_transformers_reads_it(section: Mapping[str, Any]) -> None:
    library = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = {**QWEN3_32B, "max_position_embeddings": 131072, "rope_scaling": dict(section)}
    wanted, factor = ROPE_INIT_FUNCTIONS["yarn"](library.AutoConfig.for_model(**raw))
    mixer = ModelConfig.from_dict(raw).layers[0].mixer
    assert isinstance(mixer, AttentionSpec)
    assert torch.allclose(rotary_frequencies(mixer.rotary).float(), wanted, rtol=1e-6)
    assert mixer.rotary.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("family", TINY, ids=lambda family: family.name)
def test_transformers_writes_what_was_asked(family: Family, tmp_path: Path) -> None:
    """The config.json that the library saves means the same model as the fields it was made from."""
    library = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    library.AutoConfig.for_model(family.model_type, **family.fields).save_pretrained(tmp_path)
    ours = ModelConfig.from_dict({"model_type": family.model_type, **family.fields})
    theirs = ModelConfig.from_file(tmp_path)
    assert theirs.layers == ours.layers
    assert theirs.tie_embeddings == ours.tie_embeddings
    assert (theirs.vocab_size, theirs.hidden_size) == (ours.vocab_size, ours.hidden_size)


@pytest.mark.parametrize("kind", ["gpt2", "qwen4_exp", "deepseek_v3", None, 7, ["qwen3"]])
def test_unknown_model_types_are_refused_with_the_list(kind: object) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_dict({**QWEN3_NEXT_80B, "model_type": kind})
    for known in FAMILIES:
        assert known in str(caught.value)


BAD: tuple[tuple[Mapping[str, Any], type[GodwitError], str], ...] = (
    ({"hidden_size": None}, CheckpointError, "hidden_size"),
    ({"hidden_size": 0}, CheckpointError, "hidden_size"),
    ({"hidden_size": "2048"}, CheckpointError, "hidden_size"),
    ({"vocab_size": True}, CheckpointError, "vocab_size"),
    ({"num_hidden_layers": 10**6}, CheckpointError, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, CheckpointError, "num_key_value_heads"),
    ({"linear_num_key_heads": 5}, CheckpointError, "linear_num_key_heads"),
    ({"layer_types": ["full_attention"]}, CheckpointError, "layer_types must list 48"),
    ({"layer_types": ["sliding_attention"] * 48}, UnsupportedModelError, "sliding_attention"),
    ({"mlp_only_layers": 3}, CheckpointError, "mlp_only_layers"),
    ({"num_experts": -1}, CheckpointError, "num_experts"),
    ({"num_experts_per_tok": 513}, CheckpointError, "num_experts_per_tok"),
    ({"moe_intermediate_size": None}, CheckpointError, "moe_intermediate_size"),
    ({"norm_topk_prob": 1}, CheckpointError, "norm_topk_prob"),
    ({"tie_word_embeddings": "false"}, CheckpointError, "tie_word_embeddings"),
    ({"rms_norm_eps": -1e-6}, CheckpointError, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, CheckpointError, "rms_norm_eps"),
    ({"rope_theta": 0}, CheckpointError, "rope_theta"),
    ({"rope_theta": 10**400}, CheckpointError, "rope_theta"),
    ({"partial_rotary_factor": 1.5}, CheckpointError, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.001}, CheckpointError, "partial_rotary_factor"),
    ({"rope_scaling": [1]}, CheckpointError, "rope_scaling"),
    ({"rope_scaling": {"type": "longrope"}}, UnsupportedModelError, "longrope"),
    ({"rope_scaling": {"type": "yarn"}}, CheckpointError, "factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, CheckpointError, "factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 1e6}}, CheckpointError, "beyond 2147483647"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}}, CheckpointError, "beta_fast"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": "x"}},
        CheckpointError,
        "original_max_position_embeddings",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1, "mscale_all_dim": 1}},
        UnsupportedModelError,
        "mscale",
    ),
    (
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        CheckpointError,
        "high_freq_factor",
    ),
    ({"hidden_act": "gelu"}, UnsupportedModelError, "gelu"),
    ({"attn_output_gate": False}, UnsupportedModelError, "attn_output_gate"),
    ({"use_sliding_window": True, "sliding_window": 4096}, UnsupportedModelError, "sliding"),
    ({"mtp_num_hidden_layers": 2}, UnsupportedModelError, "mtp_num_hidden_layers"),
    ({"num_hidden_layers": 4096}, CheckpointError, "num_hidden_layers must be a whole number from 1 to 1024"),
    ({"num_experts": 2**20}, CheckpointError, "experts in total, more than 262144"),
    ({"num_attention_heads": 2**16, "head_dim": 2**10}, CheckpointError, "are wider than 1048576 in total"),
    ({"linear_num_value_heads": 2**16}, CheckpointError, "heads are 8392704 wide, more than 1048576"),
    ({"mtp_num_hidden_layers": "1"}, CheckpointError, "mtp_num_hidden_layers"),
)


@pytest.mark.parametrize(("fields", "kind", "words"), BAD)
def test_bad_fields_are_named(fields: Mapping[str, Any], kind: type[GodwitError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        ModelConfig.from_dict({**QWEN3_NEXT_80B, **fields})
    assert len(str(caught.value)) < 300


def test_mixtral_with_a_window_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="window"):
        ModelConfig.from_dict({**MIXTRAL, "sliding_window": 4096})


def test_mtp_needs_an_attention_layer() -> None:
    config = ModelConfig.from_dict({**QWEN3_NEXT_80B, "layer_types": ["linear_attention"] * 48})
    with pytest.raises(UnsupportedModelError, match="full-attention layer"):
        _ = config.mtp_layer


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 0.5, 1e308, 10**30, float("inf")),
    *("", "x", [], [1], [None] * 48, {}, {"a": 1}),
)
SCALINGS: tuple[Mapping[str, Any], ...] = (
    {"type": "yarn", "factor": 4.0},
    {"type": "llama3", "factor": 8.0},
    {"type": "linear", "factor": 2.0},
)


@pytest.mark.parametrize("raw", [QWEN3_NEXT_80B, QWEN3_30B, MIXTRAL, LLAMA_8B], ids=lambda r: r["model_type"])
def test_any_value_of_any_field_is_read_or_refused(raw: Mapping[str, Any]) -> None:
    """Never another exception than ours, and what is read has frequencies."""
    names = [*raw, "layer_types", "rope_parameters", "text_config", "num_local_experts", "mlp_bias"]
    tried = [{**raw, name: value} for name in names for value in VALUES]
    inner: tuple[str, ...] = (
        "rope_theta",
        "factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "low_freq_factor",
    )
    inner += ("high_freq_factor", "original_max_position_embeddings", "truncate", "type", "mscale")
    tried += [
        {**raw, "rope_scaling": {**scaling, name: value}}
        for scaling in SCALINGS
        for name in inner
        for value in VALUES
    ]
    read = 0
    for changed in tried:
        try:
            config = ModelConfig.from_dict(changed)
        except GodwitError:
            continue
        read += 1
        mixer = config.layers[-1].mixer
        if isinstance(mixer, AttentionSpec) and mixer.rotary.kind != "default":
            rotary_frequencies(mixer.rotary)
    assert 50 < read < len(tried)


class TestFiles:
    def test_a_directory_or_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(dict(LLAMA_8B)))
        expected = ModelConfig.from_dict(LLAMA_8B)
        assert ModelConfig.from_file(tmp_path) == expected
        assert ModelConfig.from_file(str(tmp_path / "config.json")) == expected

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a": 1}}', "\x00"])
    def test_damaged(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            ModelConfig.from_file(tmp_path)

    def test_absent_or_huge(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such file"):
            ModelConfig.from_file(tmp_path)
        with (tmp_path / "config.json").open("wb") as file:
            file.truncate(17 * 2**20)
        with pytest.raises(CheckpointError, match="larger than 16 MiB"):
            ModelConfig.from_file(tmp_path)
