"""Groups of tools, tools that take one text, tools of others, and references, as agents send them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from godwit.server.errors import ApiError
from godwit.server.openai.items import ItemStore
from godwit.server.openai.response_schemas import ResponsesRequest
from godwit.server.openai.response_tools import CallText, offered
from tests.server.conftest import Engines, Running, Servers, running
from tests.server.openai_steps import client_of

PATCH: Any = {
    "type": "custom",
    "name": "patch",
    "description": "Edit files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
LOG: Any = {"type": "function", "name": "log", "parameters": {"type": "object", "properties": {}}}
GIT: Any = {"type": "namespace", "name": "git", "description": "Version control.", "tools": [LOG, PATCH]}
INPUT = 'a\n"b" \U0001f600'


def request(**more: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"input": "Hi", **more})


def test_the_model_is_told_of_functions_alone() -> None:
    asked = request(tools=[PATCH, GIT, {"type": "web_search_2025_08_26"}, {"type": "local_shell"}])
    tools = [tool.tool()["function"] for tool in offered(asked.tools)]
    assert [tool["name"] for tool in tools] == ["patch", "git__log", "git__patch"]
    assert tools[0]["parameters"]["required"] == ["input"] and "start: /.+/" in tools[0]["description"]
    assert tools[1]["description"] == "Version control." and "Version" not in tools[2]["description"]
    assert "strict" not in tools[0]


def test_names_that_end_like_those_of_mcp_are_joined_as_they_are() -> None:
    tools = offered(request(tools=[GIT | {"name": "mcp__git__"}]).tools)
    assert [tool.name for tool in tools] == ["mcp__git__log", "mcp__git__patch"]


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ApiError, match="git__log"):
        offered(request(tools=[GIT, LOG | {"name": "git__log"}]).tools)


def test_a_regex_is_a_pattern_of_the_text() -> None:
    tool = PATCH | {"format": {"type": "grammar", "syntax": "regex", "definition": "a|b"}}
    (found,) = offered(request(tools=[tool]).tools)
    assert (found.parameters or {})["properties"]["input"]["pattern"] == "^(?:a|b)$"


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ([{"type": "custom", "name": "patch"}], ["patch"]),
        ([{"type": "function", "name": "log", "namespace": "git"}], ["git__log"]),
        ([{"type": "namespace", "name": "git"}], ["git__log", "git__patch"]),
        ([{"type": "custom", "name": "patch"}, {"type": "web_search"}], ["patch"]),
    ],
)
def test_a_choice_among_the_tools(choice: Any, names: list[str]) -> None:
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": choice}
    assert request(tools=[PATCH, GIT], tool_choice=allowed).choice().allowed == names


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_the_text_of_a_call_is_read_as_it_comes(size: int) -> None:
    raw = ' { "input": "a\\n\\"b\\" \\ud83d\\ude00 \\u00e9\\\\" }'
    reader = CallText(custom=True)
    parts = [reader.push(raw[start : start + size]) for start in range(0, len(raw), size)]
    assert "".join(parts) + reader.flush() == 'a\n"b" \U0001f600 é\\'


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('{"other": 1}', '{"other": 1}'),
        ("free text", "free text"),
        ('{"input": 5}', '{"input": 5}'),
        ('{"a": 1, "input": "x"}', "x"),
        ('{"input": "cut \\ud83d', "cut "),
        ('{"input": "lone \\udc00"}', "lone "),
        ("", ""),
    ],
)
def test_a_call_that_is_not_as_it_should_be_is_given_out_all_the_same(raw: str, text: str) -> None:
    reader = CallText(custom=True)
    assert reader.push(raw) + reader.flush() == text


@pytest.fixture(scope="module")
def agent(engines: Engines) -> Iterator[Running]:
    """A server whose model patches and then asks for the log."""
    with running(engines("agent"), names=("agent",), keys=("first-key", "second-key")) as server:
        yield server


def asked_with(**more: Any) -> Any:
    return {"model": "agent", "input": "Hi", "tools": [PATCH, GIT, {"type": "web_search"}], **more}


def agent_client(server: Running, key: str = "first-key") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def test_calls_name_their_tools_as_the_client_does(agent: Running, caplog: pytest.LogCaptureFixture) -> None:
    with agent_client(agent) as client, caplog.at_level(logging.INFO, "godwit.server"):
        whole = client.responses.create(**asked_with())
        with client.responses.create(**asked_with(), stream=True) as stream:
            events: list[Any] = list(stream)
    assert any("tools left out" in line and "web_search" in line for line in caplog.messages)
    assert [tool.type for tool in whole.tools] == ["custom", "namespace"]
    for answer in (whole, events[-1].response):
        patch, log = answer.output
        assert patch.type == "custom_tool_call" and (patch.name, patch.input) == ("patch", INPUT)
        assert patch.namespace is None and log.type == "function_call"
        assert (log.namespace, log.name, json.loads(log.arguments)) == ("git", "log", {})
    kinds = [event.type for event in events]
    deltas = [e.delta for e in events if e.type == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == INPUT and len(deltas) > 1
    (done,) = (e for e in events if e.type == "response.custom_tool_call_input.done")
    assert done.input == INPUT
    assert kinds.count("response.function_call_arguments.done") == 1


def test_calls_and_results_can_be_sent_back(agent: Running) -> None:
    with agent_client(agent) as client:
        first = client.responses.create(**asked_with())
        calls: list[Any] = [item.model_dump(exclude_none=True) for item in first.output]
        results = [
            {"type": "custom_tool_call_output", "call_id": calls[0]["call_id"], "output": "patched"},
            {
                "type": "function_call_output",
                "call_id": calls[1]["call_id"],
                "output": [{"type": "input_text", "text": "none"}],
            },
        ]
        turn: Any = [{"role": "user", "content": "Hi"}, *calls, *results]
        assert client.responses.create(**asked_with(input=turn)).output_text == "Done."
    messages = request(input=turn).messages()
    functions = [call["function"] for call in messages[1]["tool_calls"]]
    assert [function["name"] for function in functions] == ["patch", "git__log"]
    assert json.loads(functions[0]["arguments"]) == {"input": INPUT}
    assert [message["content"] for message in messages[2:]] == ["patched", "none"]


def test_an_item_can_be_named_in_place_of_sending_it(agent: Running) -> None:
    with agent_client(agent) as client, agent_client(agent, "second-key") as other:
        first = client.responses.create(**asked_with())
        with client.responses.create(**asked_with(), stream=True) as stream:
            second: Any = list(stream)[-1]
        unkept = client.responses.create(**asked_with(), store=False)
        for answer in (first, second.response):
            items: list[Any] = list(answer.output)
            result = {"type": "custom_tool_call_output", "call_id": items[0].call_id, "output": "ok"}
            named: Any = [{"type": "item_reference", "id": items[0].id}, {"id": items[1].id}]
            turn: Any = [{"role": "user", "content": "Hi"}, *named, result]
            whole: Any = [turn[0], *(item.model_dump(exclude_none=True) for item in items), result]
            by_name = client.responses.create(**asked_with(input=turn))
            assert by_name.output_text == "Done." and by_name.usage is not None
            sent = client.responses.create(**asked_with(input=whole))
            assert sent.usage is not None and sent.usage.input_tokens == by_name.usage.input_tokens
            with pytest.raises(openai.BadRequestError, match="send the item itself"):
                other.responses.create(**asked_with(input=turn))
        gone: Any = [{"type": "item_reference", "id": unkept.output[0].id}]
        with pytest.raises(openai.BadRequestError, match="send the item itself"):
            client.responses.create(**asked_with(input=gone))
        twice: Any = [{"type": "item_reference", "id": first.output[0].id}] * 2
        with pytest.raises(openai.BadRequestError, match="only once"):
            client.responses.create(**asked_with(input=twice))
        with pytest.raises(openai.BadRequestError, match="store"):
            client.responses.create(**asked_with(store="false"))


def test_the_oldest_items_go_first() -> None:
    store = ItemStore(max_bytes=200)
    for number in range(10):
        store.put("me", {"id": str(number), "text": "x" * 30})
        store.get("me", "0")
    assert store.get("me", "0") is not None and store.get("me", "9") is not None
    assert store.get("me", "1") is None and store.get("you", "9") is None
    store.put("me", {"id": "large", "text": "x" * 300})
    assert store.get("me", "large") is None and store.get("me", "9") is None


def test_a_required_call_of_a_tool_that_takes_a_text(real: Running) -> None:
    with client_of(real) as client:
        answer = client.responses.create(
            model="godwit",
            input="Write a poem.",
            tools=[
                {
                    "type": "custom",
                    "name": "note",
                    "format": {"type": "grammar", "syntax": "regex", "definition": "[ab]{3}"},
                }
            ],
            tool_choice={"type": "custom", "name": "note"},
            parallel_tool_calls=False,
            max_output_tokens=100,
        )
    (call,) = answer.output
    assert call.type == "custom_tool_call" and len(call.input) == 3 and set(call.input) <= set("ab")


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "functon", "name": "a"}]},
        {"tools": [{"type": "web_search"}], "tool_choice": "required"},
        {"tools": [GIT], "tool_choice": {"type": "function", "name": "log"}},
        {"tools": [GIT | {"tools": [{"type": "namespace", "name": "a", "tools": []}]}]},
    ],
)
def test_what_cannot_be_honoured_is_refused(servers: Servers, more: dict[str, Any]) -> None:
    with client_of(servers("hello")) as client, pytest.raises(openai.BadRequestError):
        client.responses.create(**{"model": "hello", "input": "Hi", **more})
