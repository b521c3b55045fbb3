"""Costs against numbers computed by hand from the shapes of published models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from godwit.config import ModelConfig
from godwit.measure.costs import (
    Costs,
    Flops,
    costs_of,
    distinct_experts,
    formats_of,
    stored_bytes,
    trunk_caches,
)
from godwit.models.caches import PagedKVSpec, RecurrentSpec
from godwit.models.causal_lm import CausalLM
from tests.engine.tiny import tiny_model
from tests.measure.test_planner import MIXTRAL, NEXT_80B, QWEN3_30B, QWEN3_32B

EXPERT = 3 * 2048 * 512  # weights of one
EXACT = (".router.weight", ".in_proj_ba.weight")


def next_80b(format: str) -> Costs:
    """The 80B with its matrices in one format, routers and gate projections in bf16, float32 state."""
    config = ModelConfig.from_dict(NEXT_80B)
    with torch.device("meta"):
        names = [name for name, p in CausalLM(config, 0).named_parameters() if p.dim() > 1]
    kept = ("shared_gate.weight", "conv_weight")
    formats = {n: "bf16" if n.endswith(EXACT) else format for n in names if not n.endswith(kept)}
    delta = RecurrentSpec(8192, 3, 32, 128, 128, torch.float32)
    caches = [PagedKVSpec(2, 256, torch.bfloat16) if (i + 1) % 4 == 0 else delta for i in range(48)]
    return costs_of(config, formats, caches)


def test_the_80b_in_four_bits_to_the_byte() -> None:
    costs = next_80b("q4")
    packed = 36 * (25_165_824 + 8_388_608) + 12 * (18_874_368 + 8_388_608) + 48 * 3_145_728 + 311_164_928
    plain16 = 36 * 131_072 + 48 * 1_048_576
    delta_vectors = 36 * (4 * 8192 + 32 + 32 + 128)
    plain32 = delta_vectors + 12 * 512 + 48 * (2048 + 4096) + 2048
    assert costs.weights == packed * 69 // 128 + 2 * plain16 + 4 * plain32
    assert {(e.num_experts, e.top_k, e.nbytes) for e in costs.experts} == {(512, 10, EXPERT * 69 // 128)}
    assert len(costs.experts) == 48
    assert costs.kv_per_token == 24_576
    assert costs.state == 75_497_472 + 36 * 3 * 8192 * 4


def test_the_bytes_of_a_step_add_up() -> None:
    costs = next_80b("q4")
    one = costs.weights + 480 * EXPERT * 69 // 128 + 24_576 + 2 * costs.state
    assert costs.step_bytes(1, 0) == pytest.approx(one, rel=1e-12)
    assert 2.1e9 < one < 2.2e9  # 4.3125 bits a weight, and 0.16 GB of state
    assert costs.step_bytes(1, 4096) - one == pytest.approx(4096 * 24_576)
    eight = costs.weights + 48 * 74.7397 * EXPERT * 69 / 128 + 8 * (24_576 * 33 + 2 * costs.state)
    assert costs.step_bytes(8, 32) == pytest.approx(eight, rel=1e-4)
    counted = costs.step_bytes(8, 32, [12.5] * 48)
    assert counted == pytest.approx(eight - 48 * (74.7397 - 12.5) * EXPERT * 69 / 128, rel=1e-4)


def test_operations_of_the_80b() -> None:
    costs = next_80b("bf16")
    assert costs.decode_flops(-1).total == pytest.approx(7.259e9, rel=1e-4)
    assert costs.flops_head.total == 622_329_856
    assert costs.flops_per_context.total == 196_608
    assert costs.decode_flops(32_768).total == pytest.approx(13.70e9, rel=1e-3)
    linear = 36 * 67_371_008 + 12 * 54_525_952 + 48 * (2_097_152 + 62_914_560 + 6_295_552)
    assert costs.flops_per_token.total == linear + 36 * (65_536 + 7 * 32 * 128 * 128)
    prompt = 4096 * costs.flops_per_token.total + 622_329_856 + 196_608 * 4096 * 4097 // 2
    assert costs.prefill_flops(4096).total == prompt
    assert prompt == pytest.approx(29.1e12, rel=0.01)


def test_operations_by_what_multiplies_them() -> None:
    costs = next_80b("q4")
    exact = 48 * 2 * 2048 * (512 + 1) + 36 * 2 * 2048 * 64  # routers, shared gates, gates of the delta rule
    recurrent = 36 * (65_536 + 7 * 32 * 128 * 128)
    assert costs.flops_per_token == Flops(
        int8=next_80b("bf16").flops_per_token.total - exact - recurrent, float32=exact + recurrent
    )
    assert costs.flops_head == Flops(int8=622_329_856) and costs.flops_per_context == Flops(bfloat16=196_608)
    widened = next_80b("bf16")
    assert widened.flops_per_token.float32 == widened.flops_per_token.total  # bf16 weights meet float32
    peaks = {"int8": 1e12, "bfloat16": 4e11, "float32": 1e11}
    assert Flops(2e12, 4e11, 3e11).seconds(peaks) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", Flops(float32=1)), ("bfloat16", Flops(bfloat16=1))]
)
def test_operations_of_a_model_on_pytorch(dtype: str, expected: Flops) -> None:
    kind = getattr(torch, dtype)
    costs = costs_of(ModelConfig.from_dict(QWEN3_32B), {}, [PagedKVSpec(8, 128, kind)] * 64, dtype)
    for found in (costs.flops_per_token, costs.flops_head, costs.flops_per_context):
        assert found.total > 0 and found == expected * found.total


@pytest.mark.parametrize(
    ("raw", "giga", "context"),
    [(QWEN3_32B, 63.97, 2_097_152), (QWEN3_30B, 6.08, 786_432), (MIXTRAL, 25.50, 524_288)],
)
def test_operations_of_other_models(raw: dict[str, Any], giga: float, context: int) -> None:
    costs = costs_of(ModelConfig.from_dict(raw), {}, [])
    assert (costs.flops_per_token + costs.flops_head).total / 1e9 == pytest.approx(giga, abs=0.01)
    assert costs.flops_per_context.total == context
    assert costs.state == costs.kv_per_token == 0


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, 10.0), (2, 19.8), (8, 74.7), (32, 239.6), (256, 508.7), (512, 512.0)]
)
def test_distinct_experts_of_random_routing(batch: int, expected: float) -> None:
    assert distinct_experts(512, 10, batch) == pytest.approx(expected, abs=0.06)


def test_distinct_experts_agree_with_a_simulation() -> None:
    draws = [len({e for _ in range(4) for e in torch.randperm(7)[:3].tolist()}) for _ in range(2000)]
    # the deviation of a draw is below 1, so that of the mean is below 1 / sqrt(2000)
    assert sum(draws) / 2000 == pytest.approx(distinct_experts(7, 3, 4), abs=5 / math.sqrt(2000))


@pytest.mark.parametrize(
    ("format", "shape", "expected"),
    [
        ("q4", (16, 64), 576),
        ("q8", (16, 64), 1088),
        ("bf16", (17, 64), 2 * 2048),
        ("q4", (5, 512, 2048), 512 * 2048 * 69 // 128),
        ("float32", (7,), 28),
        ("bfloat16", (5, 3, 4), 24),
    ],
)
def test_stored_bytes(format: str, shape: tuple[int, ...], expected: int) -> None:
    assert stored_bytes(format, shape) == expected


@pytest.mark.parametrize("kind", ["attention", "delta", "hybrid"])
def test_a_plain_model_costs_its_parameters(kind: str) -> None:
    model = tiny_model(kind)
    costs = costs_of(model.config, formats_of(model), trunk_caches(model))
    needed = {name: p for name, p in model.named_parameters() if not name.startswith(("mtp.", "embedding."))}
    whole = sum(4 * p.numel() for name, p in needed.items() if ".experts." not in name)
    experts = sum(4 * p.numel() for name, p in needed.items() if ".experts." in name)
    assert costs.weights == whole
    assert sum(e.nbytes * e.num_experts for e in costs.experts) == experts
    assert bool(costs.kv_per_token) == (kind != "delta") and bool(costs.state) == (kind != "attention")


def test_a_tied_head_is_read() -> None:
    apart = costs_of(ModelConfig.from_dict(QWEN3_32B), {}, [])
    tied = costs_of(ModelConfig.from_dict({**QWEN3_32B, "tie_word_embeddings": True}), {}, [])
    assert apart == tied
