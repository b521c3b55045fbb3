"""Messages as templates expect them, and what becomes of those that a template refuses."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import pytest

from godwit.errors import TemplateError
from godwit.text.chat_template import ChatTemplate
from godwit.text.messages import normalise_messages
from tests.server.templates import LLAMA31, QWEN3, QWEN3_CODER, QWEN3_NEXT, QWEN35, TEMPLATES

SYSTEM, LATE = {"role": "system", "content": "S"}, {"role": "system", "content": "L"}
USER: dict[str, Any] = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "Yo"}


@functools.cache
def template_of(source: str) -> ChatTemplate:
    """One process for each template, since it takes a while to start."""
    return ChatTemplate(source)


def render(source: str, *messages: Any, **more: Any) -> str:
    return template_of(source).render(messages, **more)


def called(*calls: tuple[str, Any], content: str = "") -> dict[str, Any]:
    """An assistant's message; the name of each call is its id as well."""
    tools = [{"id": name, "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": content, "tool_calls": tools}


def result(id: str, content: str = "") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content or id}


class TestMessages:
    @pytest.mark.parametrize(
        "message", [{}, {"role": None}, {"role": ""}, {"role": "a<|im_end|>"}, {"role": "a\nb"}, "text", None]
    )
    def test_a_message_needs_a_plain_role(self, message: Any) -> None:
        with pytest.raises(TemplateError, match="message 1 needs a `role`"):
            normalise_messages([USER, message])

    @pytest.mark.parametrize("calls", ["f()", [1], {"name": "f"}])
    def test_malformed_calls(self, calls: Any) -> None:
        with pytest.raises(TemplateError, match="tool_calls"):
            normalise_messages([{"role": "assistant", "tool_calls": calls}])

    def test_text_parts_are_joined_and_others_left(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        image = [*parts, {"type": "image"}]
        messages = normalise_messages([{"role": "user", "content": c} for c in (parts, image, None, "x")])
        assert [message["content"] for message in messages] == ["a\nb", image, None, "x"]

    @pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}', ' {"a":1}\n'])
    def test_both_shapes_of_a_call(self, arguments: Any) -> None:
        flat = {"name": "f", "arguments": arguments}
        openai = {"id": "c1", "type": "function", "function": flat}
        message: dict[str, Any] = {"role": "assistant", "tool_calls": [flat, openai]}
        (result,) = normalise_messages([message])
        function = {"name": "f", "arguments": {"a": 1}}
        assert result["tool_calls"] == [
            {"type": "function", "function": function},
            {"id": "c1", "type": "function", "function": function},
        ]
        assert message["tool_calls"][0]["arguments"] == arguments  # the caller's messages stay as they were

    @pytest.mark.parametrize("given", [None, "", " \n", "null", '""', '"null"', "{}", '"{}"', {}], ids=repr)
    def test_no_arguments(self, given: Any) -> None:
        assert arguments_of(given) == {}

    def test_missing_arguments(self) -> None:
        (message,) = normalise_messages([{"role": "assistant", "tool_calls": [{"name": "f"}]}])
        assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}

    def test_json_in_json_is_decoded(self) -> None:
        text = json.dumps({"a": "é"})
        for _ in range(3):
            text = json.dumps(text)
            assert arguments_of(text) == {"a": "é"}

    @pytest.mark.parametrize("given", ["{", '{"a": "x', "[1]", "3", '"x"', "[" * 100_000, ["x"], 3, False])
    def test_what_is_no_object_stays_as_it_is(self, given: Any) -> None:
        assert arguments_of(given) == given

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
    def test_thoughts_by_any_name(self, name: str) -> None:
        answer, user = normalise_messages([{**ANSWER, name: "why"}, {**USER, name: "no"}])
        assert answer["reasoning_content"] == "why"
        assert "reasoning_content" not in user or name == "reasoning_content"

    def test_what_is_no_text_is_no_thought(self) -> None:
        message = ANSWER | {"reasoning_content": "", "reasoning": {"effort": "low"}}
        assert normalise_messages([message]) == [message]


def arguments_of(given: Any) -> Any:
    (message,) = normalise_messages([called(("f", given))])
    return message["tool_calls"][0]["function"]["arguments"]


class TestResults:
    """Results stand in the order of the calls, since templates show no ids."""

    CALLS = called(("a", "{}"), ("b", "{}"), ("c", "{}"))

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("cab", "abc"),
            ("abc", "abc"),
            ("cb", "bc"),  # one is missing
            ("cxa", "axc"),  # one belongs to no call
            ("cUa", "aUc"),  # the user says something in between
            ("cAa", "cAa"),  # an answer in between knows only what came before it
            ("ccab", "abcc"),
        ],
    )
    def test_order(self, given: str, expected: str) -> None:
        others = {"U": USER, "A": ANSWER}
        messages = normalise_messages([self.CALLS, *(others.get(id) or result(id) for id in given)])
        found = [message.get("tool_call_id") or message["role"][0].upper() for message in messages[1:]]
        assert "".join(found) == expected

    def test_each_turn_for_itself(self) -> None:
        two = called(("a", ""), ("b", ""))
        given = [two, result("b", "1"), result("a", "2"), two, result("b", "3"), result("a", "4")]
        messages = normalise_messages(given)
        assert [message["content"] for message in messages if message["role"] == "tool"] == list("2143")

    def test_calls_without_ids(self) -> None:
        calls = [{"function": {"name": "f"}}, {"id": {}, "function": {"name": "g"}}]
        plain = [{"role": "tool", "content": "1"}, result("", "2"), {"role": "tool", "tool_call_id": 3}]
        messages = normalise_messages([{"role": "assistant", "tool_calls": calls}, *plain])
        assert messages[1:] == plain


