"""What ends an answer, and from where on it may."""

from __future__ import annotations

from typing import Any

import torch

from godwit.engine import Engine, GenerationRequest, SamplingParams
from godwit.engine.ending import Ending
from tests.engine.alone import answer_alone
from tests.engine.tiny import tiny_model, tiny_tokenizer


def test_stop_tokens_are_the_models_and_those_asked_for() -> None:
    assert [Ending(SamplingParams(), {3}, 10).ends(token) for token in (3, 4)] == [True, False]
    both = Ending(SamplingParams(stop_token_ids=(4,)), {3}, 10)
    assert both.ends(3) and both.ends(4)
    own = Ending(SamplingParams(stop_token_ids=(4,), ignore_eos=True), {3}, 10)
    assert not own.ends(3) and own.ends(4)


def test_no_stop_token_comes_too_early() -> None:
    ending = Ending(SamplingParams(min_tokens=2, stop_token_ids=(1, 99)), {3}, 5)
    left = ending.allowed(1, None)
    assert left is not None and left.tolist() == [True, False, True, False, True]
    assert ending.allowed(2, None) is None
    form = torch.tensor([False, True, True, False, False])
    kept = ending.allowed(0, form)
    assert kept is not None and kept.tolist() == [False, False, True, False, False]
    assert form.tolist() == [False, True, True, False, False]


def test_a_form_that_has_ended_ends_the_answer() -> None:
    ending = Ending(SamplingParams(min_tokens=9), {3}, 5)
    only_end = torch.tensor([False, False, False, True, False])
    assert ending.allowed(0, only_end) is only_end


def test_the_engine_ends_an_answer_as_one_alone_ends() -> None:
    model, tokenizer = tiny_model("hybrid"), tiny_tokenizer()
    ids = tuple(tokenizer.encode("Hello"))

    def made(**more: Any) -> tuple[str, tuple[int, ...]]:
        params = SamplingParams(temperature=3.0, seed=5, max_tokens=12, **more)
        alone = answer_alone(model, tokenizer, ids, params, max_context=64)
        _, served = engine.submit(GenerationRequest(ids, params)).result()
        assert alone.reason == served.reason and alone.token_ids == served.token_ids
        return served.reason, served.token_ids

    with Engine(model, tokenizer, max_context=64, max_bytes=16 << 20, max_sequences=2) as engine:
        _, tokens = made(ignore_eos=True)
        fifth = tokens[4]
        reason, cut = made(ignore_eos=True, stop_token_ids=[fifth])
        assert reason == "stop" and cut == tokens[: tokens.index(fifth) + 1]
        _, longer = made(ignore_eos=True, stop_token_ids=[fifth], min_tokens=8)
        assert len(longer) >= 8 and fifth not in longer[:8]
        letters: dict[str, Any] = {"ignore_eos": True, "logit_bias": dict.fromkeys(range(64, 70), 60.0)}
        _, tokens = made(**letters)
        first = tokenizer.decode(tokens[:1])
        assert made(**letters, stop=[first]) == ("stop", tokens[:1])
        _, longer = made(**letters, stop=[first], min_tokens=8)
        assert len(longer) >= 8
