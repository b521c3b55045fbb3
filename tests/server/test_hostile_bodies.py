"""Bodies that were made to take long: how much of them is looked at, and where."""

from __future__ import annotations

import inspect
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from godwit.server import app
from godwit.server import body as body_module
from godwit.server.anthropic.schemas import MessagesRequest
from godwit.server.body import LONG, explain
from godwit.server.errors import ApiError
from godwit.server.fields import BodyContext
from godwit.server.json_body import parse_object
from godwit.server.limits import Limits
from godwit.server.openai.response_schemas import ResponsesRequest
from godwit.server.openai.response_tools import offered
from godwit.server.openai.schemas import MAX_BIASES, ChatRequest
from godwit.server.openai.text_schemas import CompletionRequest, DetokenizeRequest, TokenizeRequest
from godwit.server.prompts import (
    PROMPT_WORKERS,
    RESERVED,
    Conversation,
    PromptMaker,
    check_variables,
    num_chars,
)
from godwit.text.chat_template import ChatTemplate
from godwit.text.template_worker import build_environment
from godwit.text.tokenizer import Tokenizer
from tests.engine.tiny import tiny_tokenizer
from tests.server.conftest import Engines, Running, running
from tests.server.test_life import wait

N = 3000
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}
CLAUDE: dict[str, Any] = HELLO | {"model": "m", "max_tokens": 1}
Case = tuple[type[BaseModel], dict[str, Any]]
#: By what there are thousands of; all but one or two of the errors could be found in each item.
CASES: dict[str, Case] = {
    "negative ids": (CompletionRequest, {"prompt": [-1] * N}),
    "ids that are none": (CompletionRequest, {"prompt": [1, *[True] * N]}),
    "lists in place of ids": (CompletionRequest, {"prompt": [[[[]]] for _ in range(N)]}),
    "prompts": (CompletionRequest, {"prompt": [[-1] * N for _ in range(16)]}),
    "tokens": (DetokenizeRequest, {"tokens": ["x"] * N}),
    "names of biases": (ChatRequest, HELLO | {"logit_bias": {f"x{n}": 0 for n in range(N)}}),
    "stop texts": (ChatRequest, HELLO | {"stop": [""] * N}),
    "stop ids": (ChatRequest, HELLO | {"stop_token_ids": [-1] * N}),
    "messages": (ChatRequest, {"messages": [{"role": 1, "content": 1, "name": 1}] * N}),
    "messages to count": (TokenizeRequest, {"messages": [{}] * N}),
    "parts": (ChatRequest, {"messages": [{"role": "user", "content": [{}] * N}]}),
    "calls": (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [{}] * 256}] * 99}),
    "tools": (ChatRequest, HELLO | {"tools": [{}] * 256}),
    "allowed tools": (
        ChatRequest,
        HELLO
        | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [1] * 256}}},
    ),
    "choices": (ChatRequest, HELLO | {"structured_outputs": {"choice": [1] * N}}),
    "modalities": (ChatRequest, HELLO | {"modalities": ["audio"] * N}),
    "unknown fields": (ChatRequest, HELLO | {f"x{n}": 0 for n in range(N)}),
    "unknown fields of Anthropic's": (MessagesRequest, CLAUDE | {f"x{n}": 0 for n in range(N)}),
    "blocks": (MessagesRequest, CLAUDE | {"messages": [{"role": "user", "content": [{}] * N}]}),
    "blocks without text": (
        MessagesRequest,
        CLAUDE | {"messages": [{"role": "user", "content": [{"type": "text"}] * N}]},
    ),
    "edits": (MessagesRequest, CLAUDE | {"context_management": {"edits": [{}] * N}}),
    "Anthropic's tools": (MessagesRequest, CLAUDE | {"tools": [{}] * 256}),
    "items": (ResponsesRequest, {"input": [{}] * N}),
    "thoughts": (ResponsesRequest, {"input": [{"type": "reasoning", "content": [{"text": 1}] * N}]}),
    "tools in groups": (
        ResponsesRequest,
        {"input": "x", "tools": [{"type": "namespace", "name": "n", "tools": [{}] * 256}] * 99},
    ),
    "what to include": (ResponsesRequest, {"input": "x", "include": [""] * N}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_checking_ends_at_the_first_fault(name: str) -> None:
    kind, body = CASES[name]
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body, context=BodyContext())
    assert error.value.error_count() < 10
    assert explain(error.value).status == 400


