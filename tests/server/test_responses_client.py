"""The responses of OpenAI's newer API, with its real client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from tests.engine.tiny import CALL
from tests.server.conftest import Running, Servers
from tests.server.openai_steps import client_of

TOOL: Any = {
    "type": "function",
    "name": "get_time",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


def streamed(server: Running, **asked: Any) -> tuple[list[Any], Response]:
    """(events, the response at the end)."""
    with client_of(server) as client, client.responses.create(**asked, stream=True) as stream:
        events: list[Any] = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events, events[-1].response


def test_a_response_streamed_and_whole(real: Running) -> None:
    asked: Any = {"model": "godwit", "instructions": "Be kind.", "input": "Hello!", "temperature": 0}
    asked["max_output_tokens"] = 12
    with client_of(real) as client:
        whole = client.responses.create(**asked)
    events, last = streamed(real, **asked)
    assert whole.output_text and whole.output_text == last.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == last.output_text
    assert whole.status == last.status and whole.status in ("completed", "incomplete")
    assert last.usage is not None and last.usage.input_tokens_details.cached_tokens == last.usage.input_tokens
    kinds = [event.type for event in events if not event.type.endswith(".delta")]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[4:7] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]


def test_logprobs_of_what_is_said(real: Running, servers: Servers) -> None:
    asked: Any = {"model": "godwit", "input": "Hello!", "temperature": 0, "max_output_tokens": 8}
    asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    with client_of(real) as client:
        whole: Any = client.responses.create(**asked)
        chat: Any = client.chat.completions.create(
            model="godwit", messages=[{"role": "user", "content": "Hello!"}], temperature=0, max_tokens=8,
            logprobs=True, top_logprobs=2,
        )  # fmt: skip
    events, last = streamed(real, **asked)
    (part,) = whole.output[0].content
    assert part.logprobs and whole.top_logprobs == 2
    assert b"".join(bytes(one.bytes) for one in part.logprobs).decode() == part.text
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in part.logprobs)
    assert [one.model_dump() for one in part.logprobs] == [
        one.model_dump() for one in chat.choices[0].logprobs.content
    ]
    found: Any = last.output[0]
    assert found.content[0].logprobs == part.logprobs
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    assert [one.token for e in deltas for one in e.logprobs] == [one.token for one in part.logprobs]
    (done,) = (e for e in events if e.type == "response.output_text.done")
    assert [one.logprob for one in done.logprobs] == [one.logprob for one in part.logprobs]
    asked |= {"model": "thinking", "top_logprobs": 0}
    for said in (streamed(servers("thinking"), **asked)[1], None):
        if said is None:
            with client_of(servers("thinking")) as client:
                said = client.responses.create(**asked)
        message: Any = said.output[1]
        assert [one.token for one in message.content[0].logprobs] == ["Yes."]


def test_a_choice_among_some_of_the_tools(real: Running) -> None:
    other: Any = {**TOOL, "name": "get_date"}
    choice: Any = {
        "type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_date"}]
    }  # fmt: skip
    with client_of(real) as client:
        answer = client.responses.create(
            model="godwit", input="Hello!", tools=[TOOL, other], tool_choice=choice,
            parallel_tool_calls=False, temperature=0, max_output_tokens=80,
        )  # fmt: skip
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "get_date"
    told: Any = answer.tool_choice
    assert told.type == "allowed_tools" and len(answer.tools) == 2


def test_a_form_goes_with_tools(real: Running) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    closed = {**schema, "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": closed}}
    with client_of(real) as client:
        for choice in ("auto", "required", "none"):
            kind: Any = choice
            answer = client.responses.create(
                model="godwit",
                input="Hello!",
                text=form,
                tools=[TOOL],
                tool_choice=kind,
                parallel_tool_calls=False,
                temperature=0,
                max_output_tokens=400,
            )
            (item,) = answer.output
            assert item.type in {"auto": ("message", "function_call"), "none": ("message",)}.get(
                choice, ("function_call",)
            )
            if item.type == "message":
                assert "ok" in json.loads(answer.output_text)


def test_the_loop_of_a_tool(servers: Servers) -> None:
    server = servers("tool")
    asked: Any = {"model": "tool", "input": "Hello!", "tools": [TOOL], "parallel_tool_calls": False}
    events, last = streamed(server, **asked)
    (call,) = last.output
    assert call.type == "function_call" and json.loads(call.arguments) == CALL["arguments"]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12:00"}
    turn = [{"role": "user", "content": "Hello!"}, call.model_dump(), result]
    with client_of(server) as client:
        assert client.responses.create(**asked | {"input": turn}).output_text == "Done."


def test_thinking_is_an_item_and_can_be_sent_back(servers: Servers) -> None:
    events, last = streamed(servers("thinking"), model="thinking", input="Hello!")
    thought, said = last.output
    assert thought.type == "reasoning" and thought.content and thought.content[0].text == "hm"
    assert said.type == "message" and last.output_text == "Yes."
    assert [e.delta for e in events if e.type == "response.reasoning_text.delta"] == ["hm"]
    turn: Any = [{"role": "user", "content": "Hello!"}, thought.model_dump(), said.model_dump()]
    with client_of(servers("thinking")) as client:
        assert client.responses.create(input=[*turn, turn[0]], model="thinking").output_text == "Yes."


def test_an_answer_that_is_cut_off(servers: Servers) -> None:
    _, last = streamed(servers("endless"), model="endless", input="Hello!", max_output_tokens=3)
    assert last.status == "incomplete" and last.output_text == "la la la "
    assert last.incomplete_details is not None and last.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(
    "more",
    [
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"top_logprobs": 3},
        {"top_logprobs": 21, "include": ["message.output_text.logprobs"]},
        {"tool_choice": "required"},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "no"}}}},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b.png"}]}]},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": []},
    ],
)
def test_what_cannot_be_honoured_is_refused(servers: Servers, more: dict[str, Any]) -> None:
    asked: Any = {"model": "hello", "input": "Hello!"}
    with client_of(servers("hello")) as client, pytest.raises(openai.BadRequestError):
        client.responses.create(**asked | more)


def test_an_answer_that_fits_a_schema(real: Running) -> None:
    schema: Any = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form: Any = {
        "format": {"type": "json_schema", "name": "a", "schema": {**schema, "additionalProperties": False}}
    }
    with client_of(real) as client:
        answer = client.responses.create(model="godwit", input="Hello!", text=form, max_output_tokens=400)
    assert set(json.loads(answer.output_text)) == {"ok"}
