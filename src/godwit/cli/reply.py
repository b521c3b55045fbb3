"""Parse answers for the terminal: text, thinking, and tool calls in the model's dialect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

from godwit.dialect.detect import detect
from godwit.dialect.dialect import Dialect, Schemas
from godwit.dialect.hermes_calls import HERMES
from godwit.dialect.parser import AnswerParser, CallArguments, CallEnd, CallStart, Delta, Text, Thinking
from godwit.dialect.strict_json import parse_json
from godwit.dialect.tags import MARKS
from godwit.engine import ThinkingRules
from godwit.engine.chat_prompt import takes_one_call
from godwit.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ReplyText:
    """Part of an answer's text or thinking."""

    kind: Literal["text", "thinking"]
    text: str


class Reply:
    """One answer: takes pieces of text, returns parsed parts, and is complete after :meth:`flush`.

    Calls that cannot be parsed are treated as text.

    Args:
        parser: splits the text; None: all of it is the answer.
        one_call: drop everything after the first call.

    Attributes:
        text, thinking, calls: the parts returned so far.
        empty: no text has been pushed.
    """

    def __init__(self, parser: AnswerParser | None = None, *, one_call: bool = False) -> None:
        self.text = self.thinking = ""
        self.calls: list[ToolCall] = []
        self.empty = True
        self._parser = parser
        self._one_call = one_call
        self._name = self._arguments = ""  # of the current call

    @property
    def ended(self) -> bool:
        """Whether further text would be dropped."""
        return self._one_call and bool(self.calls)

    def push(self, text: str) -> list[ReplyText | ToolCall]:
        """Add ``text``; return the parts completed by it."""
        self.empty &= not text
        return self._take([Text(text)] if self._parser is None else self._parser.push(text))

    def flush(self) -> list[ReplyText | ToolCall]:
        """End the answer; return the remaining parts."""
        return [] if self._parser is None else self._take(self._parser.flush())

    def as_message(self) -> dict[str, Any]:
        """The answer as a message for chat templates."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.calls:
            functions = [dict(vars(call)) for call in self.calls]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return message

    def _take(self, deltas: Iterable[Delta]) -> list[ReplyText | ToolCall]:
        parts = []
        for delta in deltas:
            if not self.ended and (part := self._read(delta)) is not None:
                self._keep(part)
                parts.append(part)
        return parts

    def _read(self, delta: Delta) -> ReplyText | ToolCall | None:
        if isinstance(delta, Text):
            return ReplyText("text", delta.text)
        if isinstance(delta, Thinking):
            return ReplyText("thinking", delta.text)
        if isinstance(delta, CallStart):
            self._name, self._arguments = delta.name, ""
        elif isinstance(delta, CallArguments):
            self._arguments += delta.text
        else:
            return self._end_call(delta)
        return None

    def _end_call(self, end: CallEnd) -> ReplyText | ToolCall:
        if not end.complete:
            return ReplyText("text", end.raw)
        return ToolCall(self._name, parse_json(self._arguments))

    def _keep(self, part: ReplyText | ToolCall) -> None:
        if isinstance(part, ToolCall):
            self.calls.append(part)
        elif part.kind == "text":
            self.text += part.text
        else:
            self.thinking += part.text


class ReplyFormat:
    """The format of a model's answers, detected from its chat template; Hermes if unknown.

    Attributes:
        dialect: of tool calls.
        marks: special tokens that are part of a call.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        template = tokenizer.chat_template
        source = "" if template is None else template.tool_source or template.source
        self.dialect = detect(source) or HERMES
        self.marks = frozenset(id for mark in MARKS if (id := tokenizer.token_to_id(mark)) is not None)
        self._one_call = takes_one_call(source)

    def reply(self, tools: Sequence[Mapping[str, Any]], *, thinking: bool = False) -> Reply:
        """A new answer.

        Args:
            tools: the tools that the model may call, in the format of the OpenAI API.
            thinking: the prompt has already started the thinking.
        """
        return Reply(AnswerParser(self.dialect, _schemas(tools), thinking=thinking), one_call=self._one_call)

    def rules(self, rules: ThinkingRules, tools: Sequence[Mapping[str, Any]]) -> ThinkingRules:
        """The rules, extended so that a call of one of these tools ends unfinished thinking."""
        return replace(rules, dialect=self.dialect, schemas=_schemas(tools))


def _schemas(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    """The parameters of tools by name; the tools have the format of the OpenAI API."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


def parse_reply(text: str, dialect: Dialect = HERMES, *, thinking: bool = False) -> Reply:
    """Parse a whole answer; ``thinking``: the prompt has already started it."""
    reply = Reply(AnswerParser(dialect, thinking=thinking))
    reply.push(text)
    reply.flush()
    return reply


def with_call_ids(messages: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Add ids to calls and results, since some templates require them: nine letters or digits.

    Results are matched to the preceding calls in order.
    """
    numbers, waiting = count(), list[str]()
    for message in map(dict, messages):
        if calls := message.get("tool_calls"):
            waiting = [f"{next(numbers):09d}" for _ in calls]
            message["tool_calls"] = [{**call, "id": id} for call, id in zip(calls, waiting, strict=True)]
        elif message["role"] == "tool" and waiting:
            message["tool_call_id"] = waiting.pop(0)
        yield message