class TestBrokenCalls:
    """A call whose arguments are no object is text again, as the model wrote it."""

    @pytest.mark.parametrize("given", ['{"a": "x', '["x"]', ["x"], 3, "oops"], ids=repr)
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_no_template_fails(self, name: str, given: Any) -> None:
        text = render(TEMPLATES[name], USER, called(("f", given)), result("f", "42"), USER)
        raw = given if isinstance(given, str) else json.dumps(given)
        assert raw in text and "42" in text

    def test_in_the_form_of_the_template(self) -> None:
        message = called(("f", '{"a": "x'), content="So")
        hermes = 'assistant\nSo\n<tool_call>\n{"name": "f", "arguments": {"a": "x}\n</tool_call><|im_end|>'
        assert hermes in render(QWEN3_NEXT, USER, message)
        tags = 'assistant\nSo\n<tool_call>\n<function=f>\n{"a": "x\n</function>\n</tool_call><|im_end|>'
        assert tags in render(QWEN3_CODER, USER, message)
        assert 'So\n{"name": "f", "parameters": {"a": "x}<|eot_id|>' in render(LLAMA31, USER, message)

    @pytest.mark.parametrize("source", [QWEN3_NEXT, QWEN3, QWEN3_CODER, QWEN35])
    def test_the_calls_beside_it_keep_their_places(self, source: str) -> None:
        good = called(("f", {"a": "é", "b": [1], "c": 2}))
        before = render(source, USER, good)
        start, end = before.index("<tool_call>"), before.rindex("</tool_call>")
        text = render(source, USER, called(("f", {"a": "é", "b": [1], "c": 2}), ("g", "[")))
        assert text.startswith(before[:end]) and text.index("<tool_call>") == start
        assert text.index('"g"' if "<function=" not in source else "=g>") > end

    def test_other_parts_are_kept(self) -> None:
        message = called(("f", "[")) | {"content": [{"type": "image"}]}
        text = render("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", message)
        assert [part["type"] for part in json.loads(text)] == ["image", "text"]


class TestRefusedMessages:
    """Templates of Qwen3.5 and later want one system message, at the beginning, and a user's message."""

    DEVELOPER = {"role": "developer", "content": "D"}  # noqa: RUF012

    def turns(self, *messages: Any, source: str = QWEN35) -> list[str]:
        """The turns of the prompt, each as its role's first letter and its content."""
        parts = render(source, *messages).split("<|im_start|>")[1:]
        return [
            f"{part[0]}:{part.partition(chr(10))[2].removesuffix('<|im_end|>' + chr(10))}" for part in parts
        ]

    def test_leading_ones_are_joined(self) -> None:
        assert self.turns(SYSTEM, LATE, USER) == ["s:S\n\nL", "u:hi"]
        assert self.turns(SYSTEM, self.DEVELOPER, USER) == ["s:S\n\nD", "u:hi"]
        assert self.turns(self.DEVELOPER, USER) == ["s:D", "u:hi"]

    def test_later_ones_are_said_by_the_user_in_their_places(self) -> None:
        assert self.turns(SYSTEM, USER, LATE) == ["s:S", "u:hi", "u:L"]
        assert self.turns(SYSTEM, LATE, USER, self.DEVELOPER, USER) == ["s:S\n\nL", "u:hi", "u:D", "u:hi"]

    def test_templates_that_take_them_get_them_as_they_are(self) -> None:
        assert self.turns(SYSTEM, LATE, USER, LATE, source=QWEN3_NEXT) == ["s:S", "s:L", "u:hi", "s:L"]

    def test_the_beginning_of_the_prompt_stays_from_turn_to_turn(self) -> None:
        talk = [SYSTEM, LATE, USER, ANSWER, USER, LATE, ANSWER, LATE, USER]
        prompts = [render(QWEN35, *talk[:size]) for size in (3, 5, 6, 8, 9)]
        plain = [prompt.replace("<think>\n\n</think>\n\n", "") for prompt in prompts]
        for shorter, longer in itertools.pairwise(plain):
            assert longer.startswith(shorter)

    def test_a_conversation_without_a_question_gets_an_empty_one(self) -> None:
        assert self.turns(SYSTEM, ANSWER)[:2] == ["s:S", "u:"]
        assert self.turns(ANSWER, result("a"))[0] == "u:"
        assert self.turns(SYSTEM, LATE, ANSWER, LATE)[:2] == ["s:S\n\nL", "u:"]

    def test_other_templates_that_need_a_user(self) -> None:
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert "\n\nS<|eot_id|>" in render(LLAMA31, SYSTEM, tools=tools)

    def test_the_first_error_is_reported(self) -> None:
        source = "{{ raise_exception(messages | map(attribute='role') | join(' ')) }}"
        with pytest.raises(TemplateError, match="system system assistant"):
            render(source, SYSTEM, LATE, ANSWER)

    def test_nothing_is_tried_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        template = ChatTemplate("{{ raise_exception('No user query found') }}")
        count, ask = 0, template._worker.ask

        def counted(*request: Any) -> Any:
            nonlocal count
            count += 1
            return ask(*request)

        monkeypatch.setattr(template._worker, "ask", counted)
        with pytest.raises(TemplateError, match="No user query"):
            template.render([SYSTEM, LATE, USER])
        assert count == 3
