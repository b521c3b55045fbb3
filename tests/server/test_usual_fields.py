"""Fields and addresses as programs made for other servers send them, and errors as they look for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from godwit.cli import common
from godwit.engine import Engine
from godwit.server.openai.fim import Fim
from tests.engine.tiny import TEMPLATE, tiny_tokenizer, write_chain_model
from tests.server.conftest import Engines, Running, Servers, running
from tests.server.openai_steps import HELLO, client_of

NEUTRAL: dict[str, Any] = {
    "cache_prompt": True,
    "skip_special_tokens": True,
    "add_generation_prompt": True,
    "add_special_tokens": False,
    "include_stop_str_in_output": False,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "typical_p": 1,
    "mirostat": 0,
    "priority": 0,
    "verbosity": "low",
    "best": None,
}


def told(client: OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="hello", messages=HELLO, extra_body=more).choices[0]


def test_what_changes_nothing_is_taken(servers: Servers) -> None:
    with client_of(servers("hello")) as client:
        assert told(client, **NEUTRAL).message.content == "Hello there."
        assert told(client, max_tokens=-1, top_k=-1, top_p=0).message.content == "Hello there."
        assert told(client, max_completion_tokens=-1).finish_reason == "stop"


def test_no_limit_goes_beyond_the_servers_own(engines: Engines) -> None:
    with running(
        engines("endless", max_context=64), names=("endless",), sampling={"max_tokens": 3}
    ) as server:
        asked: Any = {"model": "endless", "messages": HELLO}
        with client_of(server) as client:
            own = client.chat.completions.create(**asked).usage
            free = client.chat.completions.create(**asked, max_tokens=-1).usage
            plain = client.completions.create(model="endless", prompt="\n", max_tokens=-1).usage
            response: Any = client.responses.create(model="endless", input="Hi", max_output_tokens=-1)
    assert own is not None and free is not None and plain is not None
    assert own.completion_tokens == 3
    assert free.total_tokens == plain.total_tokens == response.usage.total_tokens == 64
    assert response.max_output_tokens is None


def test_a_top_p_of_zero_takes_the_likeliest(client: OpenAI) -> None:
    asked: Any = {"model": "godwit", "messages": HELLO, "max_tokens": 8}
    greedy = client.chat.completions.create(**asked, temperature=0).choices[0].message.content
    assert (
        client.chat.completions.create(**asked, temperature=2, top_p=0).choices[0].message.content == greedy
    )


def test_stop_tokens_can_be_passed_over_and_added(servers: Servers) -> None:
    server = servers("hello")
    there = server.service.tokenizer.token_to_id(" there.")
    with client_of(server) as client:
        on = told(client, ignore_eos=True, max_tokens=9)
        assert on.finish_reason == "length" and on.message.content.startswith("Hello there.")
        early = told(client, stop_token_ids=[there])
        assert (early.finish_reason, early.message.content) == ("stop", "Hello")
        both = told(client, ignore_eos=True, stop_token_ids=[there])
        assert (both.finish_reason, both.message.content) == ("stop", "Hello")
        for more in ({"min_tokens": 5}, {"min_tokens": 5, "stop_token_ids": [there]}):
            answer = client.chat.completions.create(
                model="hello", messages=HELLO, extra_body={**more, "max_tokens": 9, "temperature": 0}
            )
            assert answer.usage is not None and answer.usage.completion_tokens >= 5
        late = told(client, min_tokens=2, stop=["Hel", " the"])
        assert (late.message.content, late.finish_reason) == ("Hello", "stop")


def test_a_form_ends_though_more_tokens_were_asked_for(client: OpenAI) -> None:
    extra = {"min_tokens": 30, "structured_outputs": {"choice": ["yes", "no"]}}
    answer = client.chat.completions.create(model="godwit", messages=HELLO, extra_body=extra, max_tokens=40)
    assert answer.choices[0].message.content in ("yes", "no")


def test_a_schema_is_taken_where_servers_look_for_it(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for kind in ("json_object", "json_schema"):
        form: Any = {"type": kind, "schema": schema}
        answer = client.chat.completions.create(
            model="godwit", messages=HELLO, response_format=form, max_tokens=60
        )
        assert json.loads(answer.choices[0].message.content or "")["a"] in ("x", "y")
    text: Any = {"type": "text", "schema": schema}
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        client.chat.completions.create(model="godwit", messages=HELLO, response_format=text)


def test_completions_have_the_keys_of_the_reference(servers: Servers) -> None:
    with client_of(servers("hello")) as client:
        asked: Any = {"model": "hello", "messages": HELLO}
        whole = client.chat.completions.create(**asked)
        with client.chat.completions.create(**asked, stream=True) as stream:
            chunks = list(stream)
        plain = client.completions.create(model="hello", prompt="\n")
    assert whole.choices[0].message.annotations == []
    prints = {one.system_fingerprint for one in (whole, plain, *chunks)}
    assert len(prints) == 1 and re.fullmatch("fp_[0-9a-f]{10}", prints.pop() or "")


# control tokens in plain prompts


def test_control_tokens_in_prompts_are_read_where_it_is_asked_for(servers: Servers) -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with client_of(servers("hello")) as client:
        usage = []
        for parse in (False, True):
            answer = client.completions.create(
                model="hello", prompt=prompt, extra_body={"parse_special": parse}, max_tokens=5
            )
            assert answer.choices[0].text == "Hello there." and answer.usage is not None
            usage.append(answer.usage.prompt_tokens)
        chat = client.chat.completions.create(model="hello", messages=[{"role": "user", "content": "Hi"}])
    assert chat.usage is not None and usage[0] > usage[1] == chat.usage.prompt_tokens


FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model fills gaps."""
    follow = {"<|fim_middle|>": "x = 1", "x = 1": "<|fim_pad|>", "<|fim_pad|>": "<|fim_pad|>"}
    follow |= {"<|fim_prefix|>": "<|fim_pad|>", "<|fim_suffix|>": "<|fim_pad|>"}
    path = write_chain_model(tmp_path_factory.mktemp("fim") / "model", follow)
    opened = common.open_model(str(path))
    engine = Engine(
        common.load_weights(opened.source),
        opened.tokenizer,
        max_context=256,
        max_bytes=32 << 20,
        max_sequences=4,
    )
    with running(engine, names=("filler",)) as server:
        yield server


