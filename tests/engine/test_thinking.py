"""Thinking: where it is in a text, when it is closed, and that this is the same in any company."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from godwit.engine import Piece, SamplingParams, ThinkingRules
from godwit.engine.scheduler import Sequence
from godwit.engine.stop_matcher import StopMatcher
from godwit.engine.thinking import DEFAULT_MESSAGE, MAX_OVERRUN, ThinkingGuide, shown
from godwit.errors import UsageError
from godwit.models.causal_lm import CausalLM
from godwit.text.tokenizer import Tokenizer
from tests.engine.alone import answer_alone
from tests.engine.speculation.test_speculator import eager
from tests.engine.steps import TOKENIZER, Core, Run
from tests.engine.test_core import ALL, HYBRID, text
from tests.engine.tiny import PADDED, VOCAB

THINK, CLOSE, END = 261, 262, 258


# when it is closed


def think(
    words: str, *, room: int = 1000, tokenizer: Tokenizer = TOKENIZER, **rules: Any
) -> tuple[str, ThinkingGuide]:
    """What comes of an answer that a model would begin with these words, each byte or tag a token."""
    guide = ThinkingGuide(ThinkingRules(**{"opened": True, "message": "Enough.", **rules}), tokenizer, room)
    wanted, decoder, made = iter(tokenizer.encode(words, allow_special=True)), tokenizer.stream(), ""
    for _ in range(room):
        try:
            token = guide.choose(lambda: next(wanted))
        except StopIteration:
            break
        if token in tokenizer.stop_ids:
            guide.stop()
            break
        piece = decoder.push(token)
        guide.push(piece, complete=decoder.complete)
        made += piece
    return made, guide


def test_a_budget_of_nothing_closes_thinking_at_once() -> None:
    made, guide = think("Yes.", budget=0)
    assert made == "Enough.\n</think>\n\nYes." and guide.ended == "budget"
    assert guide.num_tokens == len("Enough.\n")
    made, guide = think("<think>Yes.", budget=0, opened=False)
    assert made == "<think>Enough.\n</think>\n\nYes." and guide.ended == "budget"
    made, _ = think("Yes.", budget=0, message=DEFAULT_MESSAGE)
    assert made.startswith("Considering the limited time by the user, ") and "directly now.\n</think>" in made


def test_a_spent_budget_waits_for_the_end_of_the_line() -> None:
    made, guide = think("one two\nthree four", budget=5)
    assert made == "one two\nEnough.\n</think>\n\nthree four" and guide.ended == "budget"
    assert guide.num_tokens == len("one two\nEnough.\n")
    made, _ = think("one two\nthree", budget=8)
    assert made.startswith("one two\nEnough.")
    made, _ = think("x" * 100, budget=5)
    assert made.startswith("x" * (5 + MAX_OVERRUN) + "\nEnough.\n</think>\n\nx")
    made, _ = think("x" * 100, budget=5, message="")
    assert made.startswith("x" * (5 + MAX_OVERRUN) + "\n</think>\n\nx")
    made, guide = think("one two</think>Yes.", budget=3)
    assert made == "one two</think>Yes." and guide.ended == "model" and guide.num_tokens == 7


@pytest.mark.parametrize("lead", range(4))
def test_no_character_is_cut(lead: int) -> None:
    made, _ = think("x" * lead + "🦙" * 30, budget=2)
    assert "\ufffd" not in made and "🦙\nEnough." in made
    made, _ = think("x" * lead + "🦙" * 80, room=300, bounded=True)
    assert "\ufffd" not in made and "🦙\nEnough." in made


def test_room_is_kept_for_the_answer() -> None:
    made, guide = think("x" * 200, room=100, bounded=True)
    assert made.startswith("x" * 75 + "\nEnough.\n</think>\n\nx") and guide.ended == "reserve"
    made, guide = think("x" * 200, room=60, bounded=True)
    assert made.startswith("x" * 45 + "\n</think>\n\nx") and guide.ended == "reserve"  # no room for words
    made, guide = think("x" * 2000, room=2048 + 100, bounded=True)
    assert made.startswith("x" * (2148 - 512) + "\nEnough.\n</think>\n\n") and guide.ended == "reserve"
    made, guide = think("x" * 200, room=100, bounded=True, reserve=60)
    assert made.startswith("x" * 40 + "\nEnough.\n</think>\n\n")
    made, guide = think("x" * 200, room=100)
    assert made == "x" * 100 and guide.ended is None and guide.num_tokens == 100


def test_an_end_of_text_within_thinking() -> None:
    made, guide = think("hm<|im_end|>Yes.<|im_end|>", bounded=True)
    assert made == "hm\nEnough.\n</think>\n\nYes." and guide.ended == "end_of_text"
    made, guide = think("hm<|im_end|>Yes.", budget=50)
    assert made.endswith("</think>\n\nYes.") and guide.ended == "end_of_text"
    made, guide = think("hm<|im_end|>Yes.")
    assert made == "hm" and guide.ended == "end_of_text" and guide.num_tokens == 2
    made, guide = think("hm</think>Y<|im_end|>es.", bounded=True)
    assert made == "hm</think>Y" and guide.ended == "model"


def test_thinking_that_begins_again_spends_the_same_budget_until_a_call() -> None:
    made, guide = think("one\n</think>\n<think>two\nthree\n</think>Yes.", budget=8)
    assert made == "one\n</think>\n<think>two\nEnough.\n</think>\n\nthree\n</think>Yes."
    assert guide.num_tokens == 8 + len("Enough.\n")
    made, guide = think("one\n</think><think>two\n", budget=4)
    assert made == "one\nEnough.\n</think>\n\n</think><think>\n</think>\n\ntwo\n"
    call = "<tool_call>{}</tool_call>"
    made, guide = think(f"one</think>{call}<think>two\nthree</think>", budget=4)
    assert made == f"one</think>{call}<think>two\nEnough.\n</think>\n\nthree</think>"
    made, guide = think(f"one two three\n</think>{call}<think>four five\n", budget=4)
    assert made.count("Enough.") == 2


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def test_a_call_that_is_only_thought_of_spends_the_budget() -> None:
    made, guide = think(f"a\n{CALL}\nb" + "c" * 99, budget=4, schemas={"f": {}})
    assert made.startswith(f"a\n{CALL}\nb" + "c" * MAX_OVERRUN) and "\nEnough.\n</think>\n\nc" in made
    assert guide.ended == "budget"
    made, guide = think(f"one two\n{CALL}\nno\nthree", budget=9, schemas={"f": {}})
    assert made == f"one two\n{CALL}\nno\nEnough.\n</think>\n\nthree"


def test_a_call_ends_thinking_that_is_not_closed() -> None:
    made, guide = think(f"hm\n{CALL}", budget=5, schemas={"f": {}})
    assert made == f"hm\n{CALL}" and (guide.ended, guide.num_tokens) == ("model", 3)


def test_forced_tokens_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    guide, tokens = ThinkingGuide(ThinkingRules(opened=True, budget=0), tokenizer, 1000), list[int]()
    while guide.forcing:
        tokens.append(guide.choose(lambda: 0))
    assert tokens == tokenizer.encode(f"{DEFAULT_MESSAGE}\n</think>\n\n", allow_special=True)


def test_rules_that_make_no_sense() -> None:
    for wrong in ({"budget": -1}, {"message": "</think>"}, {"message": "x" * 3000}):
        with pytest.raises(UsageError, match="thinking budget"):
            ThinkingRules(**wrong)


def test_stop_texts_are_looked_for_in_the_answer_alone() -> None:
    for pieces in (["a.b</think>\n\n", "c.d"], list("a.b</think>\n\nc.d")):
        guide = ThinkingGuide(ThinkingRules(opened=True), TOKENIZER, 100)
        matcher = StopMatcher([".", "\n\n"])
        text = "".join(shown(guide, matcher, piece, complete=True) for piece in pieces)
        assert text == "a.b</think>\n\nc" and matcher.matched == "."
    guide, matcher = ThinkingGuide(ThinkingRules(), TOKENIZER, 100), StopMatcher(["</tool_call>"])
    assert shown(guide, matcher, "<tool_call>{}</tool_call> x", complete=True) == "<tool_call>{}"


# the same in any company

LINES = {10: 6.0, 32: 8.0, 97: 8.5, 98: 8.0, CLOSE: 5.0, END: 5.0}  # a text of few letters in short lines
RULES = [
    ThinkingRules(opened=True, budget=7, message="Enough."),
    ThinkingRules(opened=True, budget=0, message="No."),
    ThinkingRules(opened=True, bounded=True, message="Now."),
    ThinkingRules(budget=5, message="So."),
    ThinkingRules(opened=True),
]


def params(seed: int, length: int = 50) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=length, logit_bias=LINES, stop=("aab",))


def alone(model: CausalLM, ids: list[int], number: int, length: int = 50) -> tuple[Any, ...]:
    asked = params(number, length)
    end = answer_alone(model, TOKENIZER, ids, asked, max_context=1000, thinking=RULES[number])
    return end.text, end.reason, end.token_ids, end.thinking_tokens, end.thinking_ended


def came(run: Run) -> tuple[Any, ...]:
    end = run.finish
    assert end is not None
    return run.text, end.reason, end.token_ids, end.thinking_tokens, end.thinking_ended


def submit(core: Core, prompts: list[list[int]], length: int = 50) -> list[Run]:
    runs = []
    for number, ids in enumerate(prompts):
        runs.append(core.submit(ids, params(number, length), thinking=RULES[number]))
        core.turn()
    return runs


@ALL
@pytest.mark.parametrize("drafts", [False, True])
def test_company_drafts_and_pieces_change_no_token(model: CausalLM, drafts: bool) -> None:
    prompts = [text(length, length) for length in (20, 1, 45, 33, 16)]
    core = eager(model, chunk_size=19) if drafts else Core(model, chunk_size=19)
    runs = submit(core, prompts)
    core.run()
    assert [came(run) for run in runs] == [alone(model, ids, i) for i, ids in enumerate(prompts)]
    assert {run.finish.thinking_ended for run in runs if run.finish} > {"budget"}
    assert not drafts or core.counts.drafted > 0


def test_nothing_is_drafted_where_the_next_token_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    core, asked = eager(HYBRID), list[bool]()
    assert core.drafter is not None
    propose = core.drafter.propose

    def noting(limits: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        asked.extend(core._generations[seq].foreseen for seq in limits)
        return propose(limits)

    monkeypatch.setattr(core.drafter, "propose", noting)
    run = core.submit(text(20), params(1), thinking=RULES[1])
    core.run()
    assert run.text.startswith("No.\n</think>\n\n") and asked and not any(asked)


@pytest.mark.parametrize("drafts", [False, True])
def test_making_room_changes_no_token(drafts: bool) -> None:
    prompts = [text(length, length) for length in (20, 30, 40)]
    core = eager(HYBRID, num_blocks=9) if drafts else Core(HYBRID, num_blocks=9)
    runs = submit(core, prompts, 70)
    core.run()
    assert core.scheduler.num_preemptions > 0
    assert [came(run) for run in runs] == [alone(HYBRID, ids, i, 70) for i, ids in enumerate(prompts)]


class Endless:
    """A constraint that never lets an answer end."""

    def allowed(self) -> Tensor:
        return torch.arange(VOCAB) != END

    def accept(self, token: int) -> None:
        pass


def test_a_model_that_wants_to_end_within_thinking_closes_it_whatever_the_form() -> None:
    core = Core(HYBRID)
    asked = SamplingParams(temperature=0, max_tokens=60, logit_bias={END: 1000.0})
    run = core.submit(text(20), asked, thinking=RULES[2], constraint=Endless())
    core.run()
    assert run.finish is not None and run.finish.thinking_ended == "end_of_text"
    assert run.text.startswith("Now.\n</think>\n\n") and len(run.made) == 60 and END not in run.made


@ALL
def test_the_next_turn_reuses_forced_tokens(model: CausalLM) -> None:
    core = Core(model)
    first = core.submit(text(40), params(1), thinking=RULES[1])
    core.run()
    assert first.text.startswith("No.\n</think>\n\n")
    known = [*text(40), *first.made]
    again = core.submit([*known, *text(9, 2)], params(2))
    core.run()
    assert again.finish is not None and again.finish.cached_tokens >= len(known) - 16


def test_forced_tokens_have_the_probabilities_that_the_model_gives_them() -> None:
    core = Core(HYBRID)
    asked = SamplingParams(temperature=0, max_tokens=20, logprobs=2)
    run = core.submit(text(30), asked, thinking=RULES[1])
    core.run()
    pieces = [event for event in run.events if isinstance(event, Piece)]
    told = [one for piece in pieces for one in piece.logprobs or ()]
    assert [one.token_id for one in told] == run.made
    assert all(-1e4 < one.logprob <= 0 and len(one.top) == 2 for one in told)
    assert any(one.token_id not in dict(one.top) for one in told[:5])  # the model would have said another


def test_the_vocabulary_is_that_of_these_tests() -> None:
    assert TOKENIZER.token_to_id("<think>") == THINK and TOKENIZER.token_to_id("</think>") == CLOSE
    assert TOKENIZER.stop_ids == {END} and VOCAB < PADDED
