"""Configs from keys: what a file says, what its architecture implies, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from godwit.checkpoint.gguf.metadata import Metadata, llama3_rotary, read_config
from godwit.config import AttentionSpec, GatedDeltaNetSpec, ModelConfig, MoeSpec
from godwit.errors import CheckpointError, UnsupportedModelError

SHAPES = {"token_embd.weight": (128, 64), "output.weight": (128, 64)}


def keys(arch: str, **changed: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "block_count": 4,
        "context_length": 4096,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "rope.freq_base": 1e7,
        **changed,
    }
    general = {"general.architecture": arch, "general.type": "model"}
    return general | {f"{arch}.{name}": value for name, value in found.items() if value is not None}


EXPERTS = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32}
DELTA = {
    "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 6,
    "ssm.inner_size": 96, "rope.dimension_count": 8, "full_attention_interval": 4,
}  # fmt: skip


def config_of(arch: str, shapes: Any = SHAPES, **changed: Any) -> ModelConfig:
    return ModelConfig.from_dict(read_config(Metadata(Path("f.gguf"), keys(arch, **changed)), shapes))


def test_a_hybrid_with_experts_and_mtp() -> None:
    flags = np.array([True, True, False, False, False])
    config = config_of(
        "qwen35moe", block_count=5, nextn_predict_layers=1, feed_forward_length=None, **EXPERTS, **DELTA,
        **{"attention.recurrent_layers": flags},
    )  # fmt: skip
    kinds = [type(layer.mixer) for layer in config.layers]
    assert kinds == [GatedDeltaNetSpec, GatedDeltaNetSpec, AttentionSpec, AttentionSpec]
    assert config.num_mtp_layers == 1 and config.model_type == "qwen3_5_moe_text"
    assert config.layers[0].ffn == MoeSpec(8, 2, 32, 32, renormalize=True)
    delta = config.layers[0].mixer
    assert delta == GatedDeltaNetSpec(2, 6, 16, 16, 4)
    attention = config.layers[3].mixer
    assert isinstance(attention, AttentionSpec)
    assert (attention.rotary.dim, attention.rotary.theta, attention.output_gate) == (8, 1e7, True)
    assert config.norm_eps == 1e-6  # not the float32 beside it


def test_the_interval_decides_where_the_layers_are_not_listed() -> None:
    config = config_of("qwen3next", block_count=8, **EXPERTS, **DELTA)
    attention = [isinstance(layer.mixer, AttentionSpec) for layer in config.layers]
    assert attention == [False, False, False, True] * 2


def test_llama_with_experts_is_mixtral() -> None:
    config = config_of("llama", **EXPERTS | {"expert_feed_forward_length": None})
    assert config.model_type == "mixtral"
    assert config.layers[0].ffn == MoeSpec(8, 2, 96, 0, renormalize=True, weights_in_float32=True)


def test_qwen3_moe_renormalises_as_llama_cpp_does() -> None:
    ffn = config_of("qwen3moe", **EXPERTS).layers[0].ffn
    assert isinstance(ffn, MoeSpec) and ffn.renormalize and ffn.shared_intermediate == 0


def test_without_a_head_the_embedding_is_tied() -> None:
    assert config_of("qwen3", {"token_embd.weight": (128, 64)}).tie_embeddings
    assert not config_of("qwen3").tie_embeddings


def test_heads_of_the_default_width() -> None:
    config = config_of("llama", **{"attention.key_length": None, "attention.value_length": None})
    attention = config.layers[0].mixer
    assert isinstance(attention, AttentionSpec) and attention.head_dim == 16


def test_key_value_heads_by_layer_are_their_largest() -> None:
    config = config_of("qwen3next", **EXPERTS, **DELTA, **{"attention.head_count_kv": np.array([0, 0, 0, 2])})
    attention = config.layers[3].mixer
    assert isinstance(attention, AttentionSpec) and attention.num_kv_heads == 2


def test_ollama_does_not_count_mtp_layers_as_blocks() -> None:
    config = config_of(
        "qwen35moe", block_count=4, nextn_predict_layers=1, image_token_id=7, **EXPERTS, **DELTA
    )
    assert len(config.layers) == 4


def test_yarn_is_read() -> None:
    config = config_of(
        "qwen3",
        **{
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 1024,
        },
    )
    attention = config.layers[0].mixer
    assert isinstance(attention, AttentionSpec)
    assert (attention.rotary.kind, attention.rotary.factor) == ("yarn", 4.0)
    assert attention.rotary.original_max_position == 1024


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 128)])
def test_the_parameters_of_llama3_come_back_from_its_divisors(factor: float, original: int) -> None:
    theta, half = 500000.0, 64
    wavelengths = 2 * math.pi * theta ** (np.arange(half) / half)
    blend = np.clip((original / wavelengths - 1) / 3, 0, 1)
    divisors = (1 / ((1 - blend) / factor + blend)).astype(np.float32).astype(float)
    found = llama3_rotary(divisors, theta)
    assert found is not None
    assert (found["factor"], found["original_max_position_embeddings"]) == (factor, original)


def test_other_divisors_are_not_those_of_llama3() -> None:
    assert llama3_rotary(np.linspace(1, 9, 32), 1e4) is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (keys("gemma3"), "'gemma3' is not supported; Godwit runs: qwen3next, "),
    "none": ({}, "None is not supported"),
    "adapter": (keys("llama") | {"general.type": "adapter"}, "a LoRA adapter"),
    "vision": (keys("clip"), "no language model"),
    "router": (keys("qwen3moe", **EXPERTS, expert_gating_func=2), "only routers with a softmax"),
    "rope": (keys("qwen3", **{"rope.scaling.type": "longrope"}), "rope scaling 'longrope'"),
    "partial": (keys("qwen3", **{"rope.dimension_count": 8}), "rotating a part of each head"),
    "values": (keys("qwen3", **{"attention.value_length": 16}), "of different widths"),
    "missing": (keys("qwen3", embedding_length=None), "has no key qwen3.embedding_length"),
    "text": (keys("qwen3", block_count="four"), "qwen3.block_count is 'four', not a number"),
    "flag": (keys("qwen3", block_count=True), "qwen3.block_count is True, not a number"),
    "heads": (keys("qwen3next", **EXPERTS, **DELTA | {"ssm.time_step_rank": 5}), "is not divided by 5 heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused(case: str) -> None:
    found, message = REFUSED[case]
    with pytest.raises((UnsupportedModelError, CheckpointError), match=f"f.gguf: .*{message}"):
        read_config(Metadata(Path("f.gguf"), found), SHAPES)
