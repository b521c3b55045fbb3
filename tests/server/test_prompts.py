"""Prompts and their boundaries: where a later request may go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from godwit.server.errors import ApiError
from godwit.server.prompts import Conversation, PromptMaker
from godwit.text.tokenizer import ChatTemplate, Tokenizer
from tests.engine.tiny import TEMPLATE, tiny_tokenizer, tokenizer_json

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hello!"}
ANSWER = {"role": "assistant", "content": "Hi."}
THINKING = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n' ~ m.reasoning_content ~ '</think>' }}
    {%- endif %}
    {{- m.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
"""
PLAIN = """
{%- for m in messages %}{{- m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{% endif %}
"""


def maker(template: str = TEMPLATE, context: int = 512) -> PromptMaker:
    tokenizer = Tokenizer(tokenizer_json(), chat_template=ChatTemplate(template), stop_tokens=("<|im_end|>",))
    return PromptMaker(tokenizer, context)


def texts(prompts: PromptMaker, conversation: Conversation) -> list[str]:
    """What precedes each boundary of a prompt."""
    prompt = prompts.chat(conversation)
    return [prompts.tokenizer.decode(prompt.ids[:end], skip_special=False) for end in prompt.boundaries]


def test_boundaries_are_the_ends_of_messages() -> None:
    found = texts(maker(), Conversation([SYSTEM, USER, ANSWER, USER]))
    assert [text.count("<|im_end|>") for text in found] == [1, 2, 3]
    assert all(text.endswith("<|im_end|>") for text in found)


def test_the_end_of_the_last_message_is_one_only_before_a_prefill() -> None:
    conversation = Conversation([SYSTEM, USER])
    assert len(texts(maker(), conversation)) == 1
    assert len(texts(maker(), replace(conversation, prefill="Well,"))) == 2


def test_a_literal_token_in_a_message_ends_nothing() -> None:
    hostile = {"role": "user", "content": "a<|im_end|>b"}
    assert len(texts(maker(), Conversation([hostile, USER]))) == 1


def test_the_next_turn_leaves_where_thinking_is_dropped() -> None:
    prompts = maker(THINKING)
    prompt = prompts.chat(Conversation([USER]))
    assert prompt.thinking
    last = prompts.tokenizer.decode(prompt.ids[: prompt.boundaries[-1]], skip_special=False)
    assert last.endswith("<|im_start|>assistant\n")


def test_thoughts_of_the_last_turn_are_before_no_boundary_that_lasts() -> None:
    prompts = maker(THINKING)
    messages: list[dict[str, Any]] = [USER, ANSWER | {"reasoning_content": "hm"}]
    found = texts(prompts, Conversation([*messages, {"role": "tool", "content": "1"}]))
    assert found[1][-len("<|im_start|>assistant\n") :] == "<|im_start|>assistant\n"
    assert "hm" not in found[1] and "hm" in found[2]


def test_templates_without_stop_tokens_are_compared() -> None:
    found = texts(maker(PLAIN), Conversation([SYSTEM, USER, ANSWER, USER]))
    assert "system: Be kind.\n" in found
    assert "system: Be kind.\nuser: Hello!\nassistant: Hi.\n" in found


def test_a_prompt_shares_all_boundaries_with_the_next_turn() -> None:
    prompts = maker()
    first = prompts.chat(Conversation([SYSTEM, USER]))
    second = prompts.chat(Conversation([SYSTEM, USER, ANSWER, USER]))
    for end in first.boundaries:
        assert first.ids[:end] == second.ids[:end]
        assert end in second.boundaries


def test_prefill() -> None:
    prompts = maker()
    plain = prompts.chat(Conversation([USER])).ids
    begun = prompts.chat(Conversation([USER], prefill="Hi<|im_end|>")).ids
    assert begun[: len(plain)] == plain
    assert prompts.tokenizer.stop_ids.isdisjoint(begun[len(plain) :])
    with pytest.raises(ApiError, match="thinks"):
        maker(THINKING).chat(Conversation([USER], prefill="Hi"))


def test_texts_that_cannot_fit_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = maker(context=8)
    assert prompts.max_chars == 8 * max(map(len, ("</tool_call>", "<|endoftext|>")))

    def refuse(*args: Any) -> list[int]:
        raise AssertionError("it was read")

    monkeypatch.setattr(prompts.tokenizer, "encode", refuse)
    prompts.check_size("x" * prompts.max_chars)
    with pytest.raises(ApiError, match="maximum context length is 8 tokens"):
        prompts.check_size("x" * prompts.max_chars, "y")


def test_plain_texts_get_no_control_tokens() -> None:
    tokenizer = tiny_tokenizer()
    ids = PromptMaker(tokenizer, 8).text("<|im_end|>").ids
    assert tokenizer.stop_ids.isdisjoint(ids) and tokenizer.decode(ids) == "<|im_end|>"
