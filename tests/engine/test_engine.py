"""The engine as its users see it: threads, streams, refusals, and the same answers as one alone."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from godwit.config import ModelConfig
from godwit.engine import (
    CacheSize,
    Engine,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
)
from godwit.engine.stream import Event, Finish, Piece, Started, Stream
from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.causal_lm import CausalLM
from godwit.models.native import pack_model
from godwit.text.tokenizer import Tokenizer
from tests.engine.alone import answer_alone, logits_after
from tests.engine.tiny import CONFIGS, VOCAB, tiny_model, tiny_tokenizer, tokenizer_json

TOKENIZER = tiny_tokenizer()
PROMPT = tuple((i * 37 + 11) % 256 for i in range(45))
GREEDY = SamplingParams(temperature=0, max_tokens=20)
LETTERS = {ord(c) - 33: 8.0 for c in "abc"}  # a text of few letters, so that stops nearly match often
ENDLESS = {258: -float("inf")}  # the only stop token
Make = Callable[..., Engine]


def build(family: str, format: str) -> CausalLM:
    if family == "llama":
        model = CausalLM(ModelConfig.from_dict({**CONFIGS["attention"], "model_type": "llama"}))
        model.init_weights(torch.Generator().manual_seed(0))
        return pack_model(model.requires_grad_(False), format)
    return pack_model(tiny_model("hybrid"), format)


MODELS = {
    (family, format): build(family, format) for family in ("llama", "qwen3_next") for format in ("bf16", "q4")
}
ALL = pytest.mark.parametrize("model", MODELS.values(), ids=["-".join(name) for name in MODELS])
HYBRID = MODELS["qwen3_next", "q4"]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes engines; at the end of the test nothing may be lost in any of them."""
    made: list[Engine] = []

    def engine(model: CausalLM = HYBRID, **how: Any) -> Engine:
        defaults: dict[str, Any] = {
            "max_context": 256,
            "max_sequences": 8,
            "debug": True,
            "tokenizer": TOKENIZER,
        }
        made.append(Engine(model, **(defaults | how)))
        return made[-1]

    yield engine
    for one in made:
        one.close()
        one.check_integrity()
        stats = one.stats()
        assert stats.num_running == stats.num_waiting == 0 and stats.free_rows == stats.num_rows
        one.core.runner.index.evict(10**6)
        assert one.stats().free_blocks == stats.num_blocks
        assert not one.health.alive and one.health.last_error is None


def request(ids: tuple[int, ...] = PROMPT, params: SamplingParams = GREEDY, **more: Any) -> GenerationRequest:
    return GenerationRequest(ids, params, **more)


def pieces_of(stream: Stream) -> tuple[list[Piece], Finish]:
    *pieces, finish = (event for event in stream if not isinstance(event, Started))
    assert isinstance(finish, Finish) and all(isinstance(piece, Piece) for piece in pieces)
    return [piece for piece in pieces if isinstance(piece, Piece)], finish


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


# answers


@ALL
def test_answers_are_those_of_one_alone(make: Make, model: CausalLM) -> None:
    engine = make(model, chunk_size=24)
    special: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"stop": ("a", "zz")},
        {"top_k": 5, "logit_bias": LETTERS},
        {"min_p": 0.1},
    ]
    requests = [
        request(
            PROMPT[: 3 + 7 * i], SamplingParams(temperature=float(i % 2), seed=i, max_tokens=5 + 4 * i, **how)
        )
        for i, how in enumerate(special)
    ]
    for _ in range(2):  # the second time nearly all is reused
        answers = [pieces_of(stream) for stream in [engine.submit(one) for one in requests]]
        for asked, (pieces, finish) in zip(requests, answers, strict=True):
            end = answer_alone(model, TOKENIZER, asked.prompt_ids, asked.params)
            assert [p.text for p in pieces if p.text] == end.pieces
            assert (finish.token_ids, finish.reason, finish.stop) == (end.token_ids, end.reason, end.stop)
            assert finish.seed == end.seed and finish.prompt_tokens == len(asked.prompt_ids)
    stats = engine.stats()
    assert stats.cached_tokens > 0 and stats.num_finished == 10
    assert stats.completion_tokens == 2 * sum(len(finish.token_ids) for _, finish in answers)


def test_pytorch_kernels_work_too(make: Make) -> None:
    model = tiny_model("hybrid")
    engine = make(model)
    streams = [engine.submit(request(PROMPT[:length])) for length in (20, 33, 45)]
    for length, stream in zip((20, 33, 45), streams, strict=True):
        end = answer_alone(model, TOKENIZER, PROMPT[:length], GREEDY)
        assert stream.result()[1].token_ids == end.token_ids


