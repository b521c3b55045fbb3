"""Chat templates: what they may use, what they may not do, and the template of the default model."""

from __future__ import annotations

import gc
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import BusyError, TemplateError
from godwit.text.chat_template import ChatTemplate

DEFAULT = Path(__file__).resolve().parents[2] / "recipes" / "default" / "chat_template.jinja"
USER: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = USER, **kwargs: Any) -> str:
    return ChatTemplate(source).render(messages, **kwargs)


class TestLanguage:
    """What published templates rely on."""

    def test_white_space_of_blocks(self) -> None:
        source = "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\nend"
        assert render(source) == "hi\nend"

    def test_loop_controls(self) -> None:
        source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
        assert render(source + "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "02"

    def test_namespace_and_macro(self) -> None:
        source = "{% set n = namespace(x=0) %}{% macro f(a) %}<{{ a }}>{% endmacro %}"
        assert (
            render(source + "{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ f(n.x) }}") == "<3>"
        )

    def test_tojson(self) -> None:
        value = {"z": "<é> & 'x'", "a": [1, 1.5, True, None]}
        assert render("{{ v | tojson }}", v=value) == """{"z": "<é> & 'x'", "a": [1, 1.5, true, null]}"""
        assert render("{{ v | tojson(indent=2) }}", v=value) == json.dumps(
            value, ensure_ascii=False, indent=2
        )

    def test_nothing_is_escaped(self) -> None:
        assert render("{{ messages[0].content }}", [{"role": "user", "content": "<a & 'b'>"}]) == "<a & 'b'>"

    def test_strftime_now(self) -> None:
        assert render("{{ strftime_now('%Y') | int > 2000 }}") == "True"

    def test_raise_exception(self) -> None:
        with pytest.raises(TemplateError, match="no such role"):
            render("{{ raise_exception('no such role') }}")

    def test_generation_blocks(self) -> None:
        assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahib"

    def test_variables(self) -> None:
        template = ChatTemplate(
            "{{ bos_token }}{{ add_generation_prompt }}{{ tools }}{{ mode }}", {"bos_token": "<s>"}
        )
        assert template.render(USER, mode="m") == "<s>FalseNonem"
        assert template.render(USER, tools=[], add_generation_prompt=True) == "<s>TrueNone"

    def test_two_sources(self) -> None:
        template = ChatTemplate("plain", tool_source="tools")
        assert template.render(USER) == "plain"
        assert template.render(USER, tools=[{"type": "function"}]) == "tools"


HOSTILE = {
    "silent loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loud loops": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "repeated text": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ (10**10 * [1]) | length }}",
    "powers": "{{ (10**9)**(10**9) > 1 }}",
    "products": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "ranges": "{{ range(10**9) | list | length }}",
    "padding filter": "{{ 'a' | center(10**11) | length }}",
    "padding method": "{{ 'a'.ljust(10**11) | length }}",
    "percent format": "{{ '%099999999999d' % 1 }}",
    "brace format": "{{ '{:099999999999d}'.format(1) }}",
    "indent": "{{ [1] | tojson(indent=10**11) }}",
    "doubling text": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "shared lists to text": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x | string | length }}",
    "shared lists compared": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "random words": "{{ lipsum(n=10**9) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long chain": "{{ 1" + " | abs" * 20000 + " }}",
    "python internals": "{{ ''.__class__.__mro__ }}",
    "python globals": "{{ raise_exception.__globals__.keys() }}",
    "changes of the input": "{{ messages.append(1) }}",
    "files": "{% include '/etc/hostname' %}",
    "syntax": "{% if %}",
}


class TestLimits:
    @pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
    def test_hostile_templates_are_stopped(self, source: str) -> None:
        template = ChatTemplate(source, seconds=0.5, memory_bytes=256 << 20, output_chars=1 << 20)
        with pytest.raises(TemplateError):
            template.render(USER)

    def test_the_next_rendering_works(self) -> None:
        template = ChatTemplate("{% if go %}" + HOSTILE["silent loops"] + "{% endif %}x", seconds=1.0)
        for _ in range(2):
            with pytest.raises(TemplateError, match=r"1\.0 seconds"):
                template.render(USER, go=True)
            assert template.render(USER, go=False) == "x"

    def test_output(self) -> None:
        template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", output_chars=10)
        assert template.render(USER * 5) == "hi" * 5
        with pytest.raises(TemplateError, match="longer than 10 characters"):
            template.render(USER * 6)

    def test_source(self) -> None:
        with pytest.raises(TemplateError, match="longer than"):
            ChatTemplate("x" * ((1 << 20) + 1))
        with pytest.raises(TemplateError, match="longer than"):
            ChatTemplate("", tool_source="x" * ((1 << 20) + 1))

    def test_long_conversations_fit(self) -> None:
        text = "é" * 4_000_000
        assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


