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

from godwit.cli.responder import Responder
from godwit.config import ModelConfig
from godwit.engine import ChatRenderer, Finish, Piece, Prompt, Sampler, SamplingParams
from godwit.engine.speculation.speculator import MAX_DEPTH, Speculator
from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.causal_lm import CausalLM
from godwit.models.generate import generate
from godwit.models.native import pack_model
from godwit.text.chat_template import ChatTemplate
from godwit.text.tokenizer import Tokenizer
from tests.engine.speculation.test_speculator import Eager
from tests.engine.tiny import CONFIGS, VOCAB, masked_argmax, tiny_model, tiny_tokenizer, tokenizer_json

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPT = [(i * 37 + 11) % 256 for i in range(45)]
#: As Qwen's templates do: thinking is opened in the prompt, and that of earlier turns is left out.
THINKING = """
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
"""
Make = Callable[..., Responder]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def packed_llama() -> CausalLM:
    model = CausalLM(ModelConfig.from_dict({**CONFIGS["attention"], "model_type": "llama"}))
    model.init_weights(torch.Generator().manual_seed(0))
    return pack_model(model.requires_grad_(False), "bf16")


@pytest.fixture(scope="module")
def models() -> dict[str, CausalLM]:
    """Models in float32 on PyTorch, and packed ones, with which the engine speculates."""
    plain = {kind: tiny_model(kind) for kind in CONFIGS}
    return plain | {"packed hybrid": pack_model(tiny_model("hybrid"), "bf16"), "packed llama": packed_llama()}


KINDS = [*CONFIGS, "packed hybrid", "packed llama"]
EXACT = {"attention": False, "packed llama": False}  # what is reused ends with a block of 16 tokens


@pytest.fixture
def make(models: dict[str, CausalLM], tokenizer: Tokenizer) -> Iterator[Make]:
    """Makes responders; at the end of the test nothing may be lost in any of them."""
    made: list[Responder] = []

    def responder(kind: str = "hybrid", max_context: int | None = 256, **kwargs: Any) -> Responder:
        arguments: dict[str, Any] = {
            "tokenizer": tokenizer,
            "model": models[kind],
            "max_context": max_context,
        } | kwargs
        made.append(Responder(**arguments))
        return made[-1]

    yield responder
    for one in made:
        one.close()
        one.engine.check_integrity()
        stats = one.engine.stats()
        assert stats.num_running == stats.num_waiting == 0 and stats.free_rows == stats.num_rows == 1
        one.engine.core.runner.index.evict(10**6)
        assert one.engine.stats().free_blocks == stats.num_blocks


def finish_of(events: Iterator[Piece | Finish]) -> Finish:
    *_, finish = events
    assert isinstance(finish, Finish)
    return finish


def text_of(events: Iterator[Piece | Finish]) -> tuple[str, Finish]:
    *pieces, finish = events
    assert isinstance(finish, Finish) and all(isinstance(piece, Piece) and piece.text for piece in pieces)
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), finish


def answer(
    responder: Responder, ids: list[int], params: SamplingParams = GREEDY, **how: Any
) -> Iterator[Piece | Finish]:
    return responder.answer(Prompt(tuple(ids)), params, **how)


_NAIVE: dict[tuple[int, tuple[int, ...], int], list[int]] = {}


def naive(model: CausalLM, ids: list[int], count: int = 24) -> list[int]:
    key = id(model), tuple(ids), count
    if key not in _NAIVE:
        _NAIVE[key] = generate(model, ids, max_tokens=count, pick=masked_argmax, stop_ids={258})
    return _NAIVE[key]


def reusable(kind: str, count: int) -> int:
    return count if EXACT.get(kind, True) else count // 16 * 16


def eager_speculator() -> Speculator:
    return Speculator(controller=Eager(MAX_DEPTH))


# the oracle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_greedy_is_what_naive_generation_gives(make: Make, kind: str, chunk: int) -> None:
    responder = make(kind, chunk_size=chunk)
    finish = finish_of(answer(responder, PROMPT))
    wanted = naive(responder.engine.model, PROMPT)
    assert list(finish.token_ids) == wanted and len(set(wanted)) > 5
    assert (finish.reason, finish.prompt_tokens, finish.cached_tokens) == ("length", 45, 0)
    assert finish.completion_tokens == 24 and finish.prefill_tokens == 45
    assert finish.decode_tokens_per_second and finish.prefill_tokens_per_second


