"""The terminal's engine: the answers of naive generation, reuse from turn to turn, and what breaks it off."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from godwit.chat_template import ChatTemplate
from godwit.cli.responder import Responder
from godwit.config import ModelConfig
from godwit.engine import ChatRenderer, Finish, Piece, Prompt, Sampler, SamplingParams
from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.causal_lm import CausalLM
from godwit.models.generate import generate
from godwit.models.native import pack_model
from godwit.tokenizer import Tokenizer
from tests.engine.tiny import CONFIGS, VOCAB, masked_argmax, tiny_model, tiny_tokenizer, tokenizer_json

GREEDY = SamplingParams(temperature=0, max_tokens=40)
PROMPT = [(i * 37 + 11) % 256 for i in range(45)]
Make = Callable[..., Session]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def models() -> dict[str, CausalLM]:
    return {kind: tiny_model(kind) for kind in CONFIGS}


@pytest.fixture
def make(models: dict[str, CausalLM], tokenizer: Tokenizer) -> Iterator[Make]:
    """Makes sessions; at the end of the test the books of all have to balance."""
    made: list[Session] = []

    def session(kind: str = "hybrid", max_context: int = 256, **kwargs: Any) -> Session:
        arguments: dict[str, Any] = {
            "tokenizer": tokenizer,
            "model": models[kind],
            "max_context": max_context,
        } | kwargs
        made.append(Session(**arguments))
        return made[-1]

    yield session
    for one in made:
        one.cache.check_integrity()
        one.reset()
        one.cache.check_integrity()
        assert one.cache.blocks.num_free == one.cache.blocks.num_blocks


def finish_of(events: Iterator[Event]) -> Finish:
    *_, finish = events
    assert isinstance(finish, Finish)
    return finish


def text_of(events: Iterator[Event]) -> tuple[str, Finish]:
    *pieces, finish = events
    assert isinstance(finish, Finish) and all(isinstance(piece, Piece) and piece.text for piece in pieces)
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), finish


def naive(model: CausalLM, ids: list[int], count: int = 40) -> list[int]:
    return generate(model, ids, max_tokens=count, pick=masked_argmax, stop_ids={258})


# the oracle


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_greedy_is_what_naive_generation_gives(make: Make, kind: str, chunk: int) -> None:
    session = make(kind, chunk_size=chunk)
    finish = finish_of(session.stream(PROMPT, GREEDY))
    wanted = naive(session.model, PROMPT)
    assert list(finish.token_ids) == wanted and len(set(wanted)) > 5
    assert (finish.reason, finish.prompt_tokens, finish.cached_tokens) == ("length", 45, 0)
    assert finish.completion_tokens == 40 and finish.prefill_tokens == 45
    assert session.num_cached == 84  # the last token has not been needed yet


@pytest.mark.parametrize("kind", CONFIGS)
def test_turns_reuse_what_is_cached_and_stay_right(make: Make, kind: str) -> None:
    session = make(kind)
    ids = list(PROMPT)
    cached = 0
    for turn in range(4):
        finish = finish_of(session.stream(ids, GREEDY))
        assert finish.cached_tokens == cached
        assert list(finish.token_ids) == naive(session.model, ids)
        cached = session.num_cached
        ids += [*finish.token_ids, 10 + turn, 99]
    assert cached > 200 - 45


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prompt_that_departs_is_read_again(make: Make, kind: str) -> None:
    session = make(kind)
    finish_of(session.stream(PROMPT, GREEDY))
    other = [*PROMPT[:20], 7, 7, 7]
    finish = finish_of(session.stream(other, GREEDY))
    assert finish.cached_tokens == (20 if kind == "attention" else 0)
    assert list(finish.token_ids) == naive(session.model, other)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_prompt_gives_the_same_answer(make: Make, kind: str) -> None:
    session = make(kind)
    first = finish_of(session.stream(PROMPT, GREEDY))
    again = finish_of(session.stream(PROMPT, GREEDY))
    assert again.token_ids == first.token_ids
    assert again.cached_tokens == (44 if kind == "attention" else 0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_feeding_ahead(make: Make, kind: str) -> None:
    session = make(kind, chunk_size=8)
    steps: list[tuple[int, int]] = []
    first = session.feed(PROMPT[:20], lambda done, total: steps.append((done, total)))
    assert (first.num_tokens, first.num_cached) == (20, 0)
    assert steps == [(8, 20), (16, 20), (20, 20)]
    assert session.feed(PROMPT).num_cached == 20
    assert session.feed(PROMPT).num_cached == 45
    finish = finish_of(session.stream(PROMPT, GREEDY))
    assert finish.cached_tokens == 45 and finish.prefill_tokens_per_second is None
    assert list(finish.token_ids) == naive(session.model, PROMPT)


# ends


def test_a_stop_token_ends_the_answer_and_is_not_shown(make: Make, models: dict[str, CausalLM]) -> None:
    wanted = naive(models["hybrid"], PROMPT)
    token = wanted[9]
    stopping = Tokenizer(tokenizer_json(), stop_ids=[token])
    text, finish = text_of(make(tokenizer=stopping).stream(PROMPT, GREEDY))
    made = wanted[: wanted.index(token) + 1]
    assert list(finish.token_ids) == made and finish.reason == "stop" and finish.stop is None
    assert text == stopping.decode(made[:-1])


def test_special_tokens_are_not_shown(make: Make) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={257: 1000.0})
    text, finish = text_of(make().stream(PROMPT, params))
    assert finish.token_ids == (257,) * 5 and text == ""


def test_stop_texts_are_never_shown(make: Make, tokenizer: Tokenizer) -> None:
    bias = {ord(c) - 33: 8.0 for c in "abc"}  # a text of few letters, so that stops nearly match often
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=60, logit_bias=bias)
    whole, _ = text_of(make().stream(PROMPT, params))
    for start in (0, 7, 20):
        stop = whole[start : start + 4]
        stopping = SamplingParams(temperature=1.0, seed=5, max_tokens=60, logit_bias=bias, stop=(stop, "@@@"))
        text, finish = text_of(make().stream(PROMPT, stopping))
        assert text == whole[: whole.index(stop)]
        assert (finish.reason, finish.stop) == ("stop", stop)
    missed = SamplingParams(temperature=1.0, seed=5, max_tokens=60, logit_bias=bias, stop=(whole[-3:] + "@",))
    assert text_of(make().stream(PROMPT, missed))[0] == whole


def test_characters_come_whole(make: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([*tokenizer.encode("a\u2603b\u2603")[:-1], 258])
    monkeypatch.setattr(Sampler, "sample", lambda self, logits, allowed: next(script))
    events = list(make().stream(PROMPT, GREEDY))
    assert [event.text for event in events if isinstance(event, Piece)] == ["a", "\u2603", "b", "\ufffd"]


def test_the_context_is_a_limit(make: Make) -> None:
    session = make(max_context=50)
    finish = finish_of(session.stream(PROMPT, GREEDY))
    assert (finish.reason, finish.completion_tokens) == ("length", 5)
    with pytest.raises(UsageError, match="50 tokens fills the whole context"):
        session.stream([1] * 50)
    with pytest.raises(UsageError, match="51 tokens and the context only 50"):
        session.stream([1] * 51)
    assert finish_of(session.stream([1] * 49, GREEDY)).completion_tokens == 1


def test_what_cannot_be_read_is_refused_before_anything_happens(make: Make) -> None:
    session = make()
    finish_of(session.stream(PROMPT, GREEDY))
    cached = session.num_cached
    for ids in ([], [-1], [5, 272]):
        with pytest.raises(UsageError):
            session.stream(ids)
        with pytest.raises(UsageError):
            session.feed(ids)
    with pytest.raises(UsageError, match="logit_bias names token 263"):
        session.stream(PROMPT, SamplingParams(logit_bias={VOCAB: 1.0}))
    assert session.num_cached == cached


def test_sessions_that_cannot_be(make: Make) -> None:
    for wrong in ({"max_context": 1}, {"max_context": 5000}, {"chunk_size": 0}):
        with pytest.raises(UsageError):
            make(**wrong)
    with pytest.raises(MemoryBudgetError, match=r"256 tokens .* but 0\.0 MiB may be used"):
        make(max_bytes=1000)
    assert make(max_context=None).max_context == 4096


# breaking off


def test_dropping_the_iterator_leaves_the_session_usable(make: Make) -> None:
    for taken in range(4):
        session = make()
        events = session.stream(PROMPT, GREEDY)
        for _ in range(taken):
            next(events)
        events.close()  # type: ignore[attr-defined]
        finish = finish_of(session.stream(PROMPT, GREEDY))
        assert list(finish.token_ids) == naive(session.model, PROMPT)


def test_cancelling_ends_the_answer_and_keeps_the_cache(make: Make) -> None:
    session = make()
    wanted = naive(session.model, PROMPT)
    events = session.stream(PROMPT, GREEDY)
    next(events)
    session.cancel()
    finish = finish_of(events)
    assert finish.reason == "cancelled" and list(finish.token_ids) == wanted[: finish.completion_tokens]
    ids = [*PROMPT, *finish.token_ids]
    following = finish_of(session.stream(ids, GREEDY))
    assert following.cached_tokens == len(ids) - 1
    assert list(following.token_ids)[:20] == naive(session.model, ids)[:20]


def test_cancelling_while_the_prompt_is_read(make: Make) -> None:
    session = make(chunk_size=10)
    finish = finish_of(session.stream(PROMPT, GREEDY, progress=lambda done, total: session.cancel()))
    assert (finish.reason, finish.token_ids, finish.prefill_tokens) == ("cancelled", (), 10)
    finish = finish_of(session.stream(PROMPT, GREEDY))
    assert finish.cached_tokens == 10 and list(finish.token_ids) == naive(session.model, PROMPT)


@pytest.mark.parametrize("step", [1, 2, 9])
def test_an_interrupt_inside_the_model_costs_only_the_cache(
    make: Make, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    session = make(chunk_size=40)
    calls = 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        return original(*args)

    layer = session.model.layers[2]
    original = layer.forward
    monkeypatch.setattr(layer, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.stream(PROMPT, GREEDY))
    session.cache.check_integrity()
    finish = finish_of(session.stream(PROMPT, GREEDY))
    assert finish.cached_tokens == 0 and list(finish.token_ids) == naive(session.model, PROMPT)


def test_an_answer_cannot_go_on_after_the_next_has_begun(make: Make) -> None:
    session = make()
    for disturb in (lambda: session.stream(PROMPT), lambda: session.feed(PROMPT[:3]), session.reset):
        events = session.stream(PROMPT, GREEDY)
        next(events)
        disturb()
        with pytest.raises(UsageError, match="another one has begun"):
            list(events)
    assert list(finish_of(session.stream(PROMPT, GREEDY)).token_ids) == naive(session.model, PROMPT)


# sampling


def test_a_seed_repeats_an_answer_and_a_drawn_one_is_reported(make: Make) -> None:
    first = finish_of(make().stream(PROMPT, SamplingParams(max_tokens=20)))
    again = finish_of(make().stream(PROMPT, SamplingParams(max_tokens=20, seed=first.seed)))
    assert again.token_ids == first.token_ids and again.seed == first.seed
    assert finish_of(make().stream(PROMPT, SamplingParams(max_tokens=20))).token_ids != first.token_ids


def test_rows_without_a_token_are_never_chosen(make: Make, tokenizer: Tokenizer) -> None:
    model = tiny_model("attention")
    model.head_weight[VOCAB:] = model.head_weight[:VOCAB].abs().amax() * 100
    for params in (GREEDY, SamplingParams(seed=1, max_tokens=40, temperature=3.0)):
        finish = finish_of(make(model=model).stream(PROMPT, params))
        assert max(finish.token_ids) < VOCAB


def test_penalties_see_the_answer_grow(make: Make) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, logit_bias={7: 30.0}, frequency_penalty=2.0)
    ids = finish_of(make().stream(PROMPT, params)).token_ids
    assert ids[0] == 7 and 1 < ids.count(7) < 30


def test_bfloat16_works(make: Make) -> None:
    model = tiny_model("hybrid").to(torch.bfloat16)
    finish = finish_of(make(model=model).stream(PROMPT, GREEDY))
    assert finish.completion_tokens == 40
    assert finish.decode_tokens_per_second and finish.prefill_tokens_per_second