def test_a_gap_is_filled(filler: Running) -> None:
    tokenizer = filler.service.tokenizer
    with client_of(filler) as client:
        asked: Any = {"model": "filler", "suffix": "\nprint(x)", "max_tokens": 20, "temperature": 0}
        for prompt in ("# set x\n", tokenizer.encode("# set x\n")):
            answer = client.completions.create(prompt=prompt, **asked)
            assert answer.choices[0].text == "x = 1" and answer.choices[0].finish_reason == "stop"
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == 3 + len(tokenizer.encode("# set x\n\nprint(x)"))
        with pytest.raises(openai.BadRequestError, match="echo"):
            client.completions.create(prompt="a", echo=True, **asked)


def test_a_model_that_cannot_fill_gaps_says_so(servers: Servers) -> None:
    with (
        client_of(servers("hello")) as client,
        pytest.raises(openai.BadRequestError, match="fill-in-the-mid"),
    ):
        client.completions.create(model="hello", prompt="a", suffix="b")
    assert Fim.of(tiny_tokenizer()) is None


# addresses


def test_addresses_do_without_their_version(servers: Servers) -> None:
    chat = {"messages": HELLO}
    bodies: dict[str, Any] = {
        "/chat/completions": chat,
        "/completions": {"prompt": "\n"},
        "/responses": {"input": "Hi"},
        "/messages": chat | {"model": "hello", "max_tokens": 4},
        "/messages/count_tokens": chat | {"model": "hello"},
    }
    with servers("hello").client() as client:
        for path, body in bodies.items():
            short, long = client.post(path, json=body), client.post(f"/v1{path}", json=body)
            assert (short.status_code, short.json().keys()) == (200, long.json().keys())
        assert client.get("/models").json() == client.get("/v1/models").json()
        assert client.get("/models/hello").json()["id"] == "hello"
        assert client.post("/messages", json={}).json()["type"] == "error"
        assert client.post("/messagesx", json={}).json()["error"]["type"] == "invalid_request_error"