def test_a_stop_token_ends_the_answer(make: Make) -> None:
    engine = make(tokenizer=Tokenizer(tokenizer_json(), stop_ids=range(0, 263, 5)))
    pieces, finish = pieces_of(engine.submit(request(params=SamplingParams(seed=1))))
    assert finish.reason == "stop" and finish.token_ids[-1] % 5 == 0
    assert [token for piece in pieces for token in piece.token_ids] == list(finish.token_ids[:-1])


@pytest.mark.parametrize("start", [0, 7, 20])
def test_no_part_of_a_stop_text_is_given_out(make: Make, start: int) -> None:
    engine = make()
    how: dict[str, Any] = {"seed": 5, "max_tokens": 60, "logit_bias": LETTERS, "logprobs": 0}
    whole, _ = engine.submit(request(params=SamplingParams(**how))).result()
    stop = whole[start : start + 4]
    pieces, finish = pieces_of(engine.submit(request(params=SamplingParams(**how, stop=(stop, "@@@")))))
    shown = "".join(piece.text for piece in pieces)
    assert shown == whole[: whole.index(stop)] and (finish.reason, finish.stop) == ("stop", stop)
    tokens = [token for piece in pieces for token in piece.token_ids]
    assert TOKENIZER.decode(tokens) == shown and len(finish.token_ids) > len(tokens)
    assert sum(len(piece.logprobs or ()) for piece in pieces) == len(tokens)


def test_tokens_without_text_come_with_the_end(make: Make) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={257: 1000.0}, logprobs=1)
    pieces, finish = pieces_of(make().submit(request(params=params)))
    assert [(piece.text, piece.token_ids) for piece in pieces] == [("", (257,) * 5)]
    assert finish.token_ids == (257,) * 5


def test_logprobs_are_those_of_the_model_itself(make: Make) -> None:
    params = SamplingParams(seed=3, max_tokens=6, logprobs=4, logit_bias={7: 50.0}, temperature=0.5)
    pieces, finish = pieces_of(make().submit(request(params=params)))
    logprobs = [one for piece in pieces for one in piece.logprobs or ()]
    for index, one in enumerate(logprobs):
        wanted = logits_after(HYBRID, [*PROMPT, *finish.token_ids[:index]])[:VOCAB].log_softmax(0)
        values, ids = wanted.sort(descending=True, stable=True)
        assert one == TokenLogprobs(
            7, wanted[7].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True))[:4]
        )
    assert len(logprobs) == 6


def test_equal_logprobs_come_by_id() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 9.0])
    one = TokenLogprobs.of(logits, 4, 0, 2)
    assert [token for token, _ in one.top] == [1, 2] and TokenLogprobs.of(logits, 4, 0, 0).top == ()
    assert one.logprob == logits[:4].log_softmax(0)[0].item()


@pytest.mark.parametrize("wrong", [-1, 21, 1.0, True, "5"])
def test_logprobs_have_bounds(wrong: Any) -> None:
    with pytest.raises(UsageError, match="logprobs has to be"):
        SamplingParams(logprobs=wrong)


# requests that cannot be


def test_what_makes_no_sense_is_refused_at_once(make: Make) -> None:
    engine = make()
    for ids, message in (
        ((), "the prompt has none"),
        ((5, 272), "outside 0 to 271"),
        ((1,) * 256, "256 tokens and the context 256"),
    ):
        with pytest.raises(UsageError, match=message):
            engine.submit(request(ids))
    with pytest.raises(UsageError, match="boundaries"):
        engine.submit(request(boundaries=(46,)))
    with pytest.raises(UsageError, match="logit_bias names token"):
        engine.submit(request(params=SamplingParams(logit_bias={VOCAB: 1.0})))
    for wrong in ({"max_context": 1}, {"max_context": 5000}, {"chunk_size": 0}, {"max_sequences": 0}):
        with pytest.raises(UsageError):
            make(**wrong)


@ALL
def test_what_can_never_fit_is_refused_with_the_numbers(make: Make, model: CausalLM) -> None:
    size = CacheSize.of(model)
    engine = make(model, max_bytes=size.total(100))
    assert engine.capacity == 112
    with pytest.raises(MemoryBudgetError) as error:
        engine.submit(request(params=SamplingParams(max_tokens=68)))
    mib = f"{8 * size.per_block / 2**20:.2f}"
    assert re.search(
        rf"45 tokens of prompt and 68 of answer take {mib} MiB .* caches have .* for 112 tokens",
        str(error.value),
    )
    assert (
        len(
            engine.submit(request(params=SamplingParams(max_tokens=67, logit_bias=ENDLESS)))
            .result()[1]
            .token_ids
        )
        == 67
    )
    unlimited = SamplingParams(logit_bias=ENDLESS)
    assert len(engine.submit(request(params=unlimited)).result()[1].token_ids) == 67
    with pytest.raises(MemoryBudgetError, match="112 tokens of prompt and 1 of answer"):
        engine.submit(request((1,) * 112, SamplingParams()))


