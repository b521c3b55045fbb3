from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from godwit.engine import Sampler, SamplingParams
from godwit.engine.sampling import Tally, _place
from godwit.errors import GodwitError, UsageError

INF, NAN = math.inf, math.nan


def hf() -> Any:
    from transformers.generation import logits_process

    return logits_process


def logits_of(size: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


# what may be asked for


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, NAN, INF, 1e9, "1", None, True]),
        ("top_k", [-1, 1.5, 2**40, None, True]),
        ("top_p", [-0.5, 1.01, NAN, INF]),
        ("min_p", [-0.1, 1.5, NAN]),
        ("repetition_penalty", [0, -1, NAN, INF, 1e30]),
        ("presence_penalty", [-2.1, 2.1, NAN, -INF]),
        ("frequency_penalty", [3, NAN, 10**400]),
        ("seed", [1.0, 2**64, -(2**63) - 1, True, "7"]),
        ("max_tokens", [-1, 10**9, 1.0, True]),
        ("min_tokens", [-1, 10**9, 1.0, True]),
        ("stop_token_ids", [7, [-1], [1.0], ["a"], [1] * 1025, None]),
        ("stop", ["text", [""], [1], ["a"] * 65, ["a" * 1025], None]),
        ("logit_bias", [{-1: 0.0}, {1.0: 0.0}, {"1": 0.0}, {1: NAN}, {1: INF}, {1: 1e30}, {1: "x"}, [1]]),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=name):
            SamplingParams(**{name: value})


def test_extremes_that_make_sense_are_taken() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=1, repetition_penalty=1.5, seed=-(2**63))
    params = SamplingParams(stop=["a", "b"], logit_bias={0: -INF, 5: 100}, seed=2**64 - 1)  # type: ignore[arg-type]
    assert params.stop == ("a", "b")
    Sampler(params, 6)


def test_an_answer_cannot_be_longer_than_it_may_be() -> None:
    with pytest.raises(UsageError, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize("more", [{}, {"top_k": 30}, {"min_p": 0.1}], ids=str)
def test_a_top_p_of_zero_leaves_the_likeliest_token(more: Any) -> None:
    logits = logits_of(1000, 3)
    ids, probs = Sampler(SamplingParams(top_p=0, **more), 1000).candidates(logits)
    assert ids == [int(logits.argmax())] and probs == [1.0]


def test_ids_that_do_not_exist_cannot_be_biased() -> None:
    with pytest.raises(UsageError, match="token 10, but the ids end at 9"):
        Sampler(SamplingParams(logit_bias={3: 1.0, 10: 1.0}), 10)


# each transform is that of transformers


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_that_of_transformers(size: int, penalty: float) -> None:
    logits = logits_of(size, 1)
    ids = [0, size // 2, 0, size - 1]
    wanted = hf().RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[None].clone())[0]
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), size, ids[:2])
    for token in ids[2:]:
        sampler.record(token)
    torch.testing.assert_close(torch.from_numpy(sampler.scores(logits)), wanted, rtol=0, atol=1e-6)


def test_count_penalties_are_those_of_the_openai_formula() -> None:
    logits, counts = logits_of(5, 2), [0, 1, 3, 0, 2]
    sampler = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), 5)
    for token in (2, 1, 4, 2, 4, 2):
        sampler.record(token)
    wanted = [x - 0.25 * c - 0.5 * (c > 0) for x, c in zip(logits.tolist(), counts, strict=True)]
    assert sampler.scores(logits).tolist() == pytest.approx(wanted)


def test_a_tally_grows() -> None:
    tally = Tally([900, 7])
    for token in [*range(500), 7, 900, 900]:
        tally.add(token)
    assert len(tally.ids) == 501
    counts = dict(zip(tally.ids.tolist(), tally.counts.tolist(), strict=True))
    assert counts == {token: 3 if token in (7, 900) else 1 for token in [900, *range(500)]}


SIZES = pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 1000, 5000])
WAYS: list[dict[str, Any]] = [
    *({"top_k": k} for k in (1, 3, 50, 199, 5000)),
    *({"top_p": p} for p in (0.01, 0.5, 0.9, 0.999)),
    *({"min_p": share} for share in (0.001, 0.1, 1.0)),
    {"top_k": 30, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 400, "top_p": 0.99},
    {"top_p": 0.95, "min_p": 0.2},
]


def warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities by the filters of transformers."""
    p, scores, none = hf(), logits[None] / params.temperature, torch.zeros(1, 0, dtype=torch.long)
    if params.top_k:
        scores = p.TopKLogitsWarper(params.top_k)(none, scores)
    if params.top_p < 1:
        scores = p.TopPLogitsWarper(params.top_p)(none, scores)
    if params.min_p:
        scores = p.MinPLogitsWarper(params.min_p)(none, scores)
    result: Tensor = scores[0].softmax(0)
    return result


@SIZES
@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize(("spread", "temperature"), [(3.0, 0.7), (1.0, 1.0), (0.1, 1.5), (9.0, 1.0)])
def test_filters_keep_what_transformers_keeps(
    size: int, how: dict[str, Any], spread: float, temperature: float
) -> None:
    """Whether the likeliest tokens settle it or the whole vocabulary has to be sorted."""
    logits = logits_of(size, size, spread)
    params = SamplingParams(temperature=temperature, **how)
    wanted = warped(logits, params)
    ids, probs = Sampler(params, size).candidates(logits)
    assert ids == wanted.nonzero()[:, 0].tolist()
    torch.testing.assert_close(torch.tensor(probs), wanted[ids], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_the_whole_order_is_that_of_transformers(seed: int) -> None:
    logits = logits_of(300, seed, 4.0)
    prompt = [1, 2, 3, 3]
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
    scores = logits[None].clone()
    p = hf()
    for processor in (
        p.RepetitionPenaltyLogitsProcessor(1.2),
        p.TemperatureLogitsWarper(0.7),
        p.TopKLogitsWarper(40),
        p.TopPLogitsWarper(0.9),
        p.MinPLogitsWarper(0.02),
    ):
        scores = processor(torch.tensor([prompt]), scores)
    wanted = scores[0].softmax(0)
    ids, probs = Sampler(params, 300, prompt).candidates(logits)
    assert ids == wanted.nonzero()[:, 0].tolist()
    torch.testing.assert_close(torch.tensor(probs), wanted[ids])


def test_equal_scores_at_the_limit_of_top_p_go_to_the_lower_ids() -> None:
    for size in (8, 8000):
        kept, _ = Sampler(SamplingParams(top_p=0.5), size).candidates(torch.zeros(size))
        assert kept == list(range(size // 2))
    one = Sampler(SamplingParams(top_k=2), 4)
    assert one.candidates(torch.tensor([1.0, 2.0, 1.0, 0.0]))[0] == [0, 1, 2]


def test_more_equal_scores_than_are_looked_at_are_all_kept() -> None:
    logits = torch.zeros(1000)
    logits[500:] = 1.0
    ids, probs = Sampler(SamplingParams(top_k=3), 1000).candidates(logits)
    assert ids == list(range(500, 1000)) and probs == pytest.approx([1 / 500] * 500)


# choosing


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.zeros(1000)
    logits[[900, 41, 500]] = 2.0
    assert Sampler(SamplingParams(temperature=0), 1000).sample(logits) == 41
    assert Sampler(SamplingParams(temperature=1e-9), 1000).sample(logits) == 41


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1e-3, 1.0, 100.0])
def test_no_temperature_overflows(temperature: float) -> None:
    logits = torch.tensor([6e4, -6e4, 0.0, 5.9e4])
    sampler = Sampler(SamplingParams(temperature=temperature, logit_bias={1: -INF}), 4)
    assert sampler.sample(logits) in {0, 2, 3}
    assert sum(sampler.candidates(logits)[1]) == pytest.approx(1)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(temperature=50, seed=1)])
def test_rows_that_only_pad_are_never_chosen(params: SamplingParams) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 99.0, 99.0])
    sampler = Sampler(params, 3)
    assert {sampler.sample(logits) for _ in range(200)} <= {0, 1, 2}


def test_logits_of_any_dtype_are_taken_and_left_alone() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        logits = torch.tensor([1.0, 3.0, 2.0], dtype=dtype)
        sampler = Sampler(SamplingParams(temperature=0, logit_bias={1: -5.0}), 3)
        assert sampler.sample(logits) == 2
        assert logits.tolist() == [1.0, 3.0, 2.0]


def test_bias_comes_first_and_bans() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    banned = Sampler(SamplingParams(logit_bias={2: -INF, 1: -INF}), 3)
    assert {banned.sample(logits) for _ in range(50)} == {0}
    # 3 - 5 = -2 is negative when the repetition penalty comes, so it is multiplied
    params = SamplingParams(logit_bias={2: -5.0}, repetition_penalty=2.0)
    assert Sampler(params, 3, [2]).scores(logits).tolist() == [1.0, 2.0, -4.0]


def test_repetition_looks_at_prompt_and_answer_and_the_others_at_the_answer() -> None:
    logits = torch.tensor([4.0, 4.0, 4.0])
    repetition = Sampler(SamplingParams(repetition_penalty=2.0), 3, [0, 77])
    repetition.record(1)
    assert repetition.scores(logits).tolist() == [2.0, 2.0, 4.0]
    counting = Sampler(SamplingParams(presence_penalty=1.0, frequency_penalty=0.5), 3, [0])
    counting.record(1)
    counting.record(1)
    counting.record(2)
    assert counting.scores(logits).tolist() == [4.0, 2.0, 2.5]


def test_nothing_left_to_choose_is_said() -> None:
    with pytest.raises(UsageError, match="leave no token"):
        Sampler(SamplingParams(logit_bias={0: -INF, 1: -INF}), 2).sample(torch.zeros(2))


@pytest.mark.parametrize("wrong", [NAN, INF])
def test_logits_that_are_not_numbers_are_an_error(wrong: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(GodwitError, match="not numbers"):
            Sampler(SamplingParams(temperature=temperature), 3).sample(torch.tensor([0.0, wrong, 1.0]))


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = logits_of(500, 3)

    def draw(seed: int | None) -> tuple[list[int], int]:
        sampler = Sampler(SamplingParams(seed=seed, top_p=0.95), 500)
        torch.rand(3)  # other users of random numbers do not matter
        return [sampler.sample(logits) for _ in range(30)], sampler.seed

    first, seed = draw(7)
    assert seed == 7 and draw(7)[0] == first and draw(8)[0] != first
    unseeded, drawn = draw(None)
    assert draw(drawn)[0] == unseeded
    assert draw(None)[1] != drawn


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=1.7),
        SamplingParams(seed=3, top_k=6),
        SamplingParams(seed=4, top_p=0.8, temperature=0.8),
        SamplingParams(seed=5, min_p=0.05, logit_bias={2: 2.0, 4: -INF}),
    ],
)
def test_what_is_drawn_has_the_distribution_that_was_asked_for(params: SamplingParams) -> None:
    logits, draws = logits_of(12, 9, 1.5), 6000
    sampler = Sampler(params, 12)
    # float64 and masks written out once more
    scores = logits.double().clone()
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    probs = (scores / params.temperature).softmax(0)
    order = probs.argsort(descending=True)
    if params.top_k:
        probs[order[params.top_k :]] = 0
    total = 0.0
    for token in order.tolist():
        if total >= params.top_p:
            probs[token] = 0
        total += probs[token].item()
    probs[probs < params.min_p * probs.max()] = 0
    probs /= probs.sum()
    counts = Counter(sampler.sample(logits) for _ in range(draws))
    possible = [token for token in range(12) if probs[token] > 0]
    assert set(counts) <= set(possible)
    square = sum((counts[t] - draws * probs[t].item()) ** 2 / (draws * probs[t].item()) for t in possible)
    freedom = torch.tensor((len(possible) - 1) / 2)
    assert torch.special.gammaincc(freedom, torch.tensor(square / 2)).item() > 1e-3


@pytest.mark.parametrize("how", [{}, {"top_p": 0.95}, {"min_p": 0.01}, {"top_k": 700}], ids=str)
@pytest.mark.parametrize("temperature", [0.8, 3.0])
def test_large_vocabularies_are_drawn_from_evenly(how: dict[str, Any], temperature: float) -> None:
    """Tokens by the share of all probability that lies before them: even in ten parts."""
    logits, draws = logits_of(3000, 4, 2.0), 3000
    params = SamplingParams(temperature=temperature, seed=6, **how)
    probs = warped(logits, params).double()
    middle = probs.cumsum(0) - probs / 2
    sampler = Sampler(params, 3000)
    part = [min(9, int(10 * middle[sampler.sample(logits)].item())) for _ in range(draws)]
    wanted = (
        torch.zeros(10, dtype=torch.float64).index_add(0, (10 * middle).long().clamp(0, 9), probs) * draws
    )
    counts = torch.bincount(torch.tensor(part), minlength=10)
    square = ((counts - wanted) ** 2 / wanted).sum()
    assert torch.special.gammaincc(torch.tensor(4.5), square.float() / 2).item() > 1e-3


@pytest.mark.parametrize("how", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_draws_are_those_of_the_inverse_of_the_distribution(how: dict[str, Any]) -> None:
    """One number of the seed's generator a token, and ids in their order."""
    logits = logits_of(2000, 8)
    params = SamplingParams(seed=11, **how)
    generator = torch.Generator().manual_seed(11)
    cumulative = warped(logits, params).double().cumsum(0)
    sampler = Sampler(params, 2000)
    for _ in range(100):
        point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
        assert sampler.sample(logits) == int((cumulative > point).nonzero()[0])


@pytest.mark.parametrize(("point", "place"), [(0.0, 1), (0.49, 1), (0.5, 3), (0.99, 3), (1.0, 3)])
def test_a_point_on_the_edge_belongs_to_what_follows_and_weights_of_0_have_none(
    point: float, place: int
) -> None:
    assert _place(np.array([0.0, 1.0, 1.0, 2.0, 2.0]), point) == place


def test_what_is_banned_is_never_drawn() -> None:
    banned = {token: -INF for token in range(3000) if token % 512 > 2}
    sampler = Sampler(SamplingParams(temperature=100, seed=0, logit_bias=banned), 3000)
    assert {sampler.sample(logits_of(3000, 1)) for _ in range(300)}.isdisjoint(banned)
