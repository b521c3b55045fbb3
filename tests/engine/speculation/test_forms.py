"""Structured output, tools, thinking and drafts together: drafts change no answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from godwit.cli.reply import parse_reply
from godwit.engine import Engine, GenerationRequest, SamplingParams, ThinkingRules
from godwit.engine.constraint.constraints import Constraints, GrammarConstraint
from godwit.engine.speculation.speculator import MAX_DEPTH, Speculator
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model
from godwit.models.native import pack_model
from godwit.text.tokenizer import Tokenizer
from tests.engine.forms import FLAG, FOLDER, TOOLS, held
from tests.engine.speculation.test_speculator import Eager

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return pack_model(load_model(FOLDER), "q4")


@pytest.fixture
def engines(model: CausalLM, tokenizer: Tokenizer) -> Iterator[tuple[Engine, Engine]]:
    """One without drafts, and one that drafts as much as it can, from both sources."""
    drafter = Speculator(controller=Eager(), max_sequences=64)
    with (
        Engine(model, tokenizer, max_context=1024, debug=True, speculate=False) as plain,
        Engine(
            model, tokenizer, max_context=1024, debug=True, drafter=drafter, max_rollback=MAX_DEPTH
        ) as drafting,
    ):
        yield plain, drafting
        for engine in (plain, drafting):
            engine.check_integrity()


def requests(forms: Constraints, tokenizer: Tokenizer) -> list[GenerationRequest]:
    close = tokenizer.token_to_id("</think>")
    assert close is not None
    short_thoughts = {**dict.fromkeys(tokenizer.stop_ids, 1000.0), close: 14.0}
    greedy, hot = SamplingParams(temperature=0, max_tokens=300), SamplingParams(seed=7, max_tokens=300)
    thinking = SamplingParams(seed=3, max_tokens=400, logit_bias=short_thoughts)
    calls = forms.tool_calls(TOOLS, "auto", otherwise=forms.rule("schema", FLAG), thinking="opened")
    eager = SamplingParams(seed=4, max_tokens=300, logit_bias=dict.fromkeys(tokenizer.stop_ids, 9.0))
    opened: dict[str, Any] = {"opened": True, "message": "That will do."}
    ways: list[tuple[GrammarConstraint | None, SamplingParams, ThinkingRules | None]] = [
        (held(forms, "schema", FLAG), greedy, None),
        (held(forms, "schema", FLAG), hot, None),
        (held(forms, "schema", FLAG, thinking="opened"), thinking, None),
        (calls, thinking, None),
        (forms.tool_calls(TOOLS, "required"), hot, None),
        (held(forms, "regex", "(one two three ){12}"), greedy, None),
        (held(forms, "choice", ["yes", "no"]), hot, None),
        (None, SamplingParams(temperature=0, max_tokens=60), None),
        (held(forms, "schema", FLAG, thinking="opened"), greedy, ThinkingRules(budget=20, **opened)),
        (held(forms, "schema", FLAG, thinking="opened"), eager, ThinkingRules(bounded=True, **opened)),
        (
            forms.tool_calls(TOOLS, "required", thinking="opened"),
            greedy,
            ThinkingRules(bounded=True, **opened),
        ),
        (None, greedy, ThinkingRules(budget=0, **opened)),
    ]
    prompt = tuple(tokenizer.encode_chat([{"role": "user", "content": "one two three, one two three, one"}]))
    return [
        GenerationRequest(prompt, params, constraint=form, thinking=rules) for form, params, rules in ways
    ]


def test_drafts_change_no_answer_of_any_form(
    engines: tuple[Engine, Engine], forms: Constraints, tokenizer: Tokenizer
) -> None:
    answers = []
    for engine in engines:
        streams = [engine.submit(request) for request in requests(forms, tokenizer)]
        results = [stream.result() for stream in streams]
        answers.append([(text, finish.reason, finish.token_ids) for text, finish in results])
        ended = [finish.thinking_ended for _, finish in results[8:]]
        assert ended == ["budget", "end_of_text", "reserve", "budget"]
    assert answers[0] == answers[1]
    for text, reason, _ in answers[1][8:10]:
        assert reason == "stop" and json.loads(text.partition("That will do.\n</think>\n\n")[2]).keys() >= {
            "ok"
        }
    assert parse_reply(answers[1][10][0], thinking=True).calls
    assert "<tool_call>" in answers[1][4][0] and answers[1][5][0] == "one two three " * 12
    stats = engines[1].stats()
    assert stats.drafted > 50 and stats.accepted > 10