@pytest.mark.parametrize("kind", ["packed hybrid", "packed llama"])
def test_speculation_changes_no_token(
    make: Make, models: dict[str, CausalLM], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dict.fromkeys((64, 65), 20.0)  # an answer of two letters, in which there is much to look up
    params = SamplingParams(temperature=0, max_tokens=24, logit_bias=few)
    with monkeypatch.context() as patch:
        patch.setattr("godwit.engine.engine.Speculator", eager_speculator)
        guessing = make(kind)
    finish = finish_of(answer(guessing, PROMPT, params))
    assert guessing.engine.settings.max_rollback and finish.drafted > 0
    plain = make(kind, speculate=False)
    assert plain.engine.settings.max_rollback == 0
    assert finish_of(answer(plain, PROMPT, params)).token_ids == finish.token_ids
    bias = torch.zeros(VOCAB).index_fill(0, torch.tensor([*few]), 20.0)
    wanted = generate(
        models[kind], PROMPT, max_tokens=24, pick=lambda logits: int((logits[:VOCAB] + bias).argmax())
    )
    assert list(finish.token_ids) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_turns_reuse_what_is_cached_and_stay_right(make: Make, kind: str) -> None:
    responder = make(kind)
    ids = list(PROMPT)
    cached = 0
    for turn in range(4):
        finish = finish_of(answer(responder, ids, SamplingParams(temperature=0, max_tokens=20)))
        assert finish.cached_tokens == reusable(kind, cached)
        assert list(finish.token_ids) == naive(responder.engine.model, ids, 20)
        cached = len(ids) + len(finish.token_ids) - 1  # the last token has not been needed yet
        ids += [*finish.token_ids, 10 + turn, 99]
    assert cached > 120


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_departs_is_read_again(make: Make, kind: str) -> None:
    responder = make(kind)
    finish_of(answer(responder, PROMPT))
    other = [*PROMPT[:20], 7, 7, 7]
    finish = finish_of(answer(responder, other))
    assert finish.cached_tokens == (16 if kind in EXACT else 0)
    assert list(finish.token_ids) == naive(responder.engine.model, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_gives_the_same_answer(make: Make, kind: str) -> None:
    responder = make(kind)
    first = finish_of(answer(responder, PROMPT))
    again = finish_of(answer(responder, PROMPT))
    assert again.token_ids == first.token_ids
    assert again.cached_tokens == (32 if kind in EXACT else 45)
    responder.forget()
    assert finish_of(answer(responder, PROMPT)).cached_tokens == 0


def test_a_turn_of_a_thinking_hybrid_reuses_the_turns_before(make: Make) -> None:
    tokenizer = Tokenizer(tokenizer_json(), chat_template=ChatTemplate(THINKING), stop_tokens=("<|im_end|>",))
    responder = make(tokenizer=tokenizer, max_context=2048)
    renderer = ChatRenderer(tokenizer)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind. " * 60}]
    shared = 0
    for turn in range(3):
        messages.append({"role": "user", "content": f"{turn}? " * 15})
        prompt = renderer.prompt(messages)
        assert prompt.thinking
        finish = finish_of(responder.answer(prompt, SamplingParams(temperature=0, max_tokens=6)))
        assert finish.cached_tokens == shared
        assert list(finish.token_ids) == naive(responder.engine.model, list(prompt.ids), 6)
        shared = len(prompt.ids) - len("<think>\n") + len("think>")  # <think> is one token
        messages.append({"role": "assistant", "content": "Yes."})
    assert shared > 600


def test_progress_tells_what_is_left_to_read(make: Make) -> None:
    responder = make(chunk_size=8)
    steps: list[tuple[int, int]] = []
    finish_of(answer(responder, PROMPT[:20], progress=lambda done, total: steps.append((done, total))))
    assert steps == [(8, 20), (16, 20)]
    steps.clear()
    longer = [*PROMPT[:20], *finish_of(answer(responder, PROMPT[:20])).token_ids, *PROMPT[20:40]]
    finish = finish_of(answer(responder, longer, progress=lambda done, total: steps.append((done, total))))
    assert steps == [(8, 21), (16, 21)] and finish.cached_tokens == len(longer) - 21


def test_nothing_is_kept_for_a_single_prompt(make: Make) -> None:
    responder = make(reuse=False)
    first = finish_of(answer(responder, PROMPT))
    assert responder.engine.stats().num_snapshots == 0 and first.cached_tokens == 0
    assert list(first.token_ids) == naive(responder.engine.model, PROMPT)


# ends


def test_a_stop_token_ends_the_answer_and_is_not_shown(make: Make, models: dict[str, CausalLM]) -> None:
    wanted = naive(models["hybrid"], PROMPT)
    token = wanted[9]
    stopping = Tokenizer(tokenizer_json(), stop_ids=[token])
    text, finish = text_of(answer(make(tokenizer=stopping), PROMPT))
    made = wanted[: wanted.index(token) + 1]
    assert list(finish.token_ids) == made and finish.reason == "stop" and finish.stop is None
    assert text == stopping.decode(made[:-1])


def test_special_tokens_are_shown_only_where_they_are_wanted(make: Make) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={257: 1000.0})
    text, finish = text_of(answer(make(), PROMPT, params))
    assert finish.token_ids == (257,) * 5 and text == ""
    text, _ = text_of(answer(make(), PROMPT, params, shown_ids=frozenset({257})))
    assert text == "<|im_start|>" * 5


def test_stop_texts_are_never_shown(make: Make) -> None:
    bias = {ord(c) - 33: 8.0 for c in "abc"}  # a text of few letters, so that stops nearly match often
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=60, logit_bias=bias)
    whole, _ = text_of(answer(make(), PROMPT, params))
    for start in (0, 7, 20):
        stop = whole[start : start + 4]
        stopping = SamplingParams(temperature=1.0, seed=5, max_tokens=60, logit_bias=bias, stop=(stop, "@@@"))
        text, finish = text_of(answer(make(), PROMPT, stopping))
        assert text == whole[: whole.index(stop)]
        assert (finish.reason, finish.stop) == ("stop", stop)
    missed = SamplingParams(temperature=1.0, seed=5, max_tokens=60, logit_bias=bias, stop=(whole[-3:] + "@",))
    assert text_of(answer(make(), PROMPT, missed))[0] == whole


