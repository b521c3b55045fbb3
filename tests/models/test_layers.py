"""Where the published models round router weights, and kernels that a device brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from godwit.config import MoeSpec
from godwit.kernels import ops, reference
from godwit.models.layers import SparseMoeBlock
from tests.engine.tiny import tiny_model
from tests.models.harness import CachedRun


@pytest.mark.parametrize("in_float32", [True, False])
def test_router_weights_stay_float32_only_where_published(
    in_float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral hands them on as they are, the Qwen families in the dtype of the activations."""
    seen: list[Tensor] = []
    plain = ops.moe_experts

    def record(x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        seen.append(weights)
        return plain(x, weights, ids, w13, w2)

    monkeypatch.setattr(ops, "moe_experts", record)
    block = SparseMoeBlock(MoeSpec(5, 2, 6, 0, True, weights_in_float32=in_float32), 8).bfloat16()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    out = block(torch.randn(9, 8).bfloat16())
    assert out.dtype == torch.bfloat16 and out.shape == (9, 8)
    assert seen[0].dtype == (torch.float32 if in_float32 else torch.bfloat16)
    torch.testing.assert_close(seen[0].float().sum(-1), torch.ones(9), atol=2.0**-8, rtol=0.0)


def test_a_device_brings_its_own_attention_over_its_own_cache_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one that stores negated numbers: the model passes the caches on without looking into them."""

    def store(cache: Tensor, new: Tensor, slots: Tensor) -> None:
        reference.store_kv(cache, -new, slots)

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Tensor:
        calls.append(q.shape[0])
        out: Tensor = -plain(q, -k_cache, v_cache, *rest)
        return out

    calls: list[int] = []
    model, plain = tiny_model("hybrid"), reference.paged_attention
    monkeypatch.setattr(ops, "_TABLE", dict(ops._TABLE))
    ops.register("paged_attention", "dense", "cpu", plain)
    wanted = [CachedRun(model).step(list(range(20))), CachedRun(model).step([7])]
    ops.register("paged_attention", "dense", "cpu", attend)
    ops.register("store_kv", "dense", "cpu", store)
    found = [CachedRun(model).step(list(range(20))), CachedRun(model).step([7])]
    assert calls == [20, 1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
