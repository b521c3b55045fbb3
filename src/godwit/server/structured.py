"""Structured output: the forms that a request may ask for, and the constraints that enforce them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from godwit.dialect.dialect import Dialect
from godwit.dialect.lark import ThinkingBefore
from godwit.engine import Constraint
from godwit.engine.constraint.constraints import Constraints, FormKind, GrammarConstraint, UntriedGrammar
from godwit.engine.constraint.trials import Abandon
from godwit.errors import GodwitError
from godwit.server.connections.clients import in_turn
from godwit.server.connections.fair_queue import FairQueue
from godwit.server.errors import ApiError, bad_request, from_engine
from godwit.text.tokenizer import Tokenizer

FORM_WORKERS, FORMS_WAITING = 2, 64
NO_TOOLS = (
    "this model's chat template does not support tools, or writes calls in an unknown format; remove `tools`"
)


@dataclass(frozen=True)
class Form:
    """The required form of an answer.

    Attributes:
        field: the field of the request that asks for it.
        kind, value: as for :meth:`~godwit.engine.constraint.constraints.Constraints.rule`.
    """

    field: str
    kind: FormKind
    value: Any = None


@dataclass(frozen=True)
class Calls:
    """Tool calls that an answer may or must have, with valid arguments.

    Attributes:
        choice: "auto", "required" or the name of a tool.
        tools: in OpenAI's shape.
        parallel: an answer may have several calls.
        otherwise: with "auto", the form of an answer without calls; None: any text.
    """

    choice: str
    tools: Sequence[Mapping[str, Any]]
    parallel: bool
    otherwise: Form | None = None

    @property
    def field(self) -> str:
        """The field of the request that asks for it."""
        return "tools" if self.otherwise is None else self.otherwise.field


class FormMaker:
    """Makes the constraints of answers, in threads.

    Args:
        tokenizer: the model's.
        vocab_size: number of the model's logits.
        dialect: of its tool calls.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, dialect: Dialect | None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._dialect = dialect
        self._lock = threading.Lock()
        self._constraints: Constraints | None = None
        self._queue = FairQueue(FORM_WORKERS, FORMS_WAITING)
        # Looking up a form takes milliseconds of the interpreter: one at a time, so that streams go on.
        self._known_queue = FairQueue(1, FORMS_WAITING)

    async def constrain(
        self, request: Request, form: Form | Calls | None, thinking: ThinkingBefore, count: int
    ) -> Sequence[Constraint | None]:
        """One constraint for each of ``count`` answers, None where there is no ``form``.

        Raises:
            ApiError: the form cannot be used, too many requests are waiting, or the client left.
        """
        if form is None:
            return [None] * count
        abandon = Abandon()
        try:
            known = await in_turn(request, self._known_queue, lambda: self.known(form, thinking, count))
            if known is not None:
                return known
            return await in_turn(request, self._queue, lambda: self.make(form, thinking, count, abandon))
        except ApiError as error:
            error.param = error.param or form.field
            raise
        finally:
            abandon.give_up()

    def known(self, form: Form | Calls, thinking: ThinkingBefore, count: int) -> Sequence[Constraint] | None:
        """As :meth:`make`, in milliseconds; None where the form was not tried yet.

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
        """One constraint for each of ``count`` answers. Blocks while the form is tried, or until ``abandon``.

        Raises:
            UsageError: the form cannot be used, or this installation does not support it.
            BusyError: it cannot be tried now, or was abandoned.
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
