"""Chat templates: a conversation as text, rendered by the Jinja template of a checkpoint.

Neither templates nor messages are trusted. A template runs in a limited process. `Shield` breaks up every
literal of a control token in the messages before rendering, so that what a user types stays text.
"""

from __future__ import annotations

import itertools
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from godwit.errors import TemplateError
from godwit.worker import Worker, WorkerLimits

from .messages import calls_as_text, normalise_messages, repaired

MAX_SOURCE_CHARS = 1 << 20
MAX_DEPTH = 64
_OWN_WORDS = frozenset(("content", "reasoning_content", "reasoning", "thinking"))
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_MARKS = re.compile(f"[{chr(_PRIVATE_USE[0])}-{chr(_PRIVATE_USE[-1])}]")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
#: Efforts in the words of the templates that know any.
_EFFORTS = {
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "xhigh",
    "xhigh": "xhigh",
    "max": "xhigh",
}
ROLE_ASSISTANT, ROLE_USER, ROLE_OTHER = 0, 1, 2
TOOL_RESULT = "<tool_response>"
_NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>\n*")


class ChatTemplate:
    """A Jinja chat template, rendered in its own process with limits of time, memory and output.

    `source` is the template; `tool_source`, where a checkpoint has two, is used when tools are given.
    `special` holds the strings that templates know by name (`bos_token`, `eos_token`, ...). The process
    starts with the first rendering and stays. Safe to use from several threads and after a fork.
    """

    def __init__(
        self,
        source: str,
        special: Mapping[str, str] | None = None,
        *,
        tool_source: str | None = None,
        seconds: float = 5.0,
        memory_bytes: int = 1 << 30,
        output_chars: int = 1 << 24,
    ) -> None:
        if max(len(source), len(tool_source or "")) > MAX_SOURCE_CHARS:
            raise TemplateError(
                f"the chat template is longer than {MAX_SOURCE_CHARS} characters; use another one"
            )
        self.source, self.tool_source, self.special = source, tool_source, dict(special or {})
        self._limits = f"{seconds} seconds or {memory_bytes >> 20} MiB"
        self._seconds = seconds
        sources = {"default": source} | ({} if tool_source is None else {"tools": tool_source})
        self._worker = Worker(
            Path(__file__).with_name("template_worker.py"),
            {"sources": sources, "output_chars": output_chars},
            WorkerLimits(memory_bytes),
            purpose="renders chat templates",
            hint=f"check that `{sys.executable}` can import jinja2",
        )

    @property
    def knows_effort(self) -> bool:
        """Whether the template reads how much the model is to think."""
        return "reasoning_effort" in self.source or "reasoning_effort" in (self.tool_source or "")

    def thinking_variables(self, on: bool | None, effort: Effort | None) -> dict[str, Any]:
        """Variables that ask the template for thinking; None leaves it to the template.

        If the template knows no efforts, the lowest one turns thinking off.
        """
        if on is None and (effort == "none" or (effort == "minimal" and not self.knows_effort)):
            on = False
        variables: dict[str, Any] = {} if on is None else {"enable_thinking": on}
        if self.knows_effort and effort in _EFFORTS and on is not False:
            variables["reasoning_effort"] = _EFFORTS[effort]
        return variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """The conversation as one text; `kwargs` become template variables (`enable_thinking=False`, ...).

        Messages that the template refuses are changed as far as `repaired` knows how, and rendered again.
        Raises TemplateError when a message is malformed, and when the template fails or exceeds a limit; the
        error is that of the messages as they were given.
        """
        variables = {
            **self.special,
            "documents": None,
            **kwargs,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        with_tools = tools and self.tool_source is not None
        name, source = ("tools", self.tool_source) if with_tools else ("default", self.source)
        version: list[dict[str, Any]] | None = calls_as_text(normalise_messages(messages), source or "")
        errors: list[str] = []
        while version is not None:
            answer = self._ask({"source": name, "variables": {**variables, "messages": version}})
            if "error" not in answer:
                return str(answer["text"])
            errors.append(str(answer["error"]))
            version = repaired(version, errors[-1])
        raise TemplateError(f"the chat template cannot be rendered: {errors[0]}")

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            answer: Mapping[str, Any] | None = self._worker.ask(request, self._seconds)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(
                f"messages, tools and template arguments have to be plain JSON: {error}"
            ) from None
        if answer is None:
            raise TemplateError(
                f"the chat template was stopped: it takes more than {self._limits}; use another template"
            )
        return answer


class Shield:
    """Keeps literals of control tokens in messages from becoming control tokens.

    A private-use character, the mark, is put inside every such literal before rendering. The rendered text is
    then split at the literals that are still whole, which only the template can have written, and the mark is
    removed. `literals` are the control tokens; the text of an assistant is shielded only against `reserved`,
    since the others (`<think>`, `<tool_call>`, ...) are the model's own words.
    """

    def __init__(self, literals: Iterable[str], reserved: Iterable[str]) -> None:
        self._all = _Breaker(literals)
        self._reserved = _Breaker(reserved)

    def apply(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> tuple[str, list[dict[str, Any]], list[Any] | None, dict[str, Any]]:
        """(mark, messages, tools, variables), marked; raises TemplateError for what is nested too deeply."""
        plain = normalise_messages(messages)
        mark = _unused_character(_strings([plain, tools, dict(variables)]))
        shielded = [
            {
                key: value if key == "role" else self._breaker(message["role"], key).walk(value, mark)
                for key, value in message.items()
            }
            for message in plain
        ]
        walk = self._all.walk
        return mark, shielded, walk(tools, mark), walk(dict(variables), mark)

    def _breaker(self, role: str, key: str) -> _Breaker:
        return self._reserved if role == "assistant" and key in _OWN_WORDS else self._all


class _Breaker:
    """Inserts the mark into whole literals, and into the parts of one at either end of a string.

    The parts matter where a template joins two strings: neither may complete what the other begins.
    """

    def __init__(self, literals: Iterable[str]) -> None:
        words = sorted({word for word in literals if len(word) > 1})
        # A look-ahead finds overlapping literals as well.
        self._whole = re.compile(f"(?={'|'.join(map(re.escape, words))})" if words else r"(?!)")
        beginnings = {word[:size] for word in words for size in range(1, len(word))}
        endings = {word[size:] for word in words for size in range(1, len(word))}
        # Parts that look like ordinary words are left alone: templates compare words.
        self._beginnings = {part for part in beginnings if not part[0].isalnum()}
        self._endings = {part for part in endings if not part[-1].isalnum()}
        self._longest = max(map(len, words), default=0)

    def walk(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._break(value, mark)
        if isinstance(value, Mapping):
            return {self.walk(key, mark): self.walk(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.walk(item, mark) for item in value]
        return value

    def _break(self, text: str, mark: str) -> str:
        places = sorted({*self._ends(text), *(match.start() + 1 for match in self._whole.finditer(text))})
        if not places:
            return text
        cuts = itertools.pairwise([0, *places, len(text)])
        return mark.join(text[start:stop] for start, stop in cuts)

    def _ends(self, text: str) -> Iterator[int]:
        core = text.strip()  # templates often strip
        start = len(text) - len(text.lstrip())
        for size in range(1, min(self._longest, len(core) + 1)):
            if core[-size:] in self._beginnings:
                yield start + len(core) - size + 1
            if core[:size] in self._endings:
                yield start + size - 1


class RoleTracker:
    """Follows the turns of a rendered ChatML text, piece by piece, and says whose words they are.

    ROLE_ASSISTANT: what an assistant wrote, with the `<|im_end|>` that closes it. ROLE_USER: what a user
    wrote, likewise. ROLE_OTHER: system text, tools, tool results, headers, everything between the turns, and
    what the template itself puts in front of an assistant's words: the opening, and thinking that is empty.

    Args:
        opening: what the template puts after the header of the next answer.
        own_empty: some answer has an empty thought of its own, so that it is not the template's.
    """

    def __init__(self, opening: str = "", *, own_empty: bool = False) -> None:
        self._opening = opening
        self._own_empty = own_empty
        self._code = ROLE_OTHER
        self._in_header = False
        self._given = 0  # characters to come that are the template's

    def control(self, token: str) -> int:
        """The code of a control token."""
        if token == "<|im_start|>":
            self._code, self._in_header, self._given = ROLE_OTHER, True, 0
        code = ROLE_OTHER if self._given else self._code
        self._given = max(0, self._given - len(token))
        if token == "<|im_end|>":
            self._code, self._in_header, self._given = ROLE_OTHER, False, 0
        return code

    def text(self, text: str, following: str) -> tuple[int, int]:
        """(characters at the start of `text` that are the template's, code of the others).

        `following` is what comes after `text`, some tokens of it.
        """
        if not self._in_header:
            given = min(self._given, len(text))
            self._given -= given
            return given, self._code
        self._in_header = False
        role, _, body = text.partition("\n")
        # A user who types the tag has it broken up by the shield, so a whole one is the template's.
        if role == "user" and not (body.lstrip() or following).startswith(TOOL_RESULT):
            self._code = ROLE_USER
        elif role == "assistant":
            self._code = ROLE_ASSISTANT
            self._given = self._template_words(body + following)
        given = min(self._given, len(body))
        self._given -= given
        return len(text) - len(body) + given, self._code

    def _template_words(self, turn: str) -> int:
        empty = None if self._own_empty else _NO_THOUGHTS.match(turn)
        opening = len(self._opening) if turn.startswith(self._opening) else 0
        return max(opening, empty.end() if empty else 0)


def thinks_nothing(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the text of some assistant's message begins with empty thinking."""
    texts = (message.get("content") for message in messages if message.get("role") == "assistant")
    return any(isinstance(text, str) and _NO_THOUGHTS.match(text) for text in texts)


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise TemplateError(f"messages and tools may be nested {MAX_DEPTH} levels deep at most")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key, depth + 1)
            yield from _strings(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, depth + 1)


def _unused_character(texts: Iterable[str]) -> str:
    used = {mark for text in texts if not text.isascii() for mark in _MARKS.findall(text)}
    first = secrets.randbelow(len(_PRIVATE_USE))
    for code in itertools.chain(_PRIVATE_USE[first:], _PRIVATE_USE[:first]):
        if chr(code) not in used:
            return chr(code)
    raise TemplateError("the messages use every private-use character of plane 15; remove some")