def test_the_first_fault_is_told() -> None:
    def told(kind: type[BaseModel], **body: Any) -> str:
        with pytest.raises(ValidationError) as error:
            kind.model_validate(body, context=BodyContext())
        return explain(error.value).message

    assert "`prompt.1`: Input should be greater" in told(CompletionRequest, prompt=[1, -1, -1])
    assert "`prompt.1.0`: Input should be greater" in told(CompletionRequest, prompt=["a", [-1]])
    assert "`prompt`: Input should be a valid string" in told(CompletionRequest, prompt=7)
    assert "at least 1 item" in told(CompletionRequest, prompt=[])
    assert told(ChatRequest, **HELLO, a=1, b=1).startswith("`a`: unknown field")
    assert f"{MAX_BIASES}" in told(ChatRequest, **HELLO, logit_bias={str(n): 0 for n in range(2000)})


@pytest.mark.parametrize("prompt", ["", "a", [0], [1, 2], ["a", "b"], [[1], [2]], ["a", [1, 2]]])
def test_all_forms_of_prompts_are_taken(prompt: Any) -> None:
    asked = CompletionRequest.model_validate({"prompt": prompt})
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert asked.prompts() == (prompt if many else [prompt])


class TestSize:
    LIMITS = Limits(containers=4, values=8)

    def test_at_the_limits(self) -> None:
        for body in (b'{"a": [[], {}]}', b'{"a": [1, 2, 3, 4, 5, 6]}'):
            parse_object(body, self.LIMITS)

    @pytest.mark.parametrize("body", ['{"a": [[], {}, []]}', '{"a": [1, 2, 3, 4, 5, 6, 7]}'])
    def test_beyond_them(self, body: str) -> None:
        with pytest.raises(ApiError, match="the body has more than") as error:
            parse_object(body.encode(), self.LIMITS)
        assert error.value.status == 400

    @pytest.mark.parametrize("text", ["[" * 99, "{,}" * 99, '",[' * 99, "\\" * 99 + ",,", '\\",,\n[', "é[[,"])
    def test_texts_do_not_count(self, text: str) -> None:
        body = {"a": text, text: [text]}
        assert parse_object(json.dumps(body).encode(), self.LIMITS) == body
        assert parse_object(json.dumps(body, ensure_ascii=False).encode(), self.LIMITS) == body

    @pytest.mark.parametrize(
        "body", [b'{"a' + b"[" * 99, b'{"' + b'\\"' * 9999 + b",", b'"' * 9999 + b"[[[[[,"]
    )
    def test_what_is_no_json_is_refused(self, body: bytes) -> None:
        with pytest.raises(ApiError):
            parse_object(body, self.LIMITS)

    def test_more_context_takes_more_values(self) -> None:
        assert Limits.of(1 << 20).values > Limits.of(1024).values == Limits().values


def test_tools_with_the_same_name_are_found_however_many_there_are() -> None:
    group = {"type": "namespace", "tools": [{"type": "function", "name": f"f{n}"} for n in range(256)]}
    tools = [group | {"name": f"g{n}"} for n in range(40)]
    asked = ResponsesRequest.model_validate({"input": "x", "tools": tools})
    assert len(offered(asked.tools)) == 40 * 256
    with pytest.raises(ApiError, match="g3__f0"):
        offered([*asked.tools, asked.tools[3]])


class TestVariables:
    @pytest.mark.parametrize("name", ["self", "messages", "range", "bos_token", "a b", "", "1", "loop", "é-"])
    def test_names_that_clash_are_refused(self, name: str) -> None:
        with pytest.raises(ApiError) as error:
            check_variables({name: 1})
        assert error.value.status == 400

    def test_all_names_of_what_renders_are_known(self) -> None:
        own: set[str] = set(build_environment().globals)
        for function in (Tokenizer.encode_chat, ChatTemplate.render):
            own |= inspect.signature(function).parameters.keys() - {"kwargs"}
        assert own <= RESERVED

    def test_they_are_refused_by_all_addresses(self, engines: Engines) -> None:
        bodies = {
            "/v1/chat/completions": HELLO,
            "/tokenize": HELLO,
            "/v1/messages": CLAUDE,
            "/v1/messages/count_tokens": HELLO | {"model": "m"},
            "/v1/responses": {"input": "Hello!"},
        }
        with running(engines("hello"), names=("m",)) as server, server.client() as client:
            for path, body in bodies.items():
                response = client.post(path, json=body | {"chat_template_kwargs": {"self": 1}})
                assert response.status_code == 400 and "chat_template_kwargs" in response.text
            usual = HELLO | {"chat_template_kwargs": {"enable_thinking": False, "x": 1.5}}
            assert client.post("/tokenize", json=usual).status_code == 200


