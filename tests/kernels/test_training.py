"""The training forms compute what the reference computes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from godwit.kernels import reference, training

# Of the norm. bfloat16 keeps 8 bits: one rounding is 2^-8 relative, and a chain of a few stays within this
# share; float32 sums of a few hundred terms in another order differ by less than 2^-18.
TOLERANCE = {True: 2.0**-6, False: 2.0**-18}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out.float() * weights).sum().backward()  # type: ignore[no-untyped-call]
    return out.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("lengths", [[128, 128], [1, 63, 64, 65, 63], [30, 98, 127, 1]])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_delta_rule_rows(lengths: list[int], ratio: int) -> None:
    generator = torch.Generator().manual_seed(0)
    total, groups, dk, dv = sum(lengths), 2, 8, 12
    heads = groups * ratio

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = [
        random(total, groups, dk),
        random(total, groups, dk),
        random(total, heads, dv),
        -random(total, heads).abs() * 0.3,
        random(total, heads).sigmoid(),
    ]
    positions = torch.cat([torch.arange(n) for n in lengths])
    rule = training.DeltaRule(compile_parts=False)
    fast, fast_grads = gradients(lambda *x: rule(*x, positions, total // 2), inputs)  # type: ignore[call-arg]
    slow, slow_grads = gradients(lambda *x: reference.chunk_gated_delta_rule(*x, lengths)[0], inputs)  # type: ignore[call-arg]
    assert relative(fast, slow) < 1e-5
    for a, b in zip(fast_grads, slow_grads, strict=True):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("low", [True, False])
def test_experts(low: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, width, count, k = 300, 32, 16, 7, 3
    x = torch.randn(tokens, hidden, generator=generator)
    w13 = torch.randn(count, 2 * width, hidden, generator=generator) * 0.2
    w2 = torch.randn(count, hidden, width, generator=generator) * 0.2
    logits = torch.randn(tokens, count, generator=generator)
    logits[:, 2] = -50.0  # an expert without a single token
    weights, ids = reference.topk_softmax(logits, k, renormalize=True)
    fast_op = training.MoeExperts(compile_parts=False)

    def fused(a: Tensor, w: Tensor, u: Tensor, d: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return fast_op(a, w, ids, u, d)

    fast, fast_grads = gradients(fused, [x, weights, w13, w2])
    slow, slow_grads = gradients(
        lambda a, w, u, d: reference.moe_experts(a, w, ids, u, d), [x, weights, w13, w2]
    )
    assert relative(fast, slow) < TOLERANCE[low]
    for a, b in zip(fast_grads, slow_grads, strict=True):
        assert relative(a, b) < TOLERANCE[low]


@pytest.mark.parametrize("low", [True, False])
def test_linear_cross_entropy(low: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (70,), generator=generator)
    weights = torch.rand(70, generator=generator)
    weights[::3] = 0.0  # rows that are left out
    fast_op = training.LinearCrossEntropy(tile=32, compile_parts=False)

    def fused(h: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return fast_op(h, w, targets, weights)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        losses = torch.nn.functional.cross_entropy(h @ w.t(), targets, reduction="none")
        return (losses * weights).sum()

    fast, fast_grads = gradients(fused, [hidden, weight])
    slow, slow_grads = gradients(plain, [hidden, weight])
    assert relative(fast, slow) < TOLERANCE[low]
    for a, b in zip(fast_grads, slow_grads, strict=True):
        assert relative(a, b) < TOLERANCE[low]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_packed_convolution(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 5, 3, 1]
    x = torch.randn(sum(lengths), 6, generator=generator)
    weight = torch.randn(6, width, generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    fast, fast_grads = gradients(lambda a, w: reference.causal_conv1d_packed(a, w, positions), [x, weight])
    slow, slow_grads = gradients(lambda a, w: reference.causal_conv1d(a, w, lengths)[0], [x, weight])
    assert relative(fast, slow) < 1e-6
    for a, b in zip(fast_grads, slow_grads, strict=True):
        assert relative(a, b) < 1e-5