def test_characters_come_whole(make: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([*tokenizer.encode("a\u2603b\u2603")[:-1], 258])
    monkeypatch.setattr(Sampler, "sample", lambda self, logits, allowed: next(script))
    events = list(answer(make(), PROMPT))
    assert [event.text for event in events if isinstance(event, Piece)] == ["a", "\u2603", "b", "\ufffd"]


def test_the_context_is_a_limit(make: Make) -> None:
    responder = make(max_context=50)
    finish = finish_of(answer(responder, PROMPT))
    assert (finish.reason, finish.completion_tokens) == ("length", 5)
    for length in (50, 51):
        with pytest.raises(UsageError, match=f"{length} tokens and the context 50, which leaves no room"):
            next(answer(responder, [1] * length))
    assert finish_of(answer(responder, [1] * 49)).completion_tokens == 1


def test_a_talk_may_go_on_to_the_end_of_the_context(make: Make) -> None:
    responder = make(max_context=80)
    ids = list(PROMPT)
    params = SamplingParams(temperature=0, max_tokens=10)
    while len(ids) < 80:
        finish = finish_of(answer(responder, ids, params))
        assert list(finish.token_ids) == naive(responder.engine.model, ids, min(10, 80 - len(ids)))
        ids += finish.token_ids
    assert finish.reason == "length" and len(ids) == 80


def test_what_cannot_be_read_is_refused_before_anything_happens(make: Make) -> None:
    responder = make()
    first = finish_of(answer(responder, PROMPT))
    for ids in ([], [-1], [5, 272]):
        with pytest.raises(UsageError):
            next(answer(responder, ids))
    with pytest.raises(UsageError, match="logit_bias names token 263"):
        next(answer(responder, PROMPT, SamplingParams(logit_bias={VOCAB: 1.0})))
    again = finish_of(answer(responder, [*PROMPT, *first.token_ids]))
    assert again.cached_tokens == len(PROMPT) + len(first.token_ids) - 1


def test_responders_that_cannot_be(make: Make) -> None:
    for wrong in ({"max_context": 1}, {"max_context": 5000}, {"chunk_size": 0}):
        with pytest.raises(UsageError):
            make(**wrong)
    with pytest.raises(MemoryBudgetError, match=r"256 tokens .* but 0\.0 MiB may be used"):
        make(max_bytes=1000)
    assert make(max_context=None).max_context == 4096


def test_memory_is_shared_between_the_context_and_what_is_kept(make: Make) -> None:
    needed = make().engine.size.total(256)
    tight = make(max_bytes=needed + 10)
    finish = finish_of(answer(tight, PROMPT))
    assert list(finish.token_ids) == naive(tight.engine.model, PROMPT)
    assert tight.engine.settings.snapshot_bytes == 5 and tight.engine.capacity == 256
    assert make(max_bytes=needed + (1 << 20)).engine.settings.snapshot_bytes == 1 << 19


# breaking off


def test_dropping_the_iterator_leaves_the_responder_usable(make: Make) -> None:
    for taken in range(4):
        responder = make()
        events = answer(responder, PROMPT)
        for _ in range(taken):
            next(events)
        events.close()  # type: ignore[attr-defined]
        finish = finish_of(answer(responder, PROMPT))
        assert list(finish.token_ids) == naive(responder.engine.model, PROMPT)


class Paced:
    """Lets an engine take its steps one by one."""

    def __init__(self, responder: Responder, monkeypatch: pytest.MonkeyPatch) -> None:
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        core, turn = responder.engine.core, responder.engine.core.turn
        self._free = threading.Event()

        def paced() -> None:
            if not self._free.is_set():
                self._permits.get()
            turn()

        monkeypatch.setattr(core, "turn", paced)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._permits.put(None)

    def release(self) -> None:
        self._free.set()
        self._permits.put(None)


def test_cancelling_ends_the_answer_and_keeps_the_cache(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    responder = make()
    pace = Paced(responder, monkeypatch)
    wanted = naive(responder.engine.model, PROMPT)
    events = answer(responder, PROMPT)
    pace.step(12)
    next(events)
    responder.cancel()
    pace.release()
    finish = finish_of(events)
    assert finish.reason == "cancelled" and 0 < finish.completion_tokens < 24
    assert list(finish.token_ids) == wanted[: finish.completion_tokens]
    ids = [*PROMPT, *finish.token_ids]
    following = finish_of(answer(responder, ids))
    assert following.cached_tokens == len(ids) - 1
    assert list(following.token_ids)[:12] == naive(responder.engine.model, ids)[:12]


def test_cancelling_while_the_prompt_is_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    responder = make(chunk_size=10)
    pace = Paced(responder, monkeypatch)

    def stop(done: int, total: int) -> None:
        responder.cancel()
        pace.release()

    pace.step()
    finish = finish_of(answer(responder, PROMPT, progress=stop))
    assert (finish.reason, finish.token_ids) == ("cancelled", ())
    finish = finish_of(answer(responder, PROMPT))
    assert finish.cached_tokens == 10 and list(finish.token_ids) == naive(responder.engine.model, PROMPT)


def test_cancelling_nothing_is_harmless(make: Make) -> None:
    responder = make()
    responder.cancel()
    finish_of(answer(responder, PROMPT))
    responder.cancel()
    assert finish_of(answer(responder, PROMPT)).reason == "length"


def test_an_interrupt_while_waiting_leaves_the_responder_usable(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    responder = make()
    core, turn = responder.engine.core, responder.engine.core.turn

    def interrupted() -> None:
        monkeypatch.setattr(core, "turn", turn)
        os.kill(os.getpid(), signal.SIGINT)
        turn()

    monkeypatch.setattr(core, "turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(answer(responder, PROMPT))
    finish = finish_of(answer(responder, PROMPT))
    assert list(finish.token_ids) == naive(responder.engine.model, PROMPT)


@pytest.mark.parametrize(
    ("step", "fault"), [(1, RuntimeError("broken")), (2, MemoryError()), (9, UsageError("no"))]
)
def test_a_fault_of_the_engine_comes_out_here_and_costs_only_the_cache(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    step: int,
    fault: Exception,
) -> None:
    responder = make(chunk_size=40, speculate=False)
    calls = 0

    def faulty(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            raise fault
        return original(*args)

    layer = responder.engine.model.layers[2]
    original = layer.forward
    monkeypatch.setattr(layer, "forward", faulty)
    with pytest.raises(type(fault)) as caught:
        list(answer(responder, PROMPT))
    assert caught.value is fault
    finish = finish_of(answer(responder, PROMPT))
    assert finish.cached_tokens == 0 and list(finish.token_ids) == naive(responder.engine.model, PROMPT)


# sampling


def test_a_seed_repeats_an_answer_and_a_drawn_one_is_reported(make: Make) -> None:
    first = finish_of(answer(make(), PROMPT, SamplingParams(max_tokens=20)))
    again = finish_of(answer(make(), PROMPT, SamplingParams(max_tokens=20, seed=first.seed)))
    assert again.token_ids == first.token_ids and again.seed == first.seed
    assert finish_of(answer(make(), PROMPT, SamplingParams(max_tokens=20))).token_ids != first.token_ids


def test_rows_without_a_token_are_never_chosen(make: Make) -> None:
    model = tiny_model("attention")
    model.head_weight[VOCAB:] = model.head_weight[:VOCAB].abs().amax() * 100
    for params in (GREEDY, SamplingParams(seed=1, max_tokens=40, temperature=3.0)):
        finish = finish_of(answer(make(model=model), PROMPT, params))
        assert max(finish.token_ids) < VOCAB


def test_penalties_see_the_answer_grow(make: Make) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, logit_bias={7: 30.0}, frequency_penalty=2.0)
    ids = finish_of(answer(make(), PROMPT, params)).token_ids
    assert ids[0] == 7 and 1 < ids.count(7) < 30


def test_bfloat16_works(make: Make) -> None:
    model = tiny_model("hybrid").to(torch.bfloat16)
    finish = finish_of(answer(make(model=model), PROMPT))
    assert finish.completion_tokens == 24