class TestTexts:
    PLACES: tuple[dict[str, Any], ...] = (
        {"messages": [{"role": "user", "content": "x" * 99}]},
        {"messages": [{"role": "assistant", "content": "", "reasoning_content": "x" * 99}]},
        {"messages": [{"role": "tool", "content": "", "name": "x" * 99}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "x" * 99}}]}]},
        {"messages": [], "tools": [{"function": {"name": "f", "description": "x" * 99}}]},
        {"messages": [], "tools": [{"function": {"parameters": {"properties": {"x" * 99: {}}}}}]},
        {"messages": [], "tools": [{"function": {"parameters": {"enum": ["x" * 99]}}}]},
        {"messages": [], "variables": {"custom": "x" * 99}},
        {"messages": [], "prefill": "x" * 99},
        {"messages": [], "thoughts": "x" * 99},
    )  # fmt: skip

    @pytest.mark.parametrize("fields", PLACES)
    def test_all_that_is_rendered_counts(self, fields: dict[str, Any]) -> None:
        assert 99 <= num_chars(Conversation(**fields)) < 199
        prompts = PromptMaker(tiny_tokenizer(), 1)
        assert prompts.max_chars < 99
        with pytest.raises(ApiError, match="maximum context length") as error:
            prompts.chat(Conversation(**fields))
        assert error.value.code == "context_length_exceeded"


@pytest.fixture
def server(engines: Engines) -> Iterator[Running]:
    with running(engines("hello"), names=("m",)) as one:
        yield one


class Gate:
    """Holds up the threads that come to it until it is opened."""

    def __init__(self) -> None:
        self.came = threading.Semaphore(0)
        self.opened = threading.Event()

    def wait(self) -> None:
        self.came.release()
        assert self.opened.wait(60)


def test_long_bodies_are_checked_beside_the_event_loop(server: Running, monkeypatch: Any) -> None:
    gate, threads, check = Gate(), [], body_module.checked

    def held(kind: Any, body: bytes, *rest: Any) -> Any:
        threads.append(threading.current_thread())
        if len(body) >= LONG:
            gate.wait()
        return check(kind, body, *rest)

    monkeypatch.setattr(body_module, "checked", held)
    answers: list[httpx.Response] = []

    def send() -> None:
        with server.client() as client:
            answers.append(client.post("/tokenize", json={"prompt": "a " * LONG, "add_special_tokens": 7}))

    sender = threading.Thread(target=send)
    with server.client() as client:
        sender.start()
        assert gate.came.acquire(timeout=60)
        assert (
            client.post("/tokenize", json={"prompt": "a"}).status_code == 200
        )  # others are served meanwhile
        gate.opened.set()
        sender.join()
    assert threads[0] is not server.thread and threads[1] is server.thread
    assert answers[0].status_code == 400 and "add_special_tokens" in answers[0].text


def test_a_client_that_leaves_gives_up_its_place_before_the_prompt(server: Running, monkeypatch: Any) -> None:
    gate, made, make = Gate(), [], server.service.prompts.maker.text

    def held(text: str, **rest: Any) -> Any:
        made.append(text)
        gate.wait()
        return make(text, **rest)

    monkeypatch.setattr(server.service.prompts.maker, "text", held)
    lines = server.service.prompts._queue._lines

    def begin(text: str) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0))
        body = json.dumps({"prompt": text}).encode()
        head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return client

    under_way = [begin(f"begun {n}") for n in range(PROMPT_WORKERS)]
    for _ in under_way:
        assert gate.came.acquire(timeout=60)
    waiting = [begin(f"waiting {n}") for n in range(5)]
    wait(lambda: len(lines) == 5)
    for client in waiting:
        client.close()
    wait(lambda: len(lines) == 0)
    gate.opened.set()
    for client in under_way:
        assert client.recv(99).startswith(b"HTTP/1.1 200")
        client.close()
    assert sorted(made) == ["begun 0", "begun 1"]


def test_ids_are_written_as_json(server: Running, monkeypatch: Any) -> None:
    monkeypatch.setattr(app, "_BATCH", 7)
    with server.client() as client:
        for text in ("", "a", "a b " * 99):
            told = client.post("/tokenize", json={"prompt": text}).json()
            assert told["tokens"] == server.service.tokenizer.encode(text, allow_special=True)
            assert told["count"] == len(told["tokens"]) and told["max_model_len"]


def test_arguments_of_too_many_values_are_refused_before_they_are_parsed(server: Running) -> None:
    def send(client: httpx.Client, arguments: str) -> httpx.Response:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        return client.post(
            "/tokenize", json={"messages": [*HELLO["messages"], *messages, *HELLO["messages"]]}
        )

    many = "[" + "[]," * 70_000 + "[]]"
    use = {"type": "tool_use", "id": "1", "name": "f", "input": many}
    messages = [*HELLO["messages"], {"role": "assistant", "content": [use]}, *HELLO["messages"]]
    with server.client() as client:
        for refused in (
            send(client, many),
            send(client, json.dumps(many)),  # JSON within a string is decoded, too
            client.post("/v1/messages/count_tokens", json={"model": "m", "messages": messages}),
        ):
            assert refused.status_code == 400
            assert "the arguments of a call have more than 131072 values" in refused.text
        assert "the arguments" not in send(client, "[" + "[]," * 60_000 + "[]]").text
