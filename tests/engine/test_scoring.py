"""The probabilities of a prompt's tokens: those of a plain forward pass, however the prompt is read."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from godwit.engine import Engine, GenerationRequest, SamplingParams, TokenLogprobs
from godwit.engine import scoring as module
from godwit.engine.stream import Piece, PromptScored, Started
from godwit.errors import UsageError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.native import pack_model
from tests.engine.steps import Core, Run
from tests.engine.tiny import VOCAB, tiny_model, tiny_tokenizer
from tests.rounding import rounding

IDS = [(i * 37 + 11) % 256 for i in range(75)]
OTHER = [(i * 53 + 7) % 256 for i in range(200)]
PARAMS = SamplingParams(temperature=0, max_tokens=4, logprobs=3)


def scores_of(run: Run) -> tuple[TokenLogprobs | None, ...]:
    (found,) = (event for event in run.events if isinstance(event, PromptScored))
    return found.logprobs


def direct(model: CausalLM, ids: list[int]) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` of a forward pass without caches."""
    with torch.no_grad():
        return model.compute_logits(model(ForwardBatch.packed(torch.tensor(ids), [len(ids)])))[
            :, :VOCAB
        ].log_softmax(-1)


@pytest.mark.parametrize("kind", ["attention", "delta", "hybrid"])
@pytest.mark.parametrize("chunk", [512, 20])
def test_they_are_those_of_a_forward_pass(kind: str, chunk: int) -> None:
    model = tiny_model(kind)
    core = Core(model, chunk_size=chunk)
    run = core.submit(IDS, PARAMS, score_prompt=True)
    core.run()
    first, *others = scores_of(run)
    assert first is None and len(others) == len(IDS) - 1
    limits = rounding(model, lambda other: direct(other, IDS)).tolist()
    assert median(limits) < 0.01  # while the values differ by whole units
    for row, token, one, limit in zip(direct(model, IDS), IDS[1:], others, limits, strict=False):
        assert one is not None and one.token_id == token
        assert one.logprob == pytest.approx(row[token].item(), abs=limit)
        assert [value for _, value in one.top] == pytest.approx(row.topk(3).values.tolist(), abs=limit)
    assert [type(event) for event in run.events[:3]] == [Started, PromptScored, Piece]


@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_with_packed_weights_no_cut_changes_a_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pack_model(tiny_model(family), "q4")
    found = set()
    for chunk, rows in ((512, 32), (20, 32), (33, 7), (1, 1)):
        monkeypatch.setattr(module, "ROWS", rows)
        core = Core(model, chunk_size=chunk)
        runs = [core.submit(IDS, PARAMS, score_prompt=True), core.submit(OTHER, PARAMS)]
        core.run()
        found.add((scores_of(runs[0]), runs[0].text))
    assert len(found) == 1


def test_what_is_cached_is_read_again_and_serves_others() -> None:
    core = Core(pack_model(tiny_model("hybrid"), "q4"))
    first, second, third = (core.submit(IDS, PARAMS, score_prompt=again) for again in (True, True, False))
    core.run()
    assert scores_of(first) == scores_of(second)
    assert first.text == second.text == third.text
    assert first.finish is not None and second.finish is not None and third.finish is not None
    assert second.finish.cached_tokens == 0 and "probabilities" in second.finish.reuse_note
    fourth = core.submit(IDS, PARAMS)
    core.run()
    assert fourth.finish is not None and fourth.finish.cached_tokens == len(IDS)
    assert fourth.events[0] == Started(len(IDS))


def test_who_has_to_make_room_is_scored_once() -> None:
    model = pack_model(tiny_model("hybrid"), "q4")
    free = Core(model)
    wanted = free.submit(OTHER[:60], PARAMS, score_prompt=True)
    free.run()
    core = Core(model, num_blocks=10, chunk_size=16)
    long = SamplingParams(temperature=0, max_tokens=40, logprobs=3, logit_bias={258: -100.0})
    runs = [core.submit(IDS[:60], long, score_prompt=True), core.submit(OTHER[:60], long, score_prompt=True)]
    core.run()
    assert core.scheduler.num_preemptions
    assert scores_of(runs[1]) == scores_of(wanted)
    assert sum(isinstance(event, Started) for event in runs[1].events) == 1


@pytest.mark.parametrize("score", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_an_answer_of_no_tokens_only_reads_the_prompt(score: bool, again: bool) -> None:
    core = Core(tiny_model("hybrid"))
    nothing = SamplingParams(max_tokens=0, logprobs=0)
    if again:
        core.submit(IDS, PARAMS)
        core.run()
    run = core.submit(IDS, nothing, score_prompt=score)
    core.run()
    assert run.finish is not None and run.finish.reason == "length" and run.finish.token_ids == ()
    assert run.text == "" and any(isinstance(event, PromptScored) for event in run.events) == score
    later = core.submit(IDS, PARAMS)
    core.run()
    assert later.finish is not None and later.finish.cached_tokens == len(IDS)


def test_the_shortest_prompt_and_what_makes_no_sense() -> None:
    with Engine(tiny_model("hybrid"), tiny_tokenizer(), max_context=64, debug=True) as engine:
        params = SamplingParams(max_tokens=0, logprobs=0)
        events = list(engine.submit(GenerationRequest((5,), params, score_prompt=True)))
        assert events[:2] == [Started(0), PromptScored((None,))]
        text, finish = engine.submit(GenerationRequest((5,) * 63, params, score_prompt=True)).result()
        assert (text, finish.reason, finish.prefill_tokens) == ("", "length", 63)
        with pytest.raises(UsageError, match="logprobs"):
            engine.submit(GenerationRequest((5,), SamplingParams(), score_prompt=True))


def test_what_was_scored_before_a_preemption_is_not_scored_again() -> None:
    model = tiny_model("attention")
    scores, hidden = module.PromptScores(IDS, VOCAB, 0), torch.randn(40, model.config.hidden_size)
    scores.read(model, 0, hidden[:30])
    once = list(scores.whole())
    scores.read(model, 0, hidden)  # from the start, and further
    assert list(scores.whole())[:31] == once and len(scores.whole()) == 41
