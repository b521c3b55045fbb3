"""The real client of Anthropic, with the packaged model and with models whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.engine.tiny import CALL
from tests.server.conftest import Running, Servers

TOOL: dict[str, Any] = {
    "name": "get_time",
    "description": "The time in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
HELLO: Any = [{"role": "user", "content": "Hello!"}]


def client_of(server: Running) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def client(real: Running) -> Iterator[Anthropic]:
    with client_of(real) as client:
        yield client


def test_a_message(client: Anthropic) -> None:
    asked: Any = {
        "model": "godwit",
        "max_tokens": 12,
        "system": "Be kind.",
        "messages": HELLO,
        "extra_body": {"temperature": 0},
    }
    first, second = (client.messages.create(**asked) for _ in range(2))
    assert first.content[0].type == "text" and first.content[0].text
    assert first.stop_reason in ("end_turn", "max_tokens")
    assert second.content == first.content
    total = first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)
    assert second.usage.input_tokens + (second.usage.cache_read_input_tokens or 0) == total
    assert second.usage.cache_read_input_tokens == total
    assert (
        client.messages.count_tokens(model="godwit", system="Be kind.", messages=HELLO).input_tokens == total
    )


def test_a_stream_is_the_message_in_pieces(client: Anthropic) -> None:
    asked: Any = {
        "model": "godwit",
        "max_tokens": 16,
        "messages": HELLO,
        "extra_body": {"temperature": 0},
    }
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text" and text == whole.content[0].text
    assert final.content[0].type == "text" and final.content[0].text == text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.cache_read_input_tokens


def test_the_first_event_tells_what_was_cached(client: Anthropic) -> None:
    asked: Any = {"model": "godwit", "max_tokens": 4, "extra_body": {"temperature": 0}}
    asked["messages"] = [{"role": "user", "content": "How many feathers does a godwit have? " * 8}]
    seen = []
    for _ in range(2):
        with client.messages.create(**asked, stream=True) as stream:
            first, *_, delta, _ = stream
        assert first.type == "message_start" and delta.type == "message_delta"
        begun, ended = first.message.usage, delta.usage
        assert (begun.input_tokens, begun.output_tokens) == (ended.input_tokens, 0)
        assert begun.cache_read_input_tokens == ended.cache_read_input_tokens
        seen.append((begun.input_tokens, begun.cache_read_input_tokens or 0))
    assert seen[0][0] > 64 and seen[1] == (0, sum(seen[0]))


def test_blocks_stop_sequences_and_models(client: Anthropic) -> None:
    asked: Any = {"model": "godwit", "max_tokens": 20, "extra_body": {"temperature": 0}}
    blocks: Any = [{"type": "text", "text": "Hello!", "cache_control": {"type": "ephemeral"}}]
    whole = client.messages.create(**asked, messages=[{"role": "user", "content": blocks}])
    assert whole.content[0].type == "text"
    stop = whole.content[0].text[3:6]
    cut = client.messages.create(**asked, messages=HELLO, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert [model.id for model in client.models.list()] == ["godwit"]


def test_the_answer_can_be_begun(client: Anthropic, real: Running) -> None:
    begun: Any = [*HELLO, {"role": "assistant", "content": "Hello! My name is"}]
    answer = client.messages.create(
        model="godwit", max_tokens=6, messages=begun, extra_body={"temperature": 0}
    )
    assert answer.content[0].type == "text" and not answer.content[0].text.startswith("Hello! My")
    tokenizer = real.service.tokenizer
    ids = tokenizer.encode_chat(HELLO) + tokenizer.encode("Hello! My name is")
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == len(ids)
    with pytest.raises(anthropic.BadRequestError, match="whitespace"):
        client.messages.create(
            model="godwit", max_tokens=6, messages=[*HELLO, {"role": "assistant", "content": "A "}]
        )


def test_the_loop_of_a_tool(servers: Servers) -> None:
    with client_of(servers("tool")) as client:
        choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
        asked: Any = {"model": "any-model", "max_tokens": 50, "tools": [TOOL], "tool_choice": choice}
        first = client.messages.create(**asked, messages=HELLO)
        assert first.stop_reason == "tool_use"
        (use,) = first.content
        assert use.type == "tool_use" and (use.name, use.input) == ("get_time", CALL["arguments"])
        with client.messages.stream(**asked, messages=HELLO) as stream:
            streamed = stream.get_final_message()
        assert streamed.stop_reason == "tool_use"
        assert streamed.content[0].type == "tool_use" and streamed.content[0].input == CALL["arguments"]
        result: Any = {
            "type": "tool_result",
            "tool_use_id": use.id,
            "content": [{"type": "text", "text": "12:00"}],
        }
        turn: Any = [
            *HELLO,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ]
        done = client.messages.create(**asked, messages=turn)
        assert done.content[0].type == "text" and done.content[0].text == "Done."
        assert done.stop_reason == "end_turn"


def test_a_call_that_cannot_be_read_is_text(servers: Servers) -> None:
    with client_of(servers("broken")) as client:
        asked: Any = {"model": "broken", "max_tokens": 50, "tools": [TOOL], "messages": HELLO}
        whole = client.messages.create(**asked)
        assert whole.stop_reason == "end_turn"
        (block,) = whole.content
        assert block.type == "text" and block.text.startswith("<tool_call>")
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        assert final.stop_reason == "end_turn"
        assert final.content[0].type == "text" and final.content[0].text == block.text


def test_thinking_is_a_block_and_can_be_sent_back(servers: Servers) -> None:
    with client_of(servers("thinking")) as client:
        asked: Any = {
            "model": "thinking",
            "max_tokens": 50,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        }
        whole = client.messages.create(**asked, messages=HELLO)
        thought, said = whole.content
        assert thought.type == "thinking" and thought.thinking == "hm"
        assert said.type == "text" and said.text == "Yes."
        with client.messages.stream(**asked, messages=HELLO) as stream:
            kinds = [block.type for block in stream.get_final_message().content]
        assert kinds == ["thinking", "text"]
        again = client.messages.create(
            **asked, messages=[*HELLO, {"role": "assistant", "content": whole.content}, *HELLO]
        )
        assert (
            again.usage.input_tokens + (again.usage.cache_read_input_tokens or 0) > whole.usage.input_tokens
        )


def test_errors(servers: Servers) -> None:
    with client_of(servers("hello")) as client:
        asked: Any = {"model": "hello", "max_tokens": 5, "messages": HELLO}
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(**asked | {"model": "other"})
        body: Any = missing.value.body
        assert body["type"] == "error" and body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            client.messages.create(**asked | {"max_tokens": 0})
        image: Any = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:9/a.png"}}
        with pytest.raises(anthropic.BadRequestError, match="nothing is fetched"):
            client.messages.create(**asked | {"messages": [{"role": "user", "content": [image]}]})
        search: Any = {"type": "web_search_20250305", "name": "web_search"}
        for more in (
            {"tool_choice": {"type": "any"}},
            {"tool_choice": {"type": "tool", "name": "other"}, "tools": [TOOL]},
            {"tools": [search]},
            {"extra_body": {"mcp_servers": [{"url": "http://127.0.0.1:9"}]}},
            {"extra_body": {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}},
        ):
            with pytest.raises(anthropic.BadRequestError):
                client.messages.create(**asked, **more)


def test_answers_that_fit_a_schema_and_tools_that_have_to_be_used(client: Anthropic) -> None:
    # Forms of a few tokens, one call at most: whatever a small model draws, it ends before the limit does.
    asked: Any = {"model": "godwit", "max_tokens": 400, "messages": HELLO}
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form: Any = {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}}
    said = client.messages.create(**asked, output_config=form).content[0]
    assert said.type == "text" and set(json.loads(said.text)) == {"ok"}
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    asked["tools"] = [{**TOOL, "input_schema": {**city, "additionalProperties": False}}]
    asked["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": True}
    either = client.messages.create(**asked, output_config=form)
    for block in either.content:
        assert block.type == "tool_use" or (block.type == "text" and set(json.loads(block.text)) == {"ok"})
    asked["tool_choice"] = {"type": "tool", "name": "get_time", "disable_parallel_tool_use": True}
    used = client.messages.create(**asked)
    assert used.stop_reason == "tool_use"
    (call,) = used.content
    assert call.type == "tool_use" and call.name == "get_time"
    assert call.input in ({"city": "Paris"}, {"city": "Rome"})
