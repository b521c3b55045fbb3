"""The real client of OpenAI, with the packaged model and with models whose answers are known."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.engine.tiny import CALL
from tests.server.conftest import Running, Servers

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CUISINE = {"type": "string", "description": "Cuisine of food served in the restaurant"}
CITY = {"type": "string", "description": "City in which the restaurant is located"}
FIND: Any = {
    "type": "function",
    "function": {
        "name": "find_restaurants",
        "description": "Find a restaurant of a particular cuisine in a city",
        "parameters": {
            "type": "object",
            "properties": {"cuisine": CUISINE, "city": CITY},
            "required": ["cuisine", "city"],
        },
    },
}
HELLO: Any = [{"role": "user", "content": "Hello!"}]


def client_of(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def client(real: Running) -> Iterator[OpenAI]:
    with client_of(real) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="godwit",
        messages=[{"role": "system", "content": "Be kind."}, *HELLO],
        max_tokens=12,
        temperature=0,
    )
    (choice,) = answer.choices
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


def test_a_stream_is_the_answer_in_pieces_and_the_prompt_is_reused(client: OpenAI) -> None:
    asked: Any = {
        "model": "godwit",
        "messages": [{"role": "user", "content": "Name three animals, please."}],
        "max_completion_tokens": 24,
        "seed": 7,
    }
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    last = chunks[-1]
    assert not last.choices and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens


def test_a_conversation_goes_on_from_the_cache(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "You are brief. " * 20}, *HELLO]
    first = client.chat.completions.create(model="godwit", messages=messages, max_tokens=8)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    second = client.chat.completions.create(model="godwit", messages=messages, max_tokens=4)
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens - 24


def test_several_choices_and_seeds(client: OpenAI) -> None:
    asked: Any = {
        "model": "godwit",
        "messages": HELLO,
        "n": 3,
        "max_tokens": 10,
        "temperature": 1.5,
        "seed": 3,
    }
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in second.choices]


def test_logprobs(client: OpenAI) -> None:
    asked: Any = {"model": "godwit", "messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=3).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content
    for entry in whole.logprobs.content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob  # the likeliest was taken
        assert bytes(entry.bytes or []).decode(errors="replace") == entry.token
    with client.chat.completions.create(**asked, top_logprobs=3, stream=True) as stream:
        parts = [c.choices[0].logprobs for c in stream]
    assert [e for part in parts if part for e in part.content or []] == whole.logprobs.content


def test_stop_and_logit_bias(client: OpenAI, real: Running) -> None:
    asked: Any = {"model": "godwit", "messages": HELLO, "max_tokens": 20, "temperature": 0}
    text = client.chat.completions.create(**asked).choices[0].message.content or ""
    stop = text[3:6]
    cut = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert cut.message.content == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    first = real.service.tokenizer.encode(text)[0]
    other = client.chat.completions.create(**asked, logit_bias={str(first): -100}).choices[0]
    assert other.message.content != text


def test_plain_completions(client: OpenAI) -> None:
    asked: Any = {"model": "godwit", "prompt": ["One, two,", "A, B,"], "max_tokens": 4, "temperature": 0}
    answer = client.completions.create(**asked, n=2, echo=True)
    assert [choice.text[:4] for choice in answer.choices] == ["One,", "One,", "A, B", "A, B"]
    assert answer.choices[0].text == answer.choices[1].text
    with client.completions.create(
        model="godwit", prompt="One, two,", max_tokens=4, temperature=0, logprobs=2, stream=True
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == answer.choices[0].text.removeprefix("One, two,")
    logprobs = [c.choices[0].logprobs for c in chunks]
    offsets = [offset for part in logprobs if part for offset in part.text_offset or []]
    assert offsets == sorted(offsets) and offsets[0] == 0
    assert sum(len(part.tokens or []) for part in logprobs if part) == 4


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["godwit"]
    assert client.models.retrieve("godwit").owned_by == "godwit"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_errors(client: OpenAI) -> None:
    asked: Any = {"model": "godwit", "messages": HELLO}
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(**asked | {"model": "gpt"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**asked, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": "so " * 4000}]})
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="guided_json"):
        client.chat.completions.create(**asked, extra_body={"guided_json": {}})


def test_the_loop_of_a_tool_with_the_packaged_model(client: OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You are Godwit, a helpful assistant. Today is 2026-11-23."},
        {"role": "user", "content": "Find me an Italian restaurant in San Jose."},
    ]
    asked: Any = {"model": "godwit", "tools": [FIND], "temperature": 0, "max_tokens": 60}
    first = client.chat.completions.create(messages=messages, **asked).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls or []
    assert call.type == "function" and call.function.name == "find_restaurants"
    assert json.loads(call.function.arguments)["city"] == "San Jose"
    found = '{"count": 1, "results": [{"restaurant_name": "Bella Roma"}]}'
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": found}]
    second = client.chat.completions.create(messages=messages, **asked)
    assert "Bella Roma" in (second.choices[0].message.content or "")
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens


def test_a_streamed_tool_call(servers: Servers) -> None:
    with client_of(servers("tool")) as client:
        asked: Any = {"model": "tool", "messages": HELLO, "tools": [TOOL], "parallel_tool_calls": False}
        with client.chat.completions.create(**asked, stream=True) as stream:
            chunks = list(stream)
        deltas = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        assert deltas[0].id and deltas[0].function and deltas[0].function.name == CALL["name"]
        arguments = "".join(d.function.arguments or "" for d in deltas if d.function)
        assert json.loads(arguments) == CALL["arguments"]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        result: Any = {"role": "tool", "tool_call_id": deltas[0].id, "content": "12:00"}
        call: Any = {
            "id": deltas[0].id,
            "type": "function",
            "function": {"name": "get_time", "arguments": "{}"},
        }
        said: Any = {"role": "assistant", "content": None, "tool_calls": [call]}
        done = client.chat.completions.create(**asked | {"messages": [*HELLO, said, result]})
        assert done.choices[0].message.content == "Done."


def test_parallel_calls_and_calls_that_are_not_wanted(servers: Servers) -> None:
    with client_of(servers("tool")) as client:
        asked: Any = {"model": "tool", "messages": HELLO, "max_tokens": 6}
        both = client.chat.completions.create(**asked, tools=[TOOL]).choices[0]
        assert len(both.message.tool_calls or []) == 2
        assert both.finish_reason == "length"
        for more in ({}, {"tools": [TOOL], "tool_choice": "none"}):
            more_fields: Any = more
            plain = client.chat.completions.create(**asked, **more_fields).choices[0]
            assert plain.message.tool_calls is None
            assert (plain.message.content or "").startswith("<tool_call>")


def test_broken_arguments_are_given_out_as_they_are(servers: Servers) -> None:
    with client_of(servers("broken")) as client:
        answer = client.chat.completions.create(model="broken", messages=HELLO, tools=[TOOL]).choices[0]
        (call,) = answer.message.tool_calls or []
        assert call.type == "function" and call.function.arguments == '{"a": '


def test_thinking_is_told_apart(servers: Servers) -> None:
    with client_of(servers("thinking")) as client:
        answer = client.chat.completions.create(model="thinking", messages=HELLO)
        message: Any = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", "Yes.")
        assert answer.usage is not None and answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.reasoning_tokens
        with client.chat.completions.create(model="thinking", messages=HELLO, stream=True) as stream:
            deltas: list[Any] = [chunk.choices[0].delta for chunk in stream]
        assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == "hm"


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
    messages: list[Any] = [
        {"role": "system", "content": "You are Godwit, a helpful assistant. Today is 2026-11-23."},
        {"role": "user", "content": "Find me an Italian restaurant in San Jose."},
    ]
    answer = client.chat.completions.create(
        model="godwit", messages=messages, tools=[tool], tool_choice="required", max_tokens=80, temperature=0
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
        {"response_format": {"type": "json_object"}, "tools": [TOOL]},
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
