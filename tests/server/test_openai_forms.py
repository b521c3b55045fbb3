"""Answers of a given form through OpenAI's real client: schemas, other forms, and strict tools."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from godwit.engine.constraint.constraints import GrammarConstraint
from godwit.engine.constraint.trials import Trials
from godwit.errors import BusyError, UsageError
from tests.server.conftest import Running, Servers
from tests.server.openai_steps import FIND, HELLO, SAN_JOSE, TOOL, client_of

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Bob"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_answers_that_fit_a_schema(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    asked: Any = {
        "model": "godwit",
        "messages": HELLO,
        "response_format": form,
        "temperature": 1.0,
        "seed": 5,
    }
    whole = client.chat.completions.create(**asked, n=2)
    for choice in whole.choices:
        person = json.loads(choice.message.content or "")
        assert set(person) == {"name", "age"} and person["name"] in ("Ann", "Bob")
        assert isinstance(person["age"], int) and 0 <= person["age"] <= 120
        assert choice.finish_reason == "stop"
    with client.chat.completions.create(**asked, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


PERSON_FORM: Any = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": PERSON, "strict": True},
}


@pytest.mark.parametrize("wanted", ["call", "form"])
def test_an_answer_calls_a_tool_or_fits_a_schema(client: OpenAI, real: Running, wanted: str) -> None:
    opener = real.service.tokenizer.token_to_id("<tool_call>")
    asked: Any = {
        "model": "godwit",
        "messages": SAN_JOSE,
        "tools": [FIND],
        "response_format": PERSON_FORM,
        "temperature": 0,
        "max_tokens": 200,
        "logit_bias": {str(opener): 5 if wanted == "call" else -100},
    }
    (choice,) = client.chat.completions.create(**asked).choices
    with client.chat.completions.create(**asked, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    said = "".join(chunk.delta.content or "" for chunk in chunks)
    functions = [call.function for chunk in chunks for call in chunk.delta.tool_calls or [] if call.function]
    assert chunks[-1].finish_reason == choice.finish_reason
    if wanted == "form":
        assert choice.finish_reason == "stop" and not choice.message.tool_calls and not functions
        assert set(json.loads(choice.message.content or "")) == {"name", "age"}
        assert said == choice.message.content
    else:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None and not said
        calls: Any = choice.message.tool_calls
        assert {call.function.name for call in calls} == {"find_restaurants"}
        assert all(set(json.loads(call.function.arguments)) == {"cuisine", "city"} for call in calls)
        assert "".join(f.arguments or "" for f in functions) == "".join(c.function.arguments for c in calls)


@pytest.mark.parametrize(
    "choice", ["none", "required", {"type": "function", "function": {"name": "get_time"}}]
)
def test_the_choice_of_tools_says_which_form_holds(client: OpenAI, choice: Any) -> None:
    asked: Any = {"messages": HELLO, "tools": [TOOL, FIND], "tool_choice": choice, "temperature": 0}
    answer = client.chat.completions.create(
        model="godwit", **asked, response_format=PERSON_FORM, max_tokens=400, parallel_tool_calls=False
    ).choices[0]
    if choice == "none":
        assert set(json.loads(answer.message.content or "")) == {"name", "age"}
        return
    (call,) = answer.message.tool_calls or []
    assert call.type == "function" and answer.message.content is None
    assert choice == "required" or call.function.name == "get_time"


class Person(BaseModel):
    """What an answer is parsed into."""

    name: Literal["Ann", "Bob"]
    age: Annotated[int, Field(ge=0, le=120)]
    pets: Annotated[list[Literal["cat", "dog"]], Field(max_length=3)]


def test_small_models_end_their_forms_by_themselves(client: OpenAI) -> None:
    for seed in range(6):
        (choice,) = client.chat.completions.parse(
            model="godwit", messages=HELLO, response_format=Person, seed=seed, temperature=1.2
        ).choices
        assert choice.finish_reason == "stop" and choice.message.parsed is not None
        assert len(choice.message.content or "") < 200


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]"}, "[ab]{3}-[0-9]"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "<" [x-z] ">"'}, "<[x-z]>"),
        (
            {"json": {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}},
            r"\[\s*1\s*,\s*1\s*\]",
        ),
    ],
)
def test_other_forms(client: OpenAI, form: dict[str, Any], pattern: str) -> None:
    extra = {"structured_outputs": form}
    chat = client.chat.completions.create(model="godwit", messages=HELLO, extra_body=extra, max_tokens=400)
    plain = client.completions.create(model="godwit", prompt="It is", extra_body=extra, max_tokens=400)
    assert re.fullmatch(pattern, chat.choices[0].message.content or "")
    assert re.fullmatch(pattern, plain.choices[0].text)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
def test_a_tool_that_has_to_be_called(client: OpenAI, choice: Any) -> None:
    asked: Any = {
        "model": "godwit",
        "messages": HELLO,
        "tools": [TOOL, FIND] if isinstance(choice, dict) else [TOOL],
    }
    answer = client.chat.completions.create(
        **asked, tool_choice=choice, parallel_tool_calls=False, max_tokens=80, temperature=0
    ).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_time"
    assert isinstance(json.loads(call.function.arguments)["city"], str)


def test_strict_tools_keep_to_their_schemas(client: OpenAI) -> None:
    cuisine = {**FIND["function"]["parameters"]["properties"], "cuisine": {"enum": ["Klingon"]}}
    parameters = {**FIND["function"]["parameters"], "properties": cuisine, "additionalProperties": False}
    tool: Any = {
        "type": "function",
        "function": {**FIND["function"], "parameters": parameters, "strict": True},
    }
    answer = client.chat.completions.create(
        model="godwit", messages=SAN_JOSE, tools=[tool], tool_choice="required", max_tokens=80, temperature=0
    )
    calls = answer.choices[0].message.tool_calls or []
    assert calls
    for call in calls:
        assert call.type == "function" and json.loads(call.function.arguments)["cuisine"] == "Klingon"


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": [TOOL]},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "integer", "multipleOf": 999_999_937}},
            },
            "tools": [TOOL],
        },
        {"response_format": {"type": "json_object"}, "extra_body": {"structured_outputs": {"regex": "a"}}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}},
        {"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}},
        {"extra_body": {"structured_outputs": {"regex": "("}}},
        {"extra_body": {"structured_outputs": {"choice": []}}},
    ],
)
def test_what_cannot_be_honoured_is_refused(servers: Servers, more: dict[str, Any]) -> None:
    with client_of(servers("hello")) as client, pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="hello", messages=HELLO, **more)


def test_a_form_that_is_too_costly_to_follow_is_refused(client: OpenAI) -> None:
    grammar = {"grammar": "start: s\ns: s s | s s s | /[a-z ]/ |"}
    with pytest.raises(openai.BadRequestError, match=r"the grammar cannot be used: .*Too many items"):
        client.completions.create(
            model="godwit", prompt="It is", extra_body={"structured_outputs": grammar}, stream=True
        )


def test_a_form_that_gets_too_costly_is_the_request_s_fault(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(form: GrammarConstraint, token: int) -> None:
        raise UsageError("the form of the answer takes too much time to follow; simplify it")

    monkeypatch.setattr(GrammarConstraint, "accept", give_up)
    with pytest.raises(openai.BadRequestError, match="too much time to follow; simplify it"):
        client.completions.create(
            model="godwit", prompt="It is", extra_body={"structured_outputs": {"regex": "[a-z]{9}"}}
        )


def test_known_forms_do_not_wait_for_others_to_be_tried(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Any = {"model": "godwit", "prompt": "It is", "max_tokens": 5}
    known: Any = {"structured_outputs": {"regex": "[ab]{3}!"}}
    client.completions.create(**asked, extra_body=known)

    def ask(*request: Any, **how: Any) -> Any:
        raise BusyError("all processes are busy")

    monkeypatch.setattr(Trials, "ask", ask)
    again = client.completions.create(**asked, extra_body=known)
    assert re.fullmatch("[ab]{3}!", again.choices[0].text)
    with pytest.raises(openai.InternalServerError, match="short of processes"):
        client.with_options(max_retries=0).completions.create(
            **asked, extra_body={"structured_outputs": {"regex": "[ab]{4}!"}}
        )