class TestProcess:
    def test_from_many_threads(self) -> None:
        template = ChatTemplate("{% for i in range(200) %}{{ messages[0].content }}{% endfor %}")
        results: dict[int, set[str]] = {}

        def work(number: int) -> None:
            messages = [{"role": "user", "content": str(number)}]
            results[number] = {template.render(messages) for _ in range(20)}

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {number: {str(number) * 200} for number in range(8)}

    def test_what_is_not_json_does_no_harm(self) -> None:
        template = ChatTemplate("{{ messages[0].content }}{{ x }}")
        cyclic: list[Any] = []
        cyclic.append(cyclic)
        for value in (object(), {1, 2}, cyclic, b"bytes"):
            with pytest.raises(TemplateError, match="plain JSON"):
                template.render(USER, x=value)
        assert template.render(USER, x=(1, None)) == "hi[1, None]"

    def test_an_interruption_does_not_mix_up_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        template = ChatTemplate("{{ x }}")
        assert template.render(USER, x=1) == "1"

        def interrupt(stream: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("godwit.worker.read_frame", interrupt)
            with pytest.raises(KeyboardInterrupt):
                template.render(USER, x=2)
        assert template.render(USER, x=3) == "3"

    def test_it_ends_with_the_template(self) -> None:
        template = ChatTemplate("x")
        template.render(USER)
        process = template._worker.process
        assert process is not None
        del template
        gc.collect()
        assert process.poll() is not None

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_fork_starts_its_own(self) -> None:
        template = ChatTemplate("{{ x }}")
        assert template.render(USER, x=1) == "1"
        child = os.fork()
        if child == 0:
            os._exit(0 if all(template.render(USER, x=i) == str(i) for i in range(50)) else 1)
        assert all(template.render(USER, x=-i) == str(-i) for i in range(50))
        assert os.waitpid(child, 0)[1] == 0
        assert template.render(USER, x=4) == "4"

    def test_no_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.executable", "/nonexistent/python")
        with pytest.raises(BusyError, match="cannot be started"):
            render("x")

    def test_no_jinja(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.path", [])
        with pytest.raises(BusyError, match=r"ended at its start; check that .* can import jinja2"):
            render("x")


class TestDefaultTemplate:
    """ChatML turns and Hermes tool calls, exactly."""

    TOOL: dict[str, Any] = {  # noqa: RUF012
        "type": "function",
        "function": {"name": "add", "description": "Add é", "parameters": {"type": "object"}},
    }
    TOOLS = (
        "# Tools\n\nYou may call these functions:\n<tools>\n"
        '{"name": "add", "description": "Add é", "parameters": {"type": "object"}}'
        '\n</tools>\nTo call one, answer with <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
    )

    def render(self, *messages: dict[str, Any], **kwargs: Any) -> str:
        return render(DEFAULT.read_text(encoding="utf-8"), list(messages), **kwargs)

    def test_plain(self) -> None:
        text = self.render(
            {"role": "system", "content": "s"},
            *USER,
            {"role": "assistant", "content": " a "},
            {"role": "system", "content": "later"},
            add_generation_prompt=True,
        )
        assert text == (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n a <|im_end|>\n"
            "<|im_start|>system\nlater<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_no_system_message_is_made_up(self) -> None:
        assert self.render(*USER) == "<|im_start|>user\nhi<|im_end|>\n"
        assert self.render() == ""

    @pytest.mark.parametrize("tool", [TOOL, TOOL["function"]])
    def test_tools(self, tool: Any) -> None:
        user = "<|im_start|>user\nhi<|im_end|>\n"
        block = f"{self.TOOLS}<|im_end|>\n{user}"
        assert self.render(*USER, tools=[tool]) == f"<|im_start|>system\n{block}"
        system = {"role": "system", "content": "s"}
        assert self.render(system, *USER, tools=[tool]) == f"<|im_start|>system\ns\n\n{block}"
        assert self.render(system, *USER, tools=[tool, tool]).count('{"name": "add"') == 2

    def test_calls_and_results(self) -> None:
        calls = [{"name": "f", "arguments": {"x": "é"}}, {"function": {"name": "g", "arguments": "odd"}}]
        text = self.render(
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "so", "tool_calls": calls[:1]},
            {"role": "tool", "content": "3"},
        )
        first = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
        second = '<tool_call>\n{"name": "g", "arguments": odd}\n</tool_call>'
        assert text == (
            f"<|im_start|>assistant\n{first}\n{second}<|im_end|>\n"
            "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
            f"<|im_start|>assistant\nso\n{first}<|im_end|>\n"
            "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        )

    def test_unknown_roles_are_refused(self) -> None:
        with pytest.raises(TemplateError, match="Unknown message role: poet"):
            self.render({"role": "poet", "content": "x"})
