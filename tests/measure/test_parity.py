from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from godwit.config import AttentionSpec, GatedDeltaNetSpec, ModelConfig, MoeSpec
from godwit.errors import GodwitError, KernelParityError
from godwit.kernels import ops
from godwit.measure import parity
from godwit.measure.parity import KernelCheck, check_kernels, require_parity, small_config
from godwit.models.causal_lm import CausalLM
from tests.measure.test_planner import MIXTRAL, NEXT_80B, QWEN3_30B, QWEN3_32B

MODELS = {"hybrid": NEXT_80B, "moe": QWEN3_30B, "dense": QWEN3_32B, "mixtral": MIXTRAL}
WRAPPED = {
    "model_type": "qwen3_5_moe",
    "text_config": {**NEXT_80B, "model_type": "qwen3_5_moe_text", "num_experts": 12},
}


@pytest.mark.parametrize("raw", [*MODELS.values(), WRAPPED], ids=[*MODELS, "wrapped"])
def test_the_small_model_has_every_feature_of_the_large_one(raw: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(raw)
    small = small_config(config)
    assert small.model_type == config.model_type and small.hidden_size == parity.HIDDEN
    assert {type(layer.mixer) for layer in small.layers} == {type(layer.mixer) for layer in config.layers}
    assert {type(layer.ffn) for layer in small.layers} == {type(layer.ffn) for layer in config.layers}
    for kind in (AttentionSpec, GatedDeltaNetSpec, MoeSpec):
        assert features(small, kind) == features(config, kind)
    with torch.device("meta"):
        assert sum(p.numel() for p in CausalLM(small, 0).parameters()) < 5e6


def features(config: ModelConfig, kind: type) -> list[object]:
    """What kernels may depend on besides sizes."""
    parts = [part for layer in config.layers for part in (layer.mixer, layer.ffn)]
    part = next((part for part in parts if isinstance(part, kind)), None)
    if isinstance(part, AttentionSpec):
        ratio = part.num_heads // part.num_kv_heads
        return [ratio, part.head_dim, part.qk_norm, part.output_gate, part.rotary, part.bias]
    if isinstance(part, GatedDeltaNetSpec):
        ratio = part.num_v_heads // part.num_k_heads
        return [ratio, part.head_k_dim, part.head_v_dim, part.conv_kernel]
    if isinstance(part, MoeSpec):
        return [part.top_k, bool(part.shared_intermediate), part.renormalize, part.weights_in_float32]
    return []


def test_a_model_of_mixed_layers_stays_mixed() -> None:
    config = ModelConfig.from_dict({**NEXT_80B, "mlp_only_layers": [0, 1, 2]})
    kinds = [type(layer.ffn) for layer in small_config(config).layers]
    assert len(set(kinds)) == 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", ["bf16", "q8", "q4"])
def test_the_native_kernels_are_green(name: str, format: str) -> None:
    (check,) = check_kernels(ModelConfig.from_dict(MODELS[name]), [format, "float32"])
    assert check.format == format
    assert check.cut_invariant
    assert 0.0 < check.error <= check.limit
    require_parity([check])


def test_unpacked_weights_run_on_the_reference_itself() -> None:
    assert check_kernels(ModelConfig.from_dict(NEXT_80B), ["float32", "bfloat16"]) == []


def rounded(x: Tensor) -> Tensor:
    """Eight bits with a scale for each group of 32."""
    groups = torch.unflatten(x, -1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.where(scale > 0, groups / scale, 0.0).round() * scale).flatten(-2)


def spoiled_op(op: Callable[..., Tensor], spoil: Callable[[Tensor], Tensor], x: Tensor, *rest: Any) -> Tensor:
    return op(spoil(x), *rest)


def lossy(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]) -> parity.Pack:
    """A pack function for a model whose products see spoiled inputs; the plain model's stay as they are."""

    def pack(model: CausalLM, format: str) -> CausalLM:
        packed = copy.deepcopy(model)
        forward = packed.forward

        def spoiled(*args: Any, **kwargs: Any) -> Tensor:
            with monkeypatch.context() as patch:
                for op in ("linear", "moe_experts"):
                    patch.setattr(ops, op, partial(spoiled_op, getattr(ops, op), spoil))
                return forward(*args, **kwargs)

        packed.forward = spoiled  # type: ignore[method-assign]
        return packed

    return pack


def test_rounding_stays_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = check_kernels(ModelConfig.from_dict(QWEN3_32B), ["q4"], lossy(monkeypatch, rounded))
    assert check.limit / 50 < check.error < check.limit


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "swapped groups": lambda x: torch.cat((x[..., 32:64], x[..., :32], x[..., 64:]), -1),
    "a group left out": lambda x: torch.cat((x[..., :32] * 0, x[..., 32:]), -1),
    "a group of half the scale": lambda x: torch.cat((x[..., :32] / 2, x[..., 32:]), -1),
    "the wrong sign of every fourth": lambda x: x * torch.tensor([1, 1, 1, -1]).repeat(x.shape[-1] // 4),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_red(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = lossy(monkeypatch, FAULTS[fault])
    (check,) = check_kernels(ModelConfig.from_dict(MODELS[name]), ["q4"], pack)
    assert not check.green and check.error > 2 * check.limit


def test_numbers_that_are_none_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = lossy(monkeypatch, lambda x: x * math.nan)
    (check,) = check_kernels(ModelConfig.from_dict(QWEN3_32B), ["q8"], pack)
    assert check.error == math.inf and not check.green


def test_results_that_depend_on_the_cut_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = lossy(monkeypatch, lambda x: x * (1.0 + 1e-4 * (x.shape[0] > 1)))
    (check,) = check_kernels(ModelConfig.from_dict(QWEN3_32B), ["bf16"], pack)
    assert check.error < check.limit and not check.cut_invariant and not check.green


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (KernelCheck("q4", 0.5, 0.07, True), "off by 5.0e-01"),
        (KernelCheck("q8", 0.01, 0.07, False), "is split"),
    ],
)
def test_a_red_check_ends_in_one_sentence(check: KernelCheck, words: str) -> None:
    with pytest.raises(KernelParityError, match=words) as caught:
        require_parity([KernelCheck("bf16", 0.0, 1.0, True), check])
    assert isinstance(caught.value, GodwitError) and check.format in str(caught.value)
