"""The real client of OpenAI, with the packaged model and with models whose answers are known."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.engine.alone import logits_after
from tests.engine.tiny import CALL
from tests.server.conftest import Running, Servers
from tests.server.openai_steps import FIND, HELLO, SAN_JOSE, TOOL, client_of


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


def rounding(server: Running) -> float:
    """How far company may move a probability's logarithm: PyTorch's products depend on the number of rows."""
    return 1e-6 if server.engine.model.stack is not None else 1e-4


def test_the_probabilities_of_a_prompt(client: OpenAI, real: Running) -> None:
    text = "The capital of France is Paris, and \u2603 snows."
    tokenizer = real.service.tokenizer
    ids = tokenizer.encode(text)
    wanted = []
    for place, token in enumerate(ids[1:], 1):
        logits = logits_after(real.engine.model, ids[:place])[: tokenizer.vocab_size]
        wanted.append(logits.float().log_softmax(-1)[token].item())
    asked: Any = {"model": "godwit", "echo": True, "logprobs": 2, "temperature": 0}
    for prompt in (text, ids, [ids, ids]):
        answer = client.completions.create(**asked, prompt=prompt, max_tokens=0)
        for choice in answer.choices:
            found = choice.logprobs
            assert choice.text == text and choice.finish_reason == "length" and found is not None
            assert found.token_logprobs is not None and found.token_logprobs[0] is None
            assert found.token_logprobs[1:] == pytest.approx(wanted, abs=rounding(real))
            assert len(found.tokens or []) == len(ids)
            before = [tokenizer.decode(ids[:i]).rstrip("\ufffd") for i in range(len(ids))]
            assert found.text_offset == [*map(len, before)]
            for token, value, top in zip(
                found.tokens or [], found.token_logprobs, found.top_logprobs or [], strict=True
            ):
                assert top is None if value is None else top[token] == value and 2 <= len(top) <= 3
        assert answer.usage is not None and answer.usage.completion_tokens == 0
        assert answer.usage.prompt_tokens == len(ids) * len(answer.choices)


def test_a_prompt_and_its_answer_are_scored_alike_in_streams(client: OpenAI, real: Running) -> None:
    asked: Any = {"model": "godwit", "prompt": "One, two,", "echo": True, "logprobs": 1, "temperature": 0}
    asked |= {"max_tokens": 3, "n": 2}
    whole = client.completions.create(**asked)
    with client.completions.create(**asked, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    for index, choice in enumerate(whole.choices):
        parts = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(part.text for part in parts) == choice.text
        known = [part.logprobs for part in parts if part.logprobs]
        assert choice.logprobs is not None and parts[0].text == "One, two,"
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [one for part in known for one in getattr(part, name)]
            expected = getattr(choice.logprobs, name)
            if real.engine.model.stack is not None or name in ("tokens", "text_offset"):
                assert joined == expected
            else:
                for one, other in zip(joined, expected, strict=True):
                    assert one == pytest.approx(other, abs=rounding(real))
        assert "".join(choice.logprobs.tokens or []) == choice.text
    scored = client.completions.create(**asked | {"prompt": whole.choices[0].text, "max_tokens": 0, "n": 1})
    first, again = whole.choices[0].logprobs, scored.choices[0].logprobs
    assert first is not None and again is not None
    if first.tokens == again.tokens:  # the same text may have other tokens
        assert again.token_logprobs == pytest.approx(first.token_logprobs, abs=rounding(real))


def test_a_stop_token_counts_where_prompts_are_scored(servers: Servers) -> None:
    server = servers("hello")
    ids = server.service.tokenizer.encode("\nHello there.", allow_special=True)
    with client_of(server) as client:
        asked: Any = {"model": "hello", "prompt": ids, "echo": True, "logprobs": 1, "temperature": 0}
        (choice,) = client.completions.create(**asked, max_tokens=1).choices
        with client.completions.create(**asked, max_tokens=1, stream=True) as stream:
            chunks = [chunk.choices[0].logprobs for chunk in stream]
    assert choice.logprobs is not None and choice.finish_reason == "stop"
    assert choice.logprobs.tokens == ["\n", "Hello", " there.", "<|im_end|>"]
    assert [token for part in chunks if part for token in part.tokens or []] == choice.logprobs.tokens
    assert (choice.logprobs.token_logprobs or [])[2:] == pytest.approx([0, 0], abs=0.1)


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


def test_errors_are_those_of_the_reference(client: OpenAI) -> None:
    asked: Any = {"model": "godwit", "messages": HELLO}
    long: Any = {"messages": [{"role": "user", "content": "so " * 2100}]}
    image: Any = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}
    ]
    cases: list[tuple[Any, int, str | None, str | None]] = [
        ({"model": "gpt"}, 404, "model_not_found", "model"),
        (long, 400, "context_length_exceeded", None),
        ({"messages": image}, 400, None, "messages.0.content"),
        ({"messages": []}, 400, None, "messages"),
        ({"logit_bias": {"999999": 1}}, 400, None, None),
        ({"stream_options": {"include_usage": True}}, 400, None, None),
        ({"extra_body": {"unheard_of": 1}}, 400, None, "unheard_of"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}},
         400, None, "response_format"),
    ]  # fmt: skip
    for more, status, code, param in cases:
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(**asked | more)
        error = caught.value
        assert (error.status_code, error.type, error.code) == (status, "invalid_request_error", code), more
        assert error.param == param, more
        assert error.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.get("/nothing", cast_to=object)
    assert missing.value.type == "invalid_request_error"
    with pytest.raises(openai.APIStatusError) as wrong:
        client.get("/chat/completions", cast_to=object)
    assert wrong.value.status_code == 405 and wrong.value.response.headers["allow"] == "POST"


def test_streams_of_several_answers_with_usage(client: OpenAI) -> None:
    asked: Any = {"model": "godwit", "messages": HELLO, "n": 3, "seed": 3, "max_completion_tokens": 8}
    whole = client.chat.completions.create(**asked, user="u", store=False)
    options: Any = {"include_usage": True}
    with client.chat.completions.create(**asked, stream=True, stream_options=options) as stream:
        *chunks, last = stream
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own if one.finish_reason] == [choice.finish_reason]
    assert whole.usage is not None and last.usage is not None and not last.choices
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_the_developer_speaks_as_the_system(client: OpenAI) -> None:
    texts = set()
    for role in ("system", "developer"):
        parts: Any = [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]
        messages: Any = [{"role": role, "content": parts}, *HELLO]
        answer = client.chat.completions.create(
            model="godwit", messages=messages, max_tokens=8, temperature=0
        )
        assert answer.usage is not None
        texts.add((answer.choices[0].message.content, answer.usage.prompt_tokens))
    assert len(texts) == 1


def test_a_choice_among_some_of_the_tools(client: OpenAI) -> None:
    def allowed(mode: str, name: str) -> Any:
        tools = [{"type": "function", "function": {"name": name}}]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    asked: Any = {"model": "godwit", "messages": SAN_JOSE, "tools": [TOOL, FIND], "temperature": 0}
    asked |= {"parallel_tool_calls": False, "max_tokens": 80}
    for name in ("get_time", "find_restaurants"):
        answer = client.chat.completions.create(**asked, tool_choice=allowed("required", name))
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and call.function.name == name
    with pytest.raises(openai.BadRequestError, match="allows other"):
        client.chat.completions.create(**asked, tool_choice=allowed("auto", "other"))


def test_the_loop_of_a_tool_with_the_packaged_model(client: OpenAI) -> None:
    messages = list(SAN_JOSE)
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
