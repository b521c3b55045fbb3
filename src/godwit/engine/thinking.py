"""Thinking that ends: where in an answer its thinking is, and what ends it in time. No tensors.

Thinking is bounded by a budget of tokens and by the room that the answer needs after it. Where it has to end,
the tokens of a closing text are forced on the model instead of sampled. All of this depends on the tokens of
the one answer alone, so it is the same in any batch, with drafts and without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from godwit.engine.constraint_calls import CALL, END_CALL
from godwit.engine.constraint_grammar import END_THINK, THINK
from godwit.engine.stop_matcher import StopMatcher
from godwit.errors import UsageError
from godwit.tokenizer import Tokenizer

#: Why thinking was over: the model closed it, or it was closed for one of the other reasons.
ThinkingEnd = Literal["model", "budget", "end_of_text", "reserve"]
Place = Literal["gap", "tag", "thinking", "said", "call"]

#: What Qwen's models were trained on for this purpose. Without any such words they go on thinking aloud.
DEFAULT_MESSAGE = (
    "Considering the limited time by the user, I have to give the solution based on the thinking "
    "directly now."
)
MAX_MESSAGE_CHARS = 2000
MAX_BUDGET = 1 << 24
#: Tokens beyond the budget in which the end of a line is waited for, and then that of a character.
PATIENCE = 32
MAX_CHARACTER_BYTES = 4
#: The room kept for an answer is a quarter of the whole, and this at most.
MAX_RESERVE = 512


@dataclass(frozen=True, kw_only=True)
class ThinkingRules:
    """What holds for the thinking of one answer.

    Attributes:
        opened: the prompt has opened ``<think>`` already.
        budget: tokens of thinking until it is closed; None is no limit. Thinking that begins again spends the
            same budget, but a tool call starts it afresh.
        bounded: room is kept for the answer, and a stop token within thinking closes that instead of ending
            the answer. A budget implies it.
        reserve: tokens of the answer's limit that thinking may not use; None: a quarter, and 512 at most.
        message: the last words of thinking that is closed; not repeated where thinking begins again.
        closers: what ends thinking; all but ``</think>`` begin a call.
        calls: ``<tool_call>`` begins a call.

    Raises:
        UsageError: the budget or the message makes no sense.
    """

    opened: bool = False
    budget: int | None = None
    bounded: bool = False
    reserve: int | None = None
    message: str = DEFAULT_MESSAGE
    closers: tuple[str, ...] = (END_THINK,)
    calls: bool = True

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 <= self.budget <= MAX_BUDGET:
            raise UsageError(f"a thinking budget is 0 to {MAX_BUDGET} tokens, and not {self.budget}")
        if len(self.message) > MAX_MESSAGE_CHARS or END_THINK in self.message:
            raise UsageError(
                f"a thinking budget's message has {MAX_MESSAGE_CHARS} characters at most, and no {END_THINK}"
            )


class ThinkingTracker:
    """Follows the text of an answer and says which part of it is what.

    ``<think>`` opens thinking only at the beginning of an answer, after thinking, and after a call; elsewhere
    it is text like any other. A call within thinking ends it if nothing or another call follows; where text
    follows, the call was only thought of, and thinking goes on.

    Attributes:
        place: what comes next, as far as that is known: "gap" is white space after thinking.
        num_closed, num_calls: thoughts and calls that are over.
    """

    def __init__(
        self, *, opened: bool = False, closers: tuple[str, ...] = (END_THINK,), calls: bool = True
    ) -> None:
        self.place: Place = "thinking" if opened else "said"
        self.num_closed = self.num_calls = 0
        self._fresh = not opened  # only white space since thinking could begin
        self._unclosed = False  # a call has begun within thinking, without </think>
        self._openers = (CALL,) if calls else ()
        self._closers = closers
        self._seen = ""  # the end of the text before, which may be the beginning of a tag

    def push(self, text: str) -> list[tuple[Place, str]]:
        """The text in parts. Of a tag that comes in pieces only the last one is known as such."""
        parts: list[tuple[Place, str]] = []
        while text:
            blanks = len(text) - len(text.lstrip())
            if blanks and self.place == "gap" and not self._seen:
                parts.append(("gap", text[:blanks]))
                text = text[blanks:]
                continue
            place, tag = self._find(self._seen + text)
            start = max(0, place - len(self._seen)) if tag else len(text)
            if start:
                parts.append((self.place, text[:start]))
            if not tag:
                self._keep(text)
                break
            end = place + len(tag) - len(self._seen)
            parts.append((self._turn(tag), text[start:end]))
            text, self._seen = text[end:], ""
        return parts

    def _find(self, text: str) -> tuple[int, str]:
        """Where the first tag stands and which it is; "" for none."""
        if self._fresh:
            rest = text.lstrip()
            for tag in (THINK, END_THINK):
                if rest.startswith(tag):
                    return len(text) - len(rest), tag
            calls = self._openers if self._unclosed else ()
            self._fresh = any(tag.startswith(rest) for tag in (THINK, END_THINK, *calls))
            if not self._fresh:
                self.place = "thinking" if self._unclosed and not rest.startswith(calls) else "said"
                self._unclosed = False
        tags = {"thinking": self._closers, "call": (END_CALL,)}.get(self.place, self._openers)
        found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
        return min(found, default=(-1, ""))

    def _keep(self, text: str) -> None:
        self._seen = (self._seen + text)[-max(map(len, (END_CALL, *self._closers))) :]

    def _turn(self, tag: str) -> Place:
        """Go on behind a tag; the place of the tag itself."""
        before = self.place
        self._fresh = tag in (END_THINK, END_CALL)
        if tag in (THINK, END_THINK):
            self._unclosed = False
        if tag == THINK:
            self.place = "thinking"
        elif tag == END_THINK:
            self.num_closed += before == "thinking"
            self.place = "gap"
        elif tag == END_CALL:
            self.num_calls += 1
            self.place = "gap" if self._unclosed else "said"
        else:
            self.num_closed += before == "thinking"
            self._unclosed = before == "thinking"
            self.place = "call"
        return "tag" if tag in (THINK, END_THINK) else "call"


class ThinkingGuide:
    """Counts the thinking of one answer and ends it where it has to. Alternate :meth:`choose`, :meth:`push`.

    Args:
        rules: what holds.
        tokenizer: the model's.
        room: tokens that the whole answer may have.

    Attributes:
        num_tokens: of thinking; the tags do not count, what is forced does.
        ended: why thinking ended the last time; None: there was none, or it goes on.
    """

    def __init__(self, rules: ThinkingRules, tokenizer: Tokenizer, room: int) -> None:
        self.num_tokens = 0
        self.ended: ThinkingEnd | None = None
        self._rules = rules
        self._tokenizer = tokenizer
        self._tracker = ThinkingTracker(opened=rules.opened, closers=rules.closers, calls=rules.calls)
        self._bounded = rules.bounded or rules.budget is not None
        self._reserve = min(MAX_RESERVE, room // 4) if rules.reserve is None else rules.reserve
        self._left = room
        self._spent = 0  # of the budget
        self._line_ended = self._begun = True  # nothing was thought since thinking began
        self._told = False  # the message was written since the last call
        self._reason: ThinkingEnd = "model"
        self._forced: deque[int] = deque()
        if self.thinking:
            self._judge(complete=True)

    @property
    def thinking(self) -> bool:
        return self._tracker.place == "thinking"

    @property
    def forcing(self) -> bool:
        """Whether the next token is known already."""
        return bool(self._forced)

    @property
    def mends_end(self) -> bool:
        """Whether a stop token would close the thinking now, instead of ending the answer."""
        return self._bounded and self.thinking

    def choose(self, sample: Callable[[], int]) -> int:
        """The next token: one that is forced, else what ``sample`` gives."""
        if not self._forced:
            token = sample()
            if not (self.mends_end and token in self._tokenizer.stop_ids):
                return token
            self._force("end_of_text")
        return self._forced.popleft()

    def push(self, text: str, *, complete: bool = True) -> list[tuple[Place, str]]:
        """Take a token of the answer in.

        Args:
            text: what it adds to the text.
            complete: all bytes of the text's last character are there.

        Returns: the text in parts, each with what it is.
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
            self._spent, self._told = 0, False
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
        """Force the end of thinking if it is time for it."""
        if self._forced or not self._bounded:
            return
        budget = self._rules.budget
        late = self._reserve - self._left
        if late >= 0 and (complete or late >= MAX_CHARACTER_BYTES):
            self._force("reserve")
        elif budget is not None and self._spent >= budget and self._suits(self._spent - budget, complete):
            self._force("budget")

    def _suits(self, over: int, complete: bool) -> bool:
        """Whether thinking can be closed here, so many tokens beyond its budget."""
        if not complete:
            return over >= PATIENCE + MAX_CHARACTER_BYTES
        return self._begun or self._line_ended or over >= PATIENCE

    def _force(self, reason: ThinkingEnd) -> None:
        """Queue the tokens that close the thinking, without the message where that leaves no room to answer.

        They are those that the tokenizer makes of the finished text, so that a later prompt finds them again.
        """
        self._reason = reason
        message, encode = "" if self._told else self._rules.message, self._tokenizer.encode
        self._told = True
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
        guide: of the answer; None: all its text counts.
        matcher: of the answer's stop texts; None: the answer may not end yet, so none of them counts.
        text: what the token adds.
        complete: as for :meth:`ThinkingGuide.push`.
    """
    parts: list[tuple[Place, str]] = [("said", text)]
    if guide is not None:
        parts = guide.push(text, complete=complete)
    return text if matcher is None else "".join(_shown(parts, matcher))


def _shown(parts: list[tuple[Place, str]], matcher: StopMatcher) -> Iterator[str]:
    for place, part in parts:
        if place in ("said", "call"):
            yield matcher.push(part)
        elif matcher.matched is None:
            yield matcher.flush() + part
