"""The thinking budget of an answer. No tensors.

Thinking is limited by a budget of tokens and by the room that the answer needs after it. Where it has to end,
the tokens of a closing text are forced instead of sampled. All of this depends only on the answer's own
tokens, so it is the same in any batch, with drafts and without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from godwit.dialect.dialect import Dialect, Schemas
from godwit.dialect.hermes_calls import HERMES
from godwit.dialect.tags import END_THINK
from godwit.dialect.thinking import AnswerPlace, ThinkingTracker
from godwit.engine.stop_matcher import StopMatcher
from godwit.errors import UsageError
from godwit.text.tokenizer import Tokenizer

#: Why thinking ended: the model closed it, or one of the other reasons did.
ThinkingEnd = Literal["model", "budget", "end_of_text", "reserve"]

#: Qwen's models were trained on this text. Without such words, models tend to go on thinking in the answer.
DEFAULT_MESSAGE = (
    "Considering the limited time by the user, I have to give the solution based on the thinking "
    "directly now."
)
MAX_MESSAGE_CHARS = 2000
MAX_BUDGET = 1 << 24
#: Tokens beyond the budget in which thinking may reach the end of its line, and after them, of a character.
MAX_OVERRUN = 32
MAX_CHARACTER_BYTES = 4
#: The room kept for the answer is a quarter of the whole, but at most this many tokens.
MAX_RESERVE = 512


@dataclass(frozen=True, kw_only=True)
class ThinkingRules:
    """How the thinking of one answer is limited.

    Attributes:
        opened: the prompt has opened ``<think>``.
        budget: tokens of thinking until it is closed; None: no limit. Thinking that begins again uses the
            same budget; a tool call resets it.
        bounded: room is kept for the answer, and a stop token within thinking closes the thinking instead of
            ending the answer. A budget implies it.
        reserve: tokens of the answer's limit that thinking may not use; None: a quarter, but at most 512.
        message: the last words of thinking that is closed; written once, unless a tool call follows.
        dialect: of the answer's tool calls.
        schemas: the parameters of the tools whose calls may end thinking that is not closed, by name.

    Raises:
        UsageError: the budget or the message is out of range.
    """

    opened: bool = False
    budget: int | None = None
    bounded: bool = False
    reserve: int | None = None
    message: str = DEFAULT_MESSAGE
    dialect: Dialect | None = HERMES
    schemas: Schemas = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 <= self.budget <= MAX_BUDGET:
            raise UsageError(f"a thinking budget is 0 to {MAX_BUDGET} tokens, not {self.budget}")
        if len(self.message) > MAX_MESSAGE_CHARS or END_THINK in self.message:
            raise UsageError(
                f"a thinking budget's message has {MAX_MESSAGE_CHARS} characters at most, and no {END_THINK}"
            )


class ThinkingGuide:
    """Counts the thinking of one answer and ends it in time. Alternate :meth:`choose` and :meth:`push`.

    Args:
        rules: the limits.
        tokenizer: the model's.
        room: tokens that the whole answer may have.

    Attributes:
        num_tokens: tokens of thinking, without tags but with forced ones.
        ended: why thinking ended last; None: there was none, or it goes on.
    """

    def __init__(self, rules: ThinkingRules, tokenizer: Tokenizer, room: int) -> None:
        self.num_tokens = 0
        self.ended: ThinkingEnd | None = None
        self._rules = rules
        self._tokenizer = tokenizer
        self._tracker = ThinkingTracker(opened=rules.opened, dialect=rules.dialect, schemas=rules.schemas)
        self._bounded = rules.bounded or rules.budget is not None
        self._reserve = min(MAX_RESERVE, room // 4) if rules.reserve is None else rules.reserve
        self._left = room
        self._spent = 0  # of the budget
        self._line_ended = self._begun = True  # nothing was written since thinking began
        self._message_written = False  # since the last call
        self._reason: ThinkingEnd = "model"
        self._forced: deque[int] = deque()
        if self.thinking:
            self._judge(complete=True)

    @property
    def thinking(self) -> bool:
        return self._tracker.place == "thinking"

    @property
    def forcing(self) -> bool:
        """Whether the next token is known."""
        return bool(self._forced)

    @property
    def mends_end(self) -> bool:
        """Whether a stop token would now close the thinking instead of ending the answer."""
        return self._bounded and self.thinking

    def choose(self, sample: Callable[[], int]) -> int:
        """The next token: a forced one, or else the result of ``sample``."""
        if not self._forced:
            token = sample()
            if not (self.mends_end and token in self._tokenizer.stop_ids):
                return token
            self._force("end_of_text")
        return self._forced.popleft()

    def push(self, text: str, *, complete: bool = True) -> list[tuple[AnswerPlace, str]]:
        """Add a token of the answer.

        Args:
            text: what it adds to the text.
            complete: the text does not end within a character.

        Returns: the text in parts, with the place of each.
        """
        self._left -= 1
        tracker, thinking = self._tracker, self.thinking
        closed, calls = tracker.num_closed, tracker.num_calls
        parts = tracker.push(text)
        thoughts = "".join(part for place, part in parts if place == "thinking")
        counts = bool(thoughts) or (thinking and not text)
        self.num_tokens += counts
        self._spent += counts
        if tracker.num_closed > closed:
            self.ended, self._reason = self._reason, "model"
            self._line_ended = self._begun = True
        if tracker.num_calls > calls:
            self._spent, self._message_written = 0, False
        if self.thinking:
            self.ended = None
            if counts:
                self._line_ended, self._begun = thoughts.endswith("\n"), False
            self._judge(complete=complete)
        return parts

    def stop(self) -> None:
        """A stop token has ended the answer."""
        if self.thinking:
            self.ended = "end_of_text"

    def _judge(self, *, complete: bool) -> None:
        """Force the end of thinking if it is due."""
        if self._forced or not self._bounded:
            return
        budget = self._rules.budget
        late = self._reserve - self._left
        if late >= 0 and (complete or late >= MAX_CHARACTER_BYTES):
            self._force("reserve")
        elif budget is not None and self._spent >= budget and self._suits(self._spent - budget, complete):
            self._force("budget")

    def _suits(self, over: int, complete: bool) -> bool:
        """Whether thinking can be closed here, ``over`` tokens beyond its budget."""
        if not complete:
            return over >= MAX_OVERRUN + MAX_CHARACTER_BYTES
        return self._begun or self._line_ended or over >= MAX_OVERRUN

    def _force(self, reason: ThinkingEnd) -> None:
        """Queue the tokens that close the thinking, without the message if that leaves no room to answer.

        They are what the tokenizer makes of the finished text, so that a later prompt can reuse them.
        """
        self._reason = reason
        message, encode = "" if self._message_written else self._rules.message, self._tokenizer.encode
        self._message_written = True
        end = encode(f"{END_THINK}\n\n", allow_special=True, add_special_tokens=False)
        lead = "\n" if message and not self._line_ended else ""
        for words in (f"{lead}{message}\n", "\n"):
            ids = [*encode(words, add_special_tokens=False), *end]
            if 2 * len(ids) <= self._left:
                break
        self._forced.extend(ids)


def shown(guide: ThinkingGuide | None, matcher: StopMatcher | None, text: str, *, complete: bool) -> str:
    """What may be shown of a token's text: stop texts end an answer, but not its thinking.

    Args:
        guide: of the answer; None: all its text is searched for stop texts.
        matcher: of the answer's stop texts; None: the answer may not end yet, so none of them applies.
        text: what the token adds.
        complete: as for :meth:`ThinkingGuide.push`.
    """
    parts: list[tuple[AnswerPlace, str]] = [("said", text)]
    if guide is not None:
        parts = guide.push(text, complete=complete)
    return text if matcher is None else "".join(_shown(parts, matcher))


def _shown(parts: list[tuple[AnswerPlace, str]], matcher: StopMatcher) -> Iterator[str]:
    for place, part in parts:
        if place in ("said", "call"):
            yield matcher.push(part)
        elif matcher.matched is None:
            yield matcher.flush() + part
