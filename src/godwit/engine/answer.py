"""What becomes of generated text: stop texts, thinking and tool calls.

Thinking stands between ``<think>`` and ``</think>``; a tool call is JSON with ``name`` and ``arguments``
between ``<tool_call>`` and ``</tool_call>``, the form that Hermes 2 Pro introduced and Qwen's templates use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from godwit.dialect.tags import open_end

Kind = Literal["text", "thinking", "tool_call"]

_OPENERS: dict[str, Kind] = {"<think>": "thinking", "<tool_call>": "tool_call"}
_CLOSERS: dict[Kind, str] = {"thinking": "</think>", "tool_call": "</tool_call>"}


class StopMatcher:
    """Passes text on up to the first stop text; what may still become one is held back.

    The stop text that is complete first ends the answer, and of several that end at the same character the
    longest; so the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now; nothing more once :attr:`matched` is set."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops]
        found = [(place + len(stop), place, stop) for place, stop in places if place >= 0]
        if found:
            _, place, self.matched = min(found)
            shown, self._held = self._held[:place], ""
            return shown
        return self._release(len(self._held) - self._promising())

    def flush(self) -> str:
        """The rest, when no more text comes."""
        return self._release(len(self._held))

    def _promising(self) -> int:
        """Length of the longest end of the held text with which a stop text begins."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0

    def _release(self, size: int) -> str:
        shown, self._held = self._held[:size], self._held[size:]
        return shown


class Segmenter:
    """Cuts an answer into text, thinking and tool calls while it arrives; the tags are left out.

    A tool call is given out whole. One that is not closed at the end comes as text unless it is complete.

    Args:
        thinking: the prompt has opened ``<think>`` already.
    """

    def __init__(self, *, thinking: bool = False) -> None:
        self._kind: Kind = "thinking" if thinking else "text"
        self._held = ""
        self._fresh = False  # thinking has just ended, and nothing was said since

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """The parts that are certain with ``text``."""
        self._held += text
        return list(self._parts())

    def flush(self) -> list[tuple[Kind, str]]:
        """What is left when the answer ends."""
        rest, self._held = self._held, ""
        if self._kind == "tool_call" and parse_call(rest) is None:
            return [("text", "<tool_call>" + rest)]
        return [(self._kind, rest)] if rest else []

    def _parts(self) -> Iterator[tuple[Kind, str]]:
        while True:
            tags: tuple[str, ...] = (_CLOSERS[self._kind],) if self._kind in _CLOSERS else tuple(_OPENERS)
            if self._ends_again():
                tags = (*tags, _CLOSERS["thinking"])
            found = [(place, tag) for tag in tags if (place := self._held.find(tag)) >= 0]
            if not found:
                break
            place, tag = min(found)
            part, self._held = self._held[:place], self._held[place + len(tag) :]
            if part:
                yield self._kind, part
            self._fresh = tag == _CLOSERS["thinking"]
            self._kind = _OPENERS.get(tag, "text")
        if self._kind != "tool_call" and (ready := len(self._held) - open_end(self._held, tags)):
            part, self._held = self._held[:ready], self._held[ready:]
            yield self._kind, part

    def _ends_again(self) -> bool:
        """Whether another closing tag may come, as models write it where the end was forced on them."""
        rest, tag = self._held.lstrip(), _CLOSERS["thinking"]
        self._fresh = self._fresh and tag.startswith(rest[: len(tag)])
        return self._fresh


@dataclass(frozen=True)
class ToolCall:
    """A function the model wants called."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A whole answer: what is said, what was thought before, and the calls."""

    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def as_message(self) -> dict[str, Any]:
        """The answer as a message for chat templates."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


def parse_answer(text: str, *, thinking: bool = False) -> Answer:
    """Take an answer apart; what looks like a tool call but cannot be read stays a part of the content.

    ``thinking``: the prompt has opened ``<think>`` already.
    """
    segmenter = Segmenter(thinking=thinking)
    content, thoughts, calls = "", "", list[ToolCall]()
    for kind, part in [*segmenter.push(text), *segmenter.flush()]:
        if kind == "text":
            content += part
        elif kind == "thinking":
            thoughts += part
        elif (call := parse_call(part)) is not None:
            calls.append(call)
        else:
            content += f"<tool_call>{part}</tool_call>"
    # Line breaks beside the tags belong to the template, which writes them again.
    tagged = bool(thoughts or calls or thinking)
    return Answer(content.strip("\n") if tagged else content, thoughts.strip("\n"), tuple(calls))


def parse_call(text: str) -> ToolCall | None:
    """The call that a JSON text describes, or None where it describes none."""
    try:
        raw = json.loads(text, parse_constant=_refuse)
        arguments = raw.get("arguments", {}) if isinstance(raw, dict) else None
        if isinstance(arguments, str):
            arguments = json.loads(arguments, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    name = raw.get("name") if isinstance(raw, dict) else None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def opens_thinking(prompt_end: str) -> bool:
    """Whether a prompt that ends like this has opened the thinking of the answer."""
    return prompt_end.rstrip().endswith("<think>")
