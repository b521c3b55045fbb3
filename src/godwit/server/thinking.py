"""What requests and the server's settings say about thinking: for chat templates, and for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from godwit.chat_template import ChatTemplate, Effort
from godwit.engine.constraint_calls import CALL, FUNCTION
from godwit.engine.constraint_grammar import END_THINK
from godwit.engine.thinking import DEFAULT_MESSAGE, MAX_BUDGET, ThinkingRules
from godwit.server.dialects import Format
from godwit.server.errors import bad_request
from godwit.server.fields import Request

#: Of an answer's tokens, how many may be thinking; higher efforts have no limit of their own.
SHARES: Mapping[Effort, float] = {"minimal": 1 / 16, "low": 1 / 4, "medium": 1 / 2, "high": 4 / 5}
#: Formats whose calls stand between <tool_call> tags.
_TAGGED: tuple[Format, ...] = ("hermes", "xml")
#: Models that write XML calls sometimes forget to close their thinking before one.
_FORGOTTEN_ENDS: Mapping[Format, tuple[str, ...]] = {"xml": (f"{CALL}\n{FUNCTION}", CALL + FUNCTION)}
#: The length of an answer whose request does not limit it, for these shares.
USUAL_TOKENS = 32_768
#: Tokens of thinking; -1 is no limit.
Budget = Annotated[int, Field(ge=-1, le=MAX_BUDGET)]


@dataclass(frozen=True, kw_only=True)
class ThinkingSettings:
    """What a server does about thinking where a request leaves it open.

    Attributes:
        effort: how much the model is to think; None leaves it to the template.
        budget: tokens of thinking; None is no limit.
        message: the last words of thinking that is closed for lack of budget or room.
        effort_budgets: with templates that do not know efforts, an effort is a budget.
        never_empty: thinking leaves room for an answer, and an answer does not end within it.
    """

    effort: Effort | None = None
    budget: int | None = None
    message: str = DEFAULT_MESSAGE
    effort_budgets: bool = False
    never_empty: bool = False


@dataclass(frozen=True, kw_only=True)
class ThinkingWish:
    """What a request asks for; None leaves it open.

    Attributes:
        on: whether to think at all.
        effort: how much, in words.
        budget: how much, in tokens; -1 is no limit, whatever the server's default is.
    """

    on: bool | None = None
    effort: Effort | None = None
    budget: int | None = None


class ThinkingFields(Request):
    """The fields of OpenAI's APIs about thinking that are additions: a budget under several names."""

    thinking_token_budget: Budget | None = Field(
        default=None, description="Tokens after which thinking is closed; -1: no limit. vLLM's name for it."
    )
    thinking_budget_tokens: Budget | None = Field(default=None, description="The same; llama.cpp's name.")
    think: bool | Effort | Budget | None = Field(
        default=None, description="Whether to think, an effort, or a budget of tokens. Ollama's name."
    )

    def wish(self, effort: Effort | None, field: str) -> ThinkingWish:
        """What the request asks for, with the ``effort`` that its ``field`` names.

        Raises:
            ApiError: fields contradict each other.
        """
        think = self.think
        number = think if isinstance(think, int) and not isinstance(think, bool) else None
        budgets = {self.thinking_token_budget, self.thinking_budget_tokens, number} - {None}
        efforts = {effort, think if isinstance(think, str) else None} - {None}
        if len(budgets) > 1:
            raise bad_request("the request names two different thinking budgets", "thinking_token_budget")
        if len(efforts) > 1 or (think is False and efforts - {"none", "minimal"}):
            raise bad_request(f"`think` and `{field}` contradict each other", "think")
        asked = next(iter(efforts), None)
        on = think if isinstance(think, bool) else None
        if on is None and (number or asked not in (None, "none", "minimal")):
            on = True
        return ThinkingWish(on=on, effort=asked, budget=next(iter(budgets), None))


class ThinkingMaker:
    """Turns wishes into variables of the chat template and rules of the engine.

    Args:
        template: the model's.
        settings: for what requests leave open.
    """

    def __init__(self, template: ChatTemplate | None, settings: ThinkingSettings) -> None:
        self._template = template
        self._settings = settings

    def variables(self, wish: ThinkingWish, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the template is told; variables that the request has ``given`` itself win."""
        on = given.get("enable_thinking", wish.on)
        effort = None if on is False else self._effort(wish)
        made = {} if self._template is None else self._template.thinking_variables(on, effort)
        return {**made, **given}

    def rules(
        self,
        wish: ThinkingWish,
        *,
        opened: bool,
        max_tokens: int | None,
        held: bool,
        format: Format | None,
    ) -> ThinkingRules:
        """What holds for the thinking of an answer.

        Args:
            opened: the prompt has opened ``<think>``.
            max_tokens: of the whole answer.
            held: the answer has to have a form, so that thinking without an answer is worth nothing.
            format: of the tool calls that it may have.
        """
        return ThinkingRules(
            opened=opened,
            budget=self._budget(wish, max_tokens),
            bounded=held or self._settings.never_empty,
            message=self._settings.message,
            closers=(END_THINK, *(_FORGOTTEN_ENDS.get(format, ()) if format and not held else ())),
            calls=format in _TAGGED,
        )

    def _effort(self, wish: ThinkingWish) -> Effort | None:
        return self._settings.effort if wish.effort is None and wish.on is not False else wish.effort

    def _budget(self, wish: ThinkingWish, max_tokens: int | None) -> int | None:
        if wish.budget is not None:
            return None if wish.budget < 0 else wish.budget
        effort = self._effort(wish)
        share = None if effort is None else SHARES.get(effort)
        knows_effort = self._template is not None and self._template.knows_effort
        if self._settings.effort_budgets and share and not knows_effort:
            return int(share * (max_tokens or USUAL_TOKENS))
        return self._settings.budget
