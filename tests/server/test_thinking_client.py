"""Thinking through the clients of OpenAI and Anthropic: efforts, budgets, and answers that are never empty.

The templates have the rules of Qwen3.5, which opens thinking in the prompt, and of Qwen3.8, which also reads
how much to think.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from anthropic import Anthropic
from openai import BadRequestError

from godwit.cli import common
from godwit.engine import Engine
from godwit.server.thinking import ThinkingMaker, ThinkingSettings, ThinkingWish
from godwit.text.chat_template import ChatTemplate
from tests.engine.tiny import write_chain_model
from tests.server.conftest import Running, running
from tests.server.openai_steps import HELLO, TOOL, client_of

CHATML = """
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- if m.reasoning_content %}{{- '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' }}{% endif %}
    {{- (m.content or '') ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
{%- if tools %}{{- '' }}{% endif %}
"""
EFFORT = """
{%- set effort = reasoning_effort if reasoning_effort is defined else 'xhigh' %}
{%- if effort not in ('low', 'medium', 'xhigh') %}{{- raise_exception('no such effort') }}{% endif %}
{{- {'low': 'brief.', 'medium': '', 'xhigh': 'think carefully.'}[effort] }}
"""
ENOUGH = "Enough."
#: Tells in which form the model calls tools.
CALLS = '{# <tool_call>{"name": NAME, "arguments": {}}</tool_call> #}'
#: After the blank line behind thinking comes the answer, before it only thoughts.
MODELS = {
    "endless": {"\n": "hm ", "hm ": "hm ", "\n\n": "Yes.", "Yes.": "<|im_end|>", "</think>": "\n\n"},
    "silent": {"\n": "hm.", "hm.": "<|im_end|>", "\n\n": "Yes.", "Yes.": "<|im_end|>", "</think>": "\n\n"},
    "twice": {"\n": "hm ", "hm ": "hm ", "\n\n": "</think>", "</think>": "Yes.", "Yes.": "<|im_end|>"},
    "effort": {"\n": "hm.", "hm.": "</think>", "\n\n": "Yes.", "Yes.": "<|im_end|>", "</think>": "\n\n"},
}
Serve = Callable[..., Running]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A server of one of the models with these settings for thinking."""
    made: dict[tuple[str, ThinkingSettings], Running] = {}
    with ExitStack() as stack:

        def start(name: str, **settings: Any) -> Running:
            thinking = ThinkingSettings(**({"message": ENOUGH} | settings))
            if (name, thinking) not in made:
                path = tmp_path_factory.mktemp("models") / name
                template = (EFFORT if name == "effort" else "") + CHATML + CALLS
                opened = common.open_model(str(write_chain_model(path, MODELS[name], template=template)))
                weights = common.load_weights(opened.source)
                engine = Engine(weights, opened.tokenizer, max_context=1024, max_bytes=32 << 20)
                made[name, thinking] = stack.enter_context(running(engine, names=(name,), thinking=thinking))
            return made[name, thinking]

        yield start


@pytest.fixture
def ask(serve: Serve) -> Iterator[Callable[..., Any]]:
    """A chat completion of a model."""
    with ExitStack() as stack:

        def send(name: str, settings: dict[str, Any] | None = None, **fields: Any) -> Any:
            client = stack.enter_context(client_of(serve(name, **(settings or {}))))
            return client.chat.completions.create(model=name, messages=HELLO, **fields)

        yield send


def told(answer: Any) -> tuple[str, str, int, str | None]:
    message, usage = answer.choices[0].message, answer.usage
    reasoning = getattr(message, "reasoning_content", "")
    return message.content, reasoning, usage.completion_tokens_details.reasoning_tokens, ended(answer)


def ended(answer: Any) -> str | None:
    reason: str | None = answer.timings["thinking_ended"]
    return reason


@pytest.mark.parametrize(
    "fields", [{"thinking_token_budget": 0}, {"thinking_budget_tokens": 0}, {"think": 0}]
)
def test_budgets_under_all_their_names(ask: Callable[..., Any], fields: dict[str, int]) -> None:
    nothing = told(ask("endless", extra_body=fields))
    assert nothing == ("Yes.", ENOUGH, len(ENOUGH) + 1, "budget")
    (name,) = fields
    content, reasoning, count, why = told(ask("endless", extra_body={name: 3}))
    assert (content, why) == ("Yes.", "budget") and count == 3 + 32 + len("\n" + ENOUGH + "\n")
    assert reasoning == "hm " * 35 + "\n" + ENOUGH


def test_budgets_of_anthropics_api(serve: Serve) -> None:
    server = serve("endless")
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        asked: dict[str, Any] = {"model": "endless", "max_tokens": 500, "messages": HELLO}
        asked["thinking"] = {"type": "enabled", "budget_tokens": 40}
        message = client.messages.create(**asked)
        thought, said = message.content
        assert thought.type == "thinking" and thought.thinking.endswith(f"hm \n{ENOUGH}")
        assert said.type == "text" and said.text == "Yes." and message.stop_reason == "end_turn"
        assert message.usage.model_extra == {"thinking_ended": "budget"}
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        assert [block.type for block in streamed.content] == ["thinking", "text"]
        off = client.messages.create(**{**asked, "thinking": {"type": "disabled"}})
        assert [block.type for block in off.content] == ["text"]


def test_a_budget_in_responses(serve: Serve) -> None:
    with client_of(serve("endless")) as client:
        answer = client.responses.create(
            model="endless", input="Hello!", extra_body={"thinking_token_budget": 5}
        )
    assert answer.output_text == "Yes." and answer.output[0].type == "reasoning"
    assert answer.usage is not None
    details = answer.usage.output_tokens_details
    assert details.reasoning_tokens == 5 + 32 + len("\n" + ENOUGH + "\n")
    assert details.model_extra == {"thinking_ended": "budget"}


def test_the_servers_own_budget(ask: Callable[..., Any]) -> None:
    own = {"budget": 0}
    assert told(ask("endless", own))[0] == "Yes."
    answer = ask("endless", own, extra_body={"thinking_token_budget": -1}, max_tokens=60)
    assert told(answer) == ("", "hm " * 60, 60, None) and answer.choices[0].finish_reason == "length"


def test_efforts_as_budgets(ask: Callable[..., Any]) -> None:
    own = {"effort_budgets": True}
    content, _, count, why = told(ask("endless", own, reasoning_effort="low", max_tokens=400))
    assert (content, why) == ("Yes.", "budget") and count == 100 + 32 + len("\n" + ENOUGH + "\n")
    assert told(ask("endless", reasoning_effort="low", max_tokens=60))[0] == ""


def test_an_end_within_thinking_is_no_empty_answer(ask: Callable[..., Any]) -> None:
    plain = ask("silent")
    assert told(plain) == ("", "hm.", 1, "end_of_text") and plain.choices[0].finish_reason == "stop"
    mended = ("Yes.", f"hm.\n{ENOUGH}", 1 + len("\n" + ENOUGH + "\n"), "end_of_text")
    assert told(ask("silent", {"never_empty": True})) == mended
    assert told(ask("silent", extra_body={"thinking_token_budget": 100})) == mended
    choice = {"structured_outputs": {"choice": ["Yes.", "No."]}}
    pytest.importorskip("llguidance")
    assert told(ask("silent", extra_body=choice)) == mended


def test_a_form_and_a_call_have_room_left(ask: Callable[..., Any]) -> None:
    pytest.importorskip("llguidance")
    choice = {"structured_outputs": {"choice": ["Yes.", "No."]}}
    answer = ask("endless", extra_body=choice, max_tokens=80)
    assert told(answer)[0] == "Yes." and ended(answer) == "reserve"
    assert answer.choices[0].finish_reason == "stop"
    assert ask("endless", max_tokens=80).choices[0].finish_reason == "length"
    assert told(ask("endless", {"never_empty": True}, max_tokens=80))[0] == "Yes."
    called = ask("silent", tools=[TOOL], tool_choice="required", max_tokens=400)
    assert called.choices[0].message.tool_calls or called.choices[0].finish_reason == "length"
    assert ended(called) == "end_of_text"


def test_stop_texts_end_the_answer_and_not_the_thinking(ask: Callable[..., Any]) -> None:
    answer = ask("silent", extra_body={"thinking_token_budget": 100}, stop=[".", "\n\n"])
    assert told(answer)[:2] == ("Yes", f"hm.\n{ENOUGH}") and answer.choices[0].finish_reason == "stop"


def test_a_second_closing_tag_is_left_out(ask: Callable[..., Any]) -> None:
    content, reasoning, count, _ = told(ask("twice", extra_body={"thinking_token_budget": 0}))
    assert (content, reasoning, count) == ("Yes.", ENOUGH, len(ENOUGH) + 1)


def test_streams_tell_the_same(serve: Serve) -> None:
    with client_of(serve("endless")) as client:
        chunks = list(
            client.chat.completions.create(
                model="endless",
                messages=HELLO,
                stream=True,
                stream_options={"include_usage": True},
                logprobs=True,
                extra_body={"thinking_token_budget": 2},
            )
        )
    usage, logprobs = chunks[-1].usage, 0
    thoughts = said = ""
    for chunk in chunks[:-1]:
        delta = chunk.choices[0].delta
        thoughts += (delta.model_extra or {}).get("reasoning_content", "")
        said += delta.content or ""
        told_here = chunk.choices[0].logprobs
        logprobs += len(told_here.content or []) if told_here else 0
    assert said == "Yes." and thoughts.endswith(f"hm \n{ENOUGH}") and usage is not None
    assert usage.completion_tokens == logprobs + 1  # all but the stop token


def test_the_next_turn_reuses_what_was_forced(serve: Serve) -> None:
    with client_of(serve("endless")) as client:
        asked: dict[str, Any] = {"model": "endless", "extra_body": {"thinking_token_budget": 0}}
        first = client.chat.completions.create(messages=HELLO, **asked)
        turn = {"role": "assistant", "content": "Yes.", "reasoning_content": ENOUGH}
        more: Any = [*HELLO, turn, {"role": "user", "content": "And now?"}]
        second = client.chat.completions.create(messages=more, **asked)
    assert first.usage is not None and second.usage is not None
    details = second.usage.prompt_tokens_details
    assert details is not None and details.cached_tokens is not None
    assert details.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens - 1


def test_efforts_reach_templates_that_know_them(serve: Serve, ask: Callable[..., Any]) -> None:
    def length(settings: dict[str, Any] | None = None, **fields: Any) -> int:
        count: int = ask("effort", settings, **fields).usage.prompt_tokens
        return count

    usual, low, medium = length(), length(reasoning_effort="low"), length(reasoning_effort="medium")
    assert (low - medium, usual - medium) == (len("brief."), len("think carefully."))
    for effort in ("high", "xhigh", "max"):
        assert length(reasoning_effort=effort) == usual
    assert length(reasoning_effort="minimal") == length(extra_body={"think": "low"}) == low
    assert length({"effort": "low"}) == low and length({"effort": "low"}, reasoning_effort="high") == usual
    own = {"chat_template_kwargs": {"reasoning_effort": "medium"}}
    assert length(reasoning_effort="low", extra_body=own) == medium
    assert told(ask("effort", reasoning_effort="none"))[1] == ""
    server = serve("effort")
    with client_of(server) as client:
        answer = client.responses.create(model="effort", input="Hello!", reasoning={"effort": "low"})
        assert answer.usage is not None and answer.usage.input_tokens == low
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as anthropic:
        config: Any = {"effort": "low"}
        counted = anthropic.messages.count_tokens(
            model="effort", messages=HELLO, extra_body={"output_config": config}
        )
        assert counted.input_tokens == low


def test_fields_that_contradict_each_other(ask: Callable[..., Any]) -> None:
    for fields in (
        {"thinking_token_budget": 3, "thinking_budget_tokens": 4},
        {"think": "low", "reasoning_effort": "high"},
        {"think": False, "reasoning_effort": "high"},
        {"think": "much"},
        {"thinking_token_budget": -2},
    ):
        with pytest.raises(BadRequestError):
            ask("endless", extra_body=fields)
    assert told(ask("endless", extra_body={"think": False}))[:2] == ("Yes.", "")


def test_variables_for_templates() -> None:
    knowing, other = ChatTemplate("{{ reasoning_effort }}"), ChatTemplate("{{ messages }}")
    for template, effort, variables in [
        (knowing, "minimal", {"reasoning_effort": "low"}),
        (knowing, "high", {"reasoning_effort": "xhigh"}),
        (knowing, "none", {"enable_thinking": False}),
        (other, "minimal", {"enable_thinking": False}),
        (other, "high", {}),
        (other, None, {}),
    ]:
        maker = ThinkingMaker(template, ThinkingSettings(effort=effort))  # type: ignore[arg-type]
        assert maker.variables(ThinkingWish(), {}) == variables
        assert maker.variables(ThinkingWish(), {"enable_thinking": False})["enable_thinking"] is False
    assert ThinkingMaker(None, ThinkingSettings(effort="low")).variables(ThinkingWish(), {"a": 1}) == {"a": 1}
