from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from godwit.errors import UsageError
from godwit.measure.quality import Quality, compare
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from tests.engine.tiny import CONFIGS, PADDED, tiny_model


def text(length: int) -> list[int]:
    ids: list[int] = torch.randint(0, PADDED, (length,)).tolist()
    return ids


def shaken(model: CausalLM, size: float) -> CausalLM:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.add_(size * torch.randn_like(parameter))
    return other


def log_probabilities(model: CausalLM, ids: list[int]) -> Tensor:
    hidden = model(ForwardBatch.packed(torch.tensor(ids), [len(ids)]))
    return model.compute_logits(hidden).double().log_softmax(-1)


def plainly(first: CausalLM, second: CausalLM, texts: list[list[int]]) -> Quality:
    """The same figures from whole texts, without caches or windows."""
    losses: list[tuple[float, float, float, float]] = []
    for ids in texts:
        p, q = log_probabilities(first, ids), log_probabilities(second, ids)
        for at, target in enumerate(ids[1:]):
            kl = float((p[at].exp() * (p[at] - q[at])).sum())
            same = float(p[at].argmax() == q[at].argmax())
            losses.append((-float(p[at, target]), -float(q[at, target]), kl, same))
    count = len(losses)
    loss, changed, kl, same = (sum(column) / count for column in zip(*losses, strict=True))
    ordered = sorted(row[2] for row in losses)
    at = math.ceil(0.99 * count) - 1
    return Quality(count, math.exp(loss), math.exp(changed), kl, ordered[at], same)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize(
    ("length", "window", "context"), [(50, 16, 100), (50, 7, 20), (2, 512, 4096), (65, 64, 64)]
)
def test_figures_are_those_of_whole_texts(kind: str, length: int, window: int, context: int) -> None:
    model = tiny_model(kind)
    other = shaken(model, 0.03)
    ids = text(length)
    found = compare(model, other, ids, window=window, context=context)
    wanted = plainly(model, other, [ids[i : i + context] for i in range(0, length, context)])
    assert found.tokens == wanted.tokens and found.same_top == pytest.approx(
        wanted.same_top, abs=1.01 / found.tokens
    )
    for name in ("perplexity", "perplexity_changed", "kl", "kl_99"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=2e-3), name


def test_a_model_is_itself() -> None:
    model = tiny_model("hybrid")
    seen: list[tuple[int, int]] = []
    found = compare(
        model, copy.deepcopy(model), text(90), window=32, progress=lambda *pair: seen.append(pair)
    )
    assert (found.kl, found.kl_99, found.same_top) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.perplexity_changed and found.tokens == 89
    assert seen == [(32, 90), (64, 90), (90, 90)]


def test_more_noise_is_further_away() -> None:
    model, ids = tiny_model("hybrid"), text(120)
    near, far = (compare(model, shaken(model, size), ids) for size in (0.01, 0.1))
    assert 0 < near.kl < far.kl and near.same_top > far.same_top and near.kl_99 > near.kl


@pytest.mark.parametrize("ids", [[], [3]])
def test_too_little_text(ids: list[int]) -> None:
    with pytest.raises(UsageError, match="two tokens"):
        compare(tiny_model("attention"), tiny_model("attention"), ids)
