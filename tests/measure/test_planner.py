"""Sizes against the published counts of four models."""

from __future__ import annotations

from typing import Any

import pytest

from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.measure.planner import sizes_of
from godwit.models.inventory import PARTS

NEXT_80B: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "max_position_embeddings": 262144,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 5120,
    "tie_word_embeddings": False,
}
QWEN3_32B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 25600,
    "max_position_embeddings": 40960,
}
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
}


def test_the_parts_of_the_80b() -> None:
    sizes = sizes_of(ModelConfig.from_dict(NEXT_80B), 1)
    assert {name: part.total for name, part in sizes.parts.items()} == {
        "delta": 1_213_864_704,
        "attention": 327_161_856,
        "routers": 50_331_648,
        "experts": 77_309_411_328,
        "shared": 151_093_248,
        "dense": 0,
        "norms": 198_656,
        "embedding": 311_164_928,
        "head": 311_164_928,
        "mtp": 1_650_471_424,
    }
    assert sizes.total == 81_324_862_720
    assert sizes.parts["experts"].active == 1_509_949_440
    assert sizes.active - sizes.parts["head"].active == 3_252_599_552
    assert sizes.active == 3_563_764_480
    assert list(sizes.parts) == list(PARTS)


def test_the_caches_of_the_80b() -> None:
    sizes = sizes_of(ModelConfig.from_dict(NEXT_80B), 1)
    assert (sizes.kv_per_token, sizes.mtp_kv_per_token) == (24_576, 2_048)
    assert (sizes.state, sizes.conv) == (75_497_472, 1_769_472)
    assert sizes.cache(1000) == 26_624_000 + 77_266_944
    # 3 563 764 480 weights, 4 097 tokens of keys and values, the state read and written
    assert sizes.read_per_token(4096) == 7_127_528_960 + 4097 * 24_576 + 2 * 77_266_944


@pytest.mark.parametrize(
    ("raw", "total", "active", "kv"),
    [
        (NEXT_80B, 79_674_391_296, 3_563_764_480, 24_576),
        (QWEN3_32B, 32_762_123_264, 31_984_210_944, 262_144),
        (QWEN3_30B, 30_532_122_624, 3_041_867_776, 98_304),
        (MIXTRAL, 46_702_792_704, 12_748_853_248, 131_072),
    ],
)
def test_totals_of_published_models(raw: dict[str, Any], total: int, active: int, kv: int) -> None:
    sizes = sizes_of(ModelConfig.from_dict(raw))
    assert (sizes.total, sizes.active, sizes.kv_per_token) == (total, active, kv)
    assert (sizes.state == 0) == (raw is not NEXT_80B)


def test_a_tied_head_is_read_but_owned_once() -> None:
    apart = sizes_of(ModelConfig.from_dict(QWEN3_32B))
    tied = sizes_of(ModelConfig.from_dict({**QWEN3_32B, "tie_word_embeddings": True}))
    assert apart.total - tied.total == 151936 * 5120
    assert tied.parts["head"].total == 0 and tied.active == apart.active


def test_the_longest_context_that_fits() -> None:
    sizes = sizes_of(ModelConfig.from_dict(NEXT_80B))
    needed = sizes.resident(5000)
    assert sizes.context_in(needed, 262144) == 5000
    assert sizes.context_in(needed - 1, 262144) == 4999
    assert sizes.context_in(needed, 4096) == 4096
    assert sizes.context_in(sizes.weights, 4096) == 0


def test_sizes_beyond_all_machines_are_refused() -> None:
    huge = {**NEXT_80B, "hidden_size": 2**31 - 1, "moe_intermediate_size": 2**31 - 1, "num_hidden_layers": 4}
    with pytest.raises(CheckpointError, match="too large for any machine"):
        sizes_of(ModelConfig.from_dict(huge))
