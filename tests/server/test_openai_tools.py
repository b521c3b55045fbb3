"""Tools through OpenAI's real client: the forms of calls of several families, and forced calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from godwit.cli import common
from godwit.engine import Engine
from tests.engine.tiny import TEMPLATE, write_chain_model
from tests.server.conftest import Running, running
from tests.server.openai_steps import HELLO, TOOL, client_of

CITY = {"city": "Oslo"}
LIST = '[{"name": "get_time", "arguments": {"city": "Oslo"}}]'
BARE = '{"name": "get_time", "parameters": {"city": "Oslo"}}'
HEAD = """'<tool_call>{"name": "' ~ call.function.name ~ '", "arguments": '"""
TAIL = "(call.function.arguments | tojson) ~ '}</tool_call>'"
LLAMA = TEMPLATE.replace(HEAD, HEAD.replace("<tool_call>", "").replace("arguments", "parameters"))
MISTRAL = TEMPLATE.replace("<tool_call>", "[TOOL_CALLS] [").replace("}</tool_call>", "}]")
SHORT_IDS = """{%- for m in messages if m.tool_call_id and m.tool_call_id | length != 9 %}
    {{- raise_exception('ids have 9 characters') }}
{%- endfor %}"""
#: For each last token the next one, and the chat template.
MODELS = {
    "mistral": (
        {"\n": "[TOOL_CALLS]", "[TOOL_CALLS]": LIST, LIST: "<|im_end|>", ":": "Done."},
        MISTRAL + SHORT_IDS,
    ),
    "llama": ({"\n": BARE, BARE: "; ", "; ": BARE, ":": "Done."}, LLAMA.replace("</tool_call>", "")),
    "single": (
        {"\n": BARE, BARE: "; ", "; ": BARE},
        LLAMA.replace("</tool_call>", "") + "{# This model only supports single tool-calls at once #}",
    ),
    "unknown": ({"\n": "Hi.", "Hi.": "<|im_end|>"}, TEMPLATE.replace("tool_call>", "action>")),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Running]]:
    """A server of a model in MODELS, started once."""
    made: dict[str, Running] = {}
    with ExitStack() as stack:

        def server(name: str) -> Running:
            if name not in made:
                follow, template = MODELS[name]
                path: Path = tmp_path_factory.mktemp("families") / name
                opened = common.open_model(str(write_chain_model(path, follow, template=template)))
                weights = common.load_weights(opened.source)
                engine = Engine(weights, opened.tokenizer, max_context=512, max_bytes=32 << 20)
                made[name] = stack.enter_context(running(engine, names=(name,)))
            return made[name]

        yield server


def calls_in(client: OpenAI, **asked: Any) -> tuple[str | None, list[tuple[str, Any]], str]:
    """Text, calls and reason of an answer, which streams as it comes at once."""
    (choice,) = client.chat.completions.create(**asked).choices
    calls: Any = choice.message.tool_calls or []
    with client.chat.completions.create(**asked, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    deltas = [delta.function for chunk in chunks for delta in chunk.delta.tool_calls or [] if delta.function]
    assert "".join(d.arguments or "" for d in deltas) == "".join(call.function.arguments for call in calls)
    assert "".join(chunk.delta.content or "" for chunk in chunks) == (choice.message.content or "")
    found = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
    return choice.message.content, found, choice.finish_reason


@pytest.mark.parametrize("name", ["mistral", "llama", "single"])
def test_calls_of_other_families(family: Callable[[str], Running], name: str) -> None:
    asked: Any = {"model": name, "messages": HELLO, "tools": [TOOL], "max_tokens": 6}
    with client_of(family(name)) as client:
        text, calls, reason = calls_in(client, **asked)
    assert text is None and calls == [("get_time", CITY)] * (3 if name == "llama" else 1)
    assert reason == ("length" if name == "llama" else "tool_calls")


@pytest.mark.parametrize("name", ["mistral", "llama"])
@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "get_time"}}]
)
def test_forced_calls_of_other_families(family: Callable[[str], Running], name: str, choice: Any) -> None:
    parameters = {"properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_time", "parameters": parameters, "strict": True}}
    asked: Any = {"model": name, "messages": HELLO, "tools": [tool], "tool_choice": choice}
    with client_of(family(name)) as client:
        found = calls_in(client, **asked, max_tokens=150, parallel_tool_calls=False, temperature=0)
    assert found == (None, [("get_time", CITY)], "tool_calls")


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_a_result_goes_back_to_other_families(family: Callable[[str], Running], name: str) -> None:
    asked: Any = {"model": name, "tools": [TOOL], "max_tokens": 6, "parallel_tool_calls": False}
    with client_of(family(name)) as client:
        message = client.chat.completions.create(messages=HELLO, **asked).choices[0].message
        (call,) = message.tool_calls or []
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "12:00"}
        again: Any = [*HELLO, message.to_dict(), result]
        answer = client.chat.completions.create(messages=again, **{**asked, "max_tokens": 1}).choices[0]
    assert answer.message.content == "Done."


def test_marks_of_calls_are_no_text_without_tools(family: Callable[[str], Running]) -> None:
    with client_of(family("mistral")) as client:
        answer = client.chat.completions.create(model="mistral", messages=HELLO, max_tokens=6).choices[0]
    assert answer.message.content == LIST


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_an_unknown_form_is_refused_in_one_sentence(family: Callable[[str], Running], choice: Any) -> None:
    asked: Any = {"model": "unknown", "messages": HELLO, "tools": [TOOL]}
    with client_of(family("unknown")) as client:
        with pytest.raises(openai.BadRequestError, match="an unknown format") as refused:
            client.chat.completions.create(**asked, tool_choice=choice)
        assert client.chat.completions.create(**asked, tool_choice="none").choices[0].message.content == "Hi."
    assert refused.value.param == "tools"


NOW: Any = {"type": "function", "function": {"name": "now", "description": "The time."}}
BOUNDED = {
    "properties": {
        "city": {"type": "string", "maxLength": 12, "format": "city-name"},
        "unit": {"enum": ["C", "F", None]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
}


@pytest.mark.parametrize("more", [{}, {"strict": True}, {"parameters": {"type": "object", "properties": {}}}])
def test_a_tool_without_parameters_is_called_without_any(client: OpenAI, more: dict[str, Any]) -> None:
    tool: Any = {"type": "function", "function": {**NOW["function"], **more}}
    for seed in range(3):
        asked: Any = {"model": "godwit", "messages": HELLO, "tools": [tool], "tool_choice": "required"}
        sampled = {"seed": seed, "temperature": 1.2, "parallel_tool_calls": False}
        assert calls_in(client, **asked, **sampled) == (None, [("now", {})], "tool_calls")


def test_forced_calls_fit_a_schema_that_does_not_say_that_it_is_closed(client: OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": BOUNDED}}
    for seed in range(4):
        asked: Any = {"model": "godwit", "messages": HELLO, "tools": [tool], "tool_choice": "required"}
        sampled = {"seed": seed, "temperature": 1.2, "parallel_tool_calls": False, "max_tokens": 200}
        _, ((name, arguments),), reason = calls_in(client, **asked, **sampled)
        assert (name, reason) == ("weather", "tool_calls")
        assert {"city", "unit"} <= set(arguments) <= {"city", "unit", "days"}
        assert len(arguments["city"]) <= 12 and arguments["unit"] in ("C", "F", None)
        assert 1 <= arguments.get("days", 1) <= 9
