"""The requests of the acceptance tests of Open Responses, their answers checked by its schemas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.server.conftest import Running, Servers

Body = dict[str, Any]
WEATHER: Body = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The city, e.g. San Francisco"}},
        "required": ["location"],
    },
}


def message(role: str, content: str) -> Body:
    return {"type": "message", "role": role, "content": content}


REQUESTS: Mapping[str, Body] = {
    "text": {"input": [message("user", "Say hello in three words.")]},
    "system prompt": {"input": [message("system", "Talk like a pirate."), message("user", "Say hello.")]},
    "multi-turn": {
        "input": [
            message("user", "My name is Alice."),
            message("assistant", "Hello Alice! How can I help you?"),
            message("user", "What is my name?"),
        ]
    },
}


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def text(value: Any) -> bool:
    return isinstance(value, str)


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def listed(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def shaped(fields: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """An object that has all of the fields."""
    return lambda value: (
        isinstance(value, dict)
        and all(name in value and check(value[name]) for name, check in fields.items())
    )


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


TOOL = shaped(
    {
        "type": one_of("function"),
        "name": text,
        "description": or_null(text),
        "parameters": or_null(shaped({})),
        "strict": or_null(flag),
    }
)
PART = shaped(
    {
        "type": one_of("output_text"),
        "text": text,
        "annotations": listed(shaped({})),
        "logprobs": listed(shaped({})),
    }
)
STATUS = one_of("in_progress", "completed", "incomplete")
MESSAGE = shaped(
    {
        "type": one_of("message"),
        "id": text,
        "status": STATUS,
        "role": one_of("assistant"),
        "content": listed(PART),
    }
)
CALL = shaped(
    {
        "type": one_of("function_call"),
        "id": text,
        "call_id": text,
        "name": text,
        "arguments": text,
        "status": STATUS,
    }
)
ITEM: Callable[[Any], bool] = lambda value: MESSAGE(value) or CALL(value)  # noqa: E731
RESPONSE: Mapping[str, Callable[[Any], bool]] = {
    "id": text,
    "object": one_of("response"),
    "created_at": whole,
    "completed_at": or_null(whole),
    "status": text,
    "incomplete_details": or_null(shaped({"reason": text})),
    "model": text,
    "previous_response_id": or_null(text),
    "instructions": or_null(text),
    "output": listed(ITEM),
    "error": or_null(shaped({"code": text, "message": text})),
    "tools": listed(TOOL),
    "tool_choice": one_of("auto", "none", "required"),
    "truncation": one_of("auto", "disabled"),
    "parallel_tool_calls": flag,
    "text": shaped({"format": shaped({"type": text}), "verbosity": one_of("low", "medium", "high")}),
    "top_p": number,
    "presence_penalty": number,
    "frequency_penalty": number,
    "top_logprobs": whole,
    "temperature": number,
    "reasoning": or_null(shaped({"effort": or_null(text), "summary": or_null(text)})),
    "user": or_null(text),
    "usage": or_null(
        shaped(
            {
                "input_tokens": whole,
                "output_tokens": whole,
                "total_tokens": whole,
                "input_tokens_details": shaped({"cached_tokens": whole}),
                "output_tokens_details": shaped({"reasoning_tokens": whole}),
            }
        )
    ),
    "max_output_tokens": or_null(whole),
    "max_tool_calls": or_null(whole),
    "store": flag,
    "background": flag,
    "service_tier": text,
    "metadata": shaped({}),
    "safety_identifier": or_null(text),
    "prompt_cache_key": or_null(text),
}
PLACE = {"item_id": text, "output_index": whole}
EVENTS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    **{
        f"response.{name}": {"response": shaped(RESPONSE)} for name in ("created", "in_progress", "completed")
    },
    **{f"response.output_item.{name}": {"output_index": whole, "item": ITEM} for name in ("added", "done")},
    **{
        f"response.content_part.{name}": {**PLACE, "content_index": whole, "part": PART}
        for name in ("added", "done")
    },
    "response.output_text.delta": {
        **PLACE,
        "content_index": whole,
        "delta": text,
        "logprobs": listed(shaped({})),
    },
    "response.output_text.done": {**PLACE, "content_index": whole, "text": text},
    "response.function_call_arguments.delta": {**PLACE, "delta": text},
    "response.function_call_arguments.done": {**PLACE, "arguments": text},
}


def check_response(body: Body) -> None:
    for name, check in RESPONSE.items():
        assert name in body, name
        assert check(body[name]), (name, body[name])


def streamed(server: Running, asked: Body) -> list[Body]:
    """The events of a response, each checked; a stream ends with [DONE]."""
    with server.client() as client:
        sent = client.post("/v1/responses", json=asked | {"stream": True})
    assert sent.status_code == 200 and sent.headers["content-type"].startswith("text/event-stream")
    *blocks, last = sent.text.strip().split("\n\n")
    assert last == "data: [DONE]"
    events = []
    for block in blocks:
        name, data = (line.partition(": ")[2] for line in block.split("\n"))
        event = json.loads(data)
        assert event["type"] == name and whole(event["sequence_number"])
        assert name in EVENTS, name
        assert shaped(EVENTS[name])(event), event
        events.append(event)
    return events


@pytest.mark.parametrize("name", REQUESTS)
def test_a_response_has_all_that_it_should(real: Running, name: str) -> None:
    asked = {"model": "godwit", "temperature": 0, **REQUESTS[name]}
    with real.client() as client:
        body = client.post("/v1/responses", json=asked).json()
    check_response(body)
    assert body["status"] == "completed" and MESSAGE(body["output"][0])
    assert body["completed_at"] >= body["created_at"]


def test_a_stream_has_all_that_it_should(servers: Servers) -> None:
    asked = {"model": "hello", "input": [message("user", "Count from 1 to 5.")]}
    events = streamed(servers("hello"), asked)
    last = events[-1]["response"]
    assert events[-1]["type"] == "response.completed" and last["status"] == "completed"
    assert [event["response"]["completed_at"] for event in events[:2]] == [None, None]
    assert last["output"][0]["content"][0]["text"] == "Hello there."


def test_a_tool_call_has_all_that_it_should(servers: Servers) -> None:
    time = {"type": "function", "name": "get_time", "parameters": WEATHER["parameters"]}
    asked: Body = {
        "model": "tool",
        "input": [message("user", "What's the weather?")],
        "tools": [WEATHER, time],
    }
    asked["parallel_tool_calls"] = False
    with servers("tool").client() as client:
        body = client.post("/v1/responses", json=asked).json()
    check_response(body)
    assert [item["type"] for item in body["output"]] == ["function_call"]
    assert [tool["strict"] for tool in body["tools"]] == [False, False]
    assert [tool["description"] for tool in body["tools"]] == [WEATHER["description"], None]
    events = streamed(servers("tool"), asked)
    kinds = [event["type"] for event in events]
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= set(kinds)
    for name in ("added", "done"):
        (item,) = (e["item"] for e in events if e["type"] == f"response.output_item.{name}")
        assert item["type"] == "function_call"


def test_what_was_asked_for_is_told_again(servers: Servers) -> None:
    asked: Body = {
        "user": "someone",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "max_tool_calls": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "truncation": "auto",
        "metadata": {"a": "b"},
    }
    format = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    fields = asked | {"text": {"format": format, "verbosity": "low"}}
    with servers("hello").client() as client:
        plain = client.post("/v1/responses", json={"input": "Hi", **asked}).json()
        formed = client.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1, **fields}).json()
    check_response(plain)
    check_response(formed)
    assert {name: plain[name] for name in asked} == asked
    assert formed["text"] == {"format": {**format, "description": None}, "verbosity": "low"}
