"""Answers that are held to a form: what a request may ask for, and what holds its answers to it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from godwit.engine import Constraint
from godwit.engine.constraint import Constraints
from godwit.server.errors import bad_request
from godwit.server.tools import Format
from godwit.tokenizer import Tokenizer

Thinking = Literal["none", "optional", "opened"]


@dataclass(frozen=True)
class Form:
    """What an answer has to look like.

    Attributes:
        field: of the request that asks for it.
        kind: any JSON object; JSON that fits a schema; a text that fits a regular expression or a grammar, or
            is one of some; text and tool calls that fit the tools.
        value: the schema, the expression, the grammar or the texts; for calls, "auto", "required" or a name.
        tools: in OpenAI's shape.
        parallel: an answer may have several calls.
    """

    field: str
    kind: Literal["object", "schema", "regex", "grammar", "choice", "calls"]
    value: Any = None
    tools: Sequence[Mapping[str, Any]] = ()
    parallel: bool = True


class FormMaker:
    """Makes what holds answers to forms. Blocks, for several threads.

    Args:
        tokenizer: the model's.
        vocab_size: tokens that the model chooses from.
        format: of its tool calls.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, format: Format | None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._format = format
        self._lock = threading.Lock()
        self._constraints: Constraints | None = None

    def make(self, form: Form, thinking: Thinking, count: int) -> list[Constraint]:
        """One for each of ``count`` answers.

        Raises:
            UsageError: the form cannot be used, or this installation cannot do it.
        """
        with self._lock:
            if self._constraints is None:
                self._constraints = Constraints(self._tokenizer, self._vocab_size)
        return [self._one(self._constraints, form, thinking) for _ in range(count)]

    def _one(self, constraints: Constraints, form: Form, thinking: Thinking) -> Constraint:
        if form.kind == "object":
            return constraints.json_object(thinking=thinking)
        if form.kind == "schema":
            return constraints.json_schema(form.value, thinking=thinking)
        if form.kind == "regex":
            return constraints.regex(form.value, thinking=thinking)
        if form.kind == "grammar":
            return constraints.grammar(form.value, thinking=thinking)
        if form.kind == "choice":
            return constraints.choice(form.value, thinking=thinking)
        if self._format is None:
            raise bad_request("this model's chat template has no place for tools", "tools")
        return constraints.tool_calls(
            form.tools, form.value, parallel=form.parallel, form=self._format, thinking=thinking
        )