def test_evaluation_programs_find_the_tokenizer(servers: Servers) -> None:
    with servers("hello").client() as client:
        info = client.get("/tokenizer_info").json()
        asked = {"prompt": info["eos_token"], "add_special_tokens": False}
        ids = client.post("/tokenize", json=asked).json()["tokens"]
    assert info["eos_token"] == "<|im_end|>" and ids == info["eos_token_ids"]
    assert info["bos_token"] is None and info["pad_token"] is None
    assert info["chat_template"] == TEMPLATE and info["tokenizer_class"]
    assert info["model_max_length"] == 1024


# errors


@pytest.fixture
def narrow(engines: Engines) -> Iterator[httpx.Client]:
    with running(engines("hello", max_context=64), names=("*",)) as server, server.client() as client:
        yield client


@pytest.mark.parametrize("size", [60, 5000])
def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_know(
    narrow: httpx.Client, size: int
) -> None:
    messages = [{"role": "user", "content": "x" * size}]
    asked: Any = {"model": "m", "max_tokens": 7}
    words = (
        r"This model's maximum context length is 64 tokens\. "
        r"However, you requested (\d+) tokens \((\d+) in the "
    )
    for path, body in (
        ("chat/completions", {"messages": messages}),
        ("completions", {"prompt": "x" * (size + 10)}),
        ("responses", {"input": "x" * size, "max_output_tokens": 7}),
    ):
        more = body if path == "responses" else {"max_tokens": 7, **body}
        sent = narrow.post(f"/v1/{path}", json={"model": "m", **more})
        error = sent.json()["error"]
        found = re.match(words, error["message"])
        assert sent.status_code == 400 and error["code"] == "context_length_exceeded"
        assert found is not None and int(found[1]) > int(found[2]) >= 64, error["message"]
    sent = narrow.post("/v1/messages", json={**asked, "messages": messages})
    found = re.fullmatch(r"prompt is too long: (\d+) tokens > 64 maximum", sent.json()["error"]["message"])
    assert sent.status_code == 400 and found is not None and int(found[1]) > 64


def test_more_tokens_than_there_is_room_for_are_no_error(narrow: httpx.Client) -> None:
    asked = {"messages": HELLO, "max_tokens": 100_000}
    assert narrow.post("/v1/chat/completions", json=asked).status_code == 200


# Anthropic


def test_anthropic_replies_have_no_empty_citations(servers: Servers) -> None:
    asked: Any = {"model": "any-model", "max_tokens": 9, "messages": HELLO}
    with servers("hello").client() as client:
        body = client.post("/v1/messages", json=asked).json()
    assert body["content"] == [{"type": "text", "text": "Hello there."}]


def test_the_form_of_an_anthropic_reply_by_either_name(real: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "schema": schema}
    asked: Any = {"model": "godwit", "max_tokens": 60, "messages": HELLO}
    with real.client() as client:
        for more in ({"output_format": form}, {"output_format": form, "output_config": {"format": form}}):
            body = client.post("/v1/messages", json=asked | more).json()
            assert json.loads(body["content"][0]["text"]) == {"a": 1}
        other = {"output_config": {"format": {**form, "schema": {}}}, "output_format": form}
        assert client.post("/v1/messages", json=asked | other).status_code == 400