def test_requests_wait_in_order_and_all_are_served(make: Make) -> None:
    size = CacheSize.of(HYBRID)
    engine = make(max_bytes=size.total(100), max_sequences=8)
    order: list[int] = []
    streams = []
    for number in range(5):
        streams.append(engine.submit(request(PROMPT, SamplingParams(seed=number, max_tokens=40))))

        def note(event: Event, number: int = number) -> None:
            if isinstance(event, Finish):
                order.append(number)

        streams[-1].on_event(note)
    until(lambda: len(order) == 5)
    assert order == [0, 1, 2, 3, 4]
    waits = engine.stats()
    assert waits.num_rows == 1 and waits.num_finished == 5


# streams


def test_cancelling_ends_a_stream(make: Make) -> None:
    engine = make(max_context=4096)
    stream = engine.submit(request(params=SamplingParams(logit_bias=ENDLESS)))
    assert next(stream) == Started(0)
    assert isinstance(next(stream), Piece)
    stream.cancel()
    _, finish = pieces_of(stream)
    assert finish.reason == "cancelled" and 1 <= len(finish.token_ids) < 4000
    with pytest.raises(StopIteration):
        next(stream)
    assert engine.stats().num_running == 0


def test_whoever_drops_a_stream_cancels_it(make: Make) -> None:
    engine = make(max_context=4096)
    stream = engine.submit(request(params=SamplingParams(logit_bias=ENDLESS)))
    assert [type(next(stream)) for _ in range(2)] == [Started, Piece]
    del stream
    gc.collect()
    until(lambda: engine.stats().num_finished == 1)
    assert engine.stats().completion_tokens < 4000


def test_a_callback_gets_every_event_and_cancels_by_failing(make: Make) -> None:
    engine = make(max_context=4096)
    events: list[Event] = []
    stream = engine.submit(request())
    until(lambda: engine.stats().num_finished == 1)
    stream.on_event(events.append)
    assert isinstance(events[-1], Finish) and len(events) > 5

    def fail(event: Event) -> None:
        raise ValueError

    failing = engine.submit(request(params=SamplingParams(logit_bias=ENDLESS)))
    failing.on_event(fail)
    until(lambda: engine.stats().num_finished == 2)
    assert engine.stats().completion_tokens < 4000 and engine.health.ok


def test_a_stream_can_be_awaited(make: Make) -> None:
    engine = make()

    async def read(seed: int) -> list[Event]:
        stream = engine.submit(request(params=SamplingParams(seed=seed, max_tokens=10)))
        return [event async for event in stream]

    async def both() -> list[list[Event]]:
        return list(await asyncio.gather(read(1), read(2)))

    for seed, events in enumerate(asyncio.run(both()), 1):
        end = answer_alone(HYBRID, TOKENIZER, PROMPT, SamplingParams(seed=seed, max_tokens=10))
        finish = events[-1]
        assert isinstance(finish, Finish) and finish.token_ids == end.token_ids


