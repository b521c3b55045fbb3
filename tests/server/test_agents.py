"""The loop of an agent through real clients: call, result, answer, form, next turn, with five templates.

The weights are the packaged ones, which write whatever they like; what has to hold is the protocol.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic
from openai import OpenAI

from godwit.cli import common
from godwit.engine import Engine
from godwit.models.causal_lm import CausalLM
from tests.server.conftest import Running, running
from tests.server.templates import TEMPLATES

PACKAGED = Path(common.__file__).parents[1] / "default_model"
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
OK = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
RULES = "You help with the time. " + "Answer in one short sentence, and be kind. " * 12
CALM: Any = {"chat_template_kwargs": {"enable_thinking": False}}
THINKERS = [name for name, template in TEMPLATES.items() if "<think>" in template]


@pytest.fixture(scope="module")
def weights() -> CausalLM:
    return common.load_weights(common.open_model(None).source)


@pytest.fixture(scope="module", params=TEMPLATES)
def server(
    request: pytest.FixtureRequest, weights: CausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server with the packaged weights and another template."""
    folder = tmp_path_factory.mktemp(request.param)
    for file in PACKAGED.iterdir():
        if file.suffix != ".jinja":
            shutil.copyfile(file, folder / file.name)
    (folder / "chat_template.jinja").write_text(TEMPLATES[request.param])
    opened = common.open_model(str(folder))
    engine = Engine(weights, opened.tokenizer, max_context=2048, max_bytes=128 << 20, max_sequences=4)
    with running(engine, names=(request.param,), sampling={"temperature": 0.0}) as server:
        yield server


@pytest.fixture
def openai(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def claude(server: Running) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_chat(server: Running, openai: OpenAI) -> None:
    """Call, result, a late system message, answer; each turn goes on where the last one ended."""
    tool = {"type": "function", "function": {"name": "get_time", "parameters": CITY}}
    asked: Any = {"model": server.service.settings.name, "tools": [tool], "extra_body": CALM}
    talk: Any = [
        {"role": "system", "content": RULES},
        {"role": "developer", "content": "The tool is always right."},
        {"role": "user", "content": "What time is it in Oslo?"},
    ]
    create = openai.chat.completions.create
    first = create(**asked, messages=talk, max_tokens=300, tool_choice="required", parallel_tool_calls=False)
    calls = first.choices[0].message.tool_calls or []
    assert len(calls) == 1
    call = calls[0]
    assert first.choices[0].finish_reason == "tool_calls" and call.type == "function"
    assert call.function.name == "get_time" and set(json.loads(call.function.arguments)) == {"city"}
    talk.append(first.choices[0].message.model_dump())  # with all its nulls
    talk.append({"role": "tool", "tool_call_id": call.id, "content": "14:05"})
    talk.append({"role": "system", "content": "Name the city."})
    second = create(**asked, messages=talk, max_tokens=8, tool_choice="none", stop=["<tool_call>"])
    assert second.choices[0].finish_reason in ("stop", "length")
    third = create(**asked, messages=talk, max_tokens=8)
    talk.append(third.choices[0].message.model_dump())
    talk.append({"role": "user", "content": "And in Rome?"})
    fourth = create(**asked, messages=talk, max_tokens=8)
    for one, before in ((third, first), (fourth, third)):
        assert one.usage is not None and before.usage is not None
        assert one.usage.prompt_tokens_details is not None
        assert (one.usage.prompt_tokens_details.cached_tokens or 0) > before.usage.prompt_tokens - 80


def test_a_form(server: Running, openai: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": OK}}
    answer = openai.chat.completions.create(
        model=server.service.settings.name,
        messages=[{"role": "user", "content": "Is it late?"}],
        max_tokens=200,
        response_format=form,
        extra_body=CALM,
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"ok"}


def test_thoughts_are_sent_back(server: Running, openai: OpenAI) -> None:
    """What an answer thought is a part of the next prompt, where the template keeps it."""
    name = server.service.settings.name
    asked: Any = {"model": name, "max_tokens": 8}
    talk: Any = [{"role": "user", "content": "Think!"}]
    message = openai.chat.completions.create(**asked, messages=talk).choices[0].message.model_dump()
    assert message.get("reasoning_content") or name != "qwen3.5"
    talk += [message | {"reasoning_content": "Hm, a secret."}, {"role": "tool", "content": "1"}]
    with server.client() as client:
        ids = client.post("/tokenize", json={"messages": talk}).json()["tokens"]
    assert ("a secret." in server.service.tokenizer.decode(ids)) == (name in THINKERS)
    goes_on = openai.chat.completions.create(**asked, messages=talk)
    assert goes_on.choices[0].finish_reason in ("stop", "length")


def test_a_message(server: Running, claude: Anthropic) -> None:
    """The same loop as Claude Code has it: a changing first line, thinking off, a late system message."""
    tool = {"name": "get_time", "input_schema": CITY}
    asked: Any = {"model": server.service.settings.name, "tools": [tool], "thinking": {"type": "disabled"}}

    def system(cch: str) -> Any:
        line = f"x-anthropic-billing-header: cc_version=2.1.54.a1f; cc_entrypoint=cli; cch={cch};"
        return [{"type": "text", "text": line}, {"type": "text", "text": RULES}]

    talk: Any = [{"role": "user", "content": "What time is it in Rome?"}]
    talk.append({"role": "system", "content": "No skills are there."})
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    first = claude.messages.create(
        **asked, system=system("aaaaa"), messages=talk, max_tokens=300, tool_choice=choice
    )
    (use,) = first.content
    assert use.type == "tool_use" and use.name == "get_time" and first.stop_reason == "tool_use"
    talk.append({"role": "assistant", "content": [use.model_dump()]})
    shot = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0="}}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "1"}, shot]}
    talk.append({"role": "user", "content": [result]})
    second = claude.messages.create(**asked, system=system("bbbbb"), messages=talk, max_tokens=8)
    assert second.stop_reason in ("end_turn", "max_tokens", "tool_use")
    assert (second.usage.cache_read_input_tokens or 0) > first.usage.input_tokens - 80


def test_a_response(server: Running, openai: OpenAI) -> None:
    """The same loop as Codex has it: instructions and a developer's message."""
    tool: Any = {"type": "function", "name": "get_time", "parameters": CITY, "strict": True}
    asked: Any = {
        "model": server.service.settings.name,
        "instructions": RULES,
        "tools": [tool],
        "reasoning": {"effort": "none"},
        "parallel_tool_calls": False,
    }
    talk: Any = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be exact."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What time is it?"}]},
    ]
    first = openai.responses.create(**asked, input=talk, max_output_tokens=300, tool_choice="required")
    (call,) = first.output
    assert call.type == "function_call" and call.name == "get_time"
    talk.append(call.model_dump())
    talk.append({"type": "function_call_output", "call_id": call.call_id, "output": "14:05"})
    second = openai.responses.create(**asked, input=talk, max_output_tokens=8)
    assert second.status in ("completed", "incomplete")
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens - 80
