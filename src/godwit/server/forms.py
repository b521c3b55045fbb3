"""Answers that are held to a form: what a request may ask for, and what holds its answers to it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from godwit.dialect.dialect import Dialect
from godwit.dialect.lark import ThinkingBefore
from godwit.engine import Constraint
from godwit.engine.constraint.constraints import Constraints, GrammarConstraint, Kind, UntriedGrammar
from godwit.engine.constraint.trials import Abandon
from godwit.errors import GodwitError
from godwit.server.errors import bad_request, from_engine
from godwit.tokenizer import Tokenizer

NO_TOOLS = (
    "this model's chat template has no place for tools, or writes calls in a form that this server does not "
    "know; leave `tools` out"
)


@dataclass(frozen=True)
class Form:
    """What an answer has to look like.

    Attributes:
        field: of the request that asks for it.
        kind, value: as for :meth:`~godwit.engine.constraint.constraints.Constraints.rule`.
    """

    field: str
    kind: Kind
    value: Any = None


@dataclass(frozen=True)
class Calls:
    """Tool calls that an answer may have or has to have, and which fit the tools.

    Attributes:
        choice: "auto", "required" or the name of a tool.
        tools: in OpenAI's shape.
        parallel: an answer may have several calls.
        otherwise: with "auto", what an answer without calls has to look like; None: any text.
    """

    choice: str
    tools: Sequence[Mapping[str, Any]]
    parallel: bool
    otherwise: Form | None = None

    @property
    def field(self) -> str:
        """Of the request that asks for it."""
        return "tools" if self.otherwise is None else self.otherwise.field


class FormMaker:
    """Makes what holds answers to forms. For several threads, of which none should be an event loop's.

    Args:
        tokenizer: the model's.
        vocab_size: tokens that the model chooses from.
        dialect: of its tool calls.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, dialect: Dialect | None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._dialect = dialect
        self._lock = threading.Lock()
        self._constraints: Constraints | None = None

    def known(self, form: Form | Calls, thinking: ThinkingBefore, count: int) -> Sequence[Constraint] | None:
        """As :meth:`make`, but None where a form was not tried yet: it takes milliseconds and needs no queue.

        Raises:
            ApiError: the form cannot be used.
        """
        if (constraints := self._constraints) is None:
            return None
        try:
            return self._several(constraints.only_known(), form, thinking, count)
        except UntriedGrammar:
            return None
        except GodwitError as error:
            raise from_engine(error) from error

    def make(
        self, form: Form | Calls, thinking: ThinkingBefore, count: int, abandon: Abandon | None = None
    ) -> Sequence[Constraint]:
        """One for each of ``count`` answers. Blocks while the form is tried, until ``abandon`` is set.

        Raises:
            UsageError: the form cannot be used, or this installation cannot do it.
            BusyError: it cannot be tried now, or was given up.
        """
        with self._lock:
            if self._constraints is None:
                self._constraints = Constraints(self._tokenizer, self._vocab_size)
        return self._several(self._constraints.until(abandon or Abandon()), form, thinking, count)

    def _several(
        self, constraints: Constraints, form: Form | Calls, thinking: ThinkingBefore, count: int
    ) -> Sequence[Constraint]:
        first = self._one(constraints, form, thinking)
        return [first, *(first.again() for _ in range(count - 1))]

    def _one(
        self, constraints: Constraints, form: Form | Calls, thinking: ThinkingBefore
    ) -> GrammarConstraint:
        if isinstance(form, Form):
            return constraints.held_to(constraints.rule(form.kind, form.value), thinking)
        if self._dialect is None:
            raise bad_request(NO_TOOLS, "tools")
        other = form.otherwise
        return constraints.tool_calls(
            form.tools,
            form.choice,
            parallel=form.parallel,
            dialect=self._dialect,
            thinking=thinking,
            otherwise=None if other is None else constraints.rule(other.kind, other.value),
        )