def test_waiting_for_an_event_can_end(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    gate = threading.Event()
    step = engine.core.turn
    monkeypatch.setattr(engine.core, "turn", lambda: (gate.wait(), step()))
    stream = engine.submit(request())
    with pytest.raises(TimeoutError):
        stream.next_event(0.01)
    gate.set()
    assert stream.result()[1].reason == "length"


def test_closing_ends_all(make: Make) -> None:
    engine = make(max_context=4096, max_sequences=1)
    endless = SamplingParams(logit_bias=ENDLESS)
    streams = [engine.submit(request(params=endless)) for _ in range(3)]
    assert [type(next(streams[0])) for _ in range(2)] == [Started, Piece]
    engine.close()
    assert [stream.result()[1].reason for stream in streams] == ["cancelled"] * 3
    with pytest.raises(UsageError, match="closed"):
        engine.submit(request())
    engine.close()


def test_clients_never_hang_when_the_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(HYBRID, TOKENIZER, max_context=256)

    def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(engine.core, "turn", broken)
    _, finish = engine.submit(request()).result()
    assert finish.reason == "error" and finish.error == "the engine failed and cannot go on"
    until(lambda: not engine.health.alive)
    assert not engine.health.ok and engine.health.last_error == "RuntimeError: broken"
    with pytest.raises(UsageError, match="closed"):
        engine.submit(request())


def test_a_callback_after_steps_that_fails_does_no_harm(make: Make) -> None:
    engine = make()
    engine.on_turn(lambda: 1 / 0)  # type: ignore[arg-type]
    for _ in range(2):
        assert engine.submit(request()).result()[1].reason == "length"
    assert engine.health.ok and engine.health.failed_steps == 0


def test_health_tells_of_failed_steps(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    runner = engine.core.runner
    with monkeypatch.context() as patch:
        patch.setattr(runner, "admit", lambda *how, **more: 1 / 0)
        for count in (1, 2):
            assert engine.submit(request()).result()[1].reason == "error"
            health = engine.health
            assert (health.alive, health.ok, health.failed_steps, health.num_failures) == (
                True,
                False,
                count,
                count,
            )
            assert health.last_error == "ZeroDivisionError: division by zero"
    assert engine.submit(request()).result()[1].reason == "length"
    until(lambda: engine.health.ok)
    assert engine.health.failed_steps == 0 and engine.health.num_failures == 2
    engine.core.last_error = None


def test_many_clients_come_and_go(make: Make) -> None:
    engine = make(max_bytes=CacheSize.of(HYBRID).total(256, 4), max_sequences=6, chunk_size=40)
    wrong: list[object] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        for turn in range(4):
            ids = (*PROMPT[: rng.randrange(1, 45)], *(rng.randrange(256) for _ in range(rng.randrange(60))))
            stream = engine.submit(request(ids, SamplingParams(seed=turn, max_tokens=rng.randrange(1, 60))))
            if rng.random() < 0.3:
                next(stream)
                continue
            if rng.random() < 0.2:
                engine.check_integrity()
            text, finish = stream.result()
            if finish.reason not in ("stop", "length") or not finish.token_ids:
                wrong.append((text, finish))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert not wrong
    until(lambda: engine.stats().num_finished == 48)


# reuse


def test_boundaries_and_spacing_are_where_a_prompt_can_be_resumed(make: Make) -> None:
    engine = make(max_context=1024, snapshot_spacing=100)
    ids = tuple((i * 31 + i // 7) % 256 for i in range(400))
    engine.submit(request(ids, boundaries=(50, 170, 350, 380, 385))).result()
    cached = []
    for position in (60, 120, 190, 340, 370, 384, 386):
        edited = (*ids[:position], 7, 7, 7)
        _, finish = engine.submit(request(edited)).result()
        cached.append(finish.cached_tokens)
    assert cached == [50, 100, 170, 300, 350, 380, 385]


def test_times_and_counts_add_up(make: Make) -> None:
    began = time.perf_counter()
    _, finish = make(speculate=False).submit(request(priority=3)).result()
    whole = time.perf_counter() - began
    parts = (finish.queue_seconds, finish.prefill_seconds, finish.decode_seconds)
    assert all(part >= 0 for part in parts) and 0 < sum(parts) <= whole
    assert finish.first_token_seconds == finish.queue_seconds + finish.prefill_seconds
    assert (finish.prompt_tokens, finish.cached_tokens, finish.prefill_tokens) == (45, 0, 45)
    assert (finish.drafted, finish.accepted, finish.preemptions, finish.error) == (0, 0, 0, None)
    assert finish.reuse_note == "no text in the cache begins like this"


def test_no_step_ends_close_behind_where_a_prompt_goes_on(make: Make) -> None:
    engine = make(max_context=512)
    known = tuple(range(1, 151))
    engine.submit(request(known, SamplingParams(temperature=0, max_tokens=1))).result()

    def steps(*boundaries: int) -> int:
        before = engine.stats().num_steps
        ids = (*known, *range(len(boundaries), len(boundaries) + 100))
        params = SamplingParams(temperature=0, max_tokens=1)
        finish = engine.submit(request(ids, params, boundaries=boundaries)).result()[1]
        assert finish.cached_tokens == len(known)
        return engine.stats().num_steps - before

    assert steps(151) == steps(20, 151, 160) == 1
    assert steps(150, 220) == 2


def test_the_state_is_kept_at_boundaries_that_lie_apart() -> None:
    with Engine(HYBRID, tiny_tokenizer(), max_bytes=1 << 24) as engine:
        near = (10, 30, 70, 90, 140, 150, 190)
        request = GenerationRequest((1,) * 200, SamplingParams(), near)
        assert [cut for cut in engine._cuts(request) if cut in near] == [10, 70, 140, 150, 190]
