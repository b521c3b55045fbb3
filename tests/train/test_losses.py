"""Expert balance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from godwit.train.losses import ExpertLoad, expert_balance, load_balancing_loss

EXPERTS, TOP_K = 8, 2


def uniform(tokens: int = 64) -> Tensor:
    """Logits of near-equal probability whose choices visit every expert equally often."""
    first = torch.arange(tokens) % EXPERTS
    logits = torch.zeros(tokens, EXPERTS)
    logits[torch.arange(tokens), first] = 1e-4
    logits[torch.arange(tokens), (first + 1) % EXPERTS] = 1e-4
    return logits


def load_of(*logits: Tensor) -> ExpertLoad:
    load = ExpertLoad()
    load_balancing_loss(logits, TOP_K, pooled=False, load=load)
    return load


@pytest.mark.parametrize("pooled", [True, False])
def test_uniform_routing_costs_top_k(pooled: bool) -> None:
    loss = load_balancing_loss([uniform(), uniform(32)], TOP_K, pooled=pooled)
    assert float(loss) == pytest.approx(TOP_K, abs=1e-3)
    assert expert_balance(load_of(uniform(), uniform(32))) == 1.0


@pytest.mark.parametrize("pooled", [True, False])
def test_the_more_uneven_the_dearer(pooled: bool) -> None:
    bias = torch.arange(EXPERTS).float()
    losses = [
        float(load_balancing_loss([uniform() + s * bias], TOP_K, pooled=pooled)) for s in (0.0, 0.1, 1.0)
    ]
    assert TOP_K - 1e-3 < losses[0] < losses[1] < losses[2] <= EXPERTS
    assert expert_balance(load_of(uniform() + bias)) == EXPERTS / TOP_K


def test_it_is_the_formula() -> None:
    logits = torch.randn(50, EXPERTS)
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(TOP_K).indices, 1.0)
    expected = EXPERTS * (chosen.mean(0) * probs.mean(0)).sum()
    torch.testing.assert_close(load_balancing_loss([logits], TOP_K), expected)


def test_pooling_hides_what_layers_do_alone() -> None:
    one = torch.zeros(40, EXPERTS)
    one[:, :4] = 5.0
    other = one.flip(1)  # the layers are uneven in opposite ways
    pooled = load_balancing_loss([one, other], TOP_K)
    apart = load_balancing_loss([one, other], TOP_K, pooled=False)
    assert float(apart) > 1.5 * float(pooled)


def test_the_gradient_evens_out() -> None:
    logits = torch.randn(200, EXPERTS)
    logits[:, 3] += 1.0
    logits.requires_grad_()
    load_balancing_loss([logits], TOP_K).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert int(logits.grad.sum(0).argmax()) == 3 and float(logits.grad.sum(0)[3]) > 0


def test_micro_batches_share_their_counts() -> None:
    parts = [torch.randn(30, EXPERTS), torch.randn(20, EXPERTS)]
    load = ExpertLoad()
    first, second = (load_balancing_loss([part], TOP_K, pooled=False, load=load) for part in parts)
    torch.testing.assert_close(first, load_balancing_loss(parts[:1], TOP_K))
    probs = torch.cat(parts).softmax(-1)
    share = torch.zeros_like(probs).scatter(1, probs.topk(TOP_K).indices, 1.0).mean(0)
    torch.testing.assert_close(second, EXPERTS * (share * parts[1].softmax(-1).mean(0)).sum())
    assert int(load.counts[0].sum()) == 50 * TOP_K
    assert expert_balance(load) == pytest.approx(float(share.max() / share.mean()))


def test_nothing_to_balance() -> None:
    assert expert_balance(ExpertLoad()) == 1.0
