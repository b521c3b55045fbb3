"""Where the published models round router weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from godwit.config import MoeSpec
from godwit.kernels import ops
from godwit.models.layers import SparseMoeBlock


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
