"""Which parts of an answer are thinking, while it arrives token by token."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, Literal

from godwit.dialect.dialect import SPACE, CallReader, Dialect, Schemas
from godwit.dialect.fences import Fences
from godwit.dialect.hermes_calls import HERMES
from godwit.dialect.tags import END_THINK, THINK

AnswerPlace = Literal["gap", "tag", "thinking", "said", "call"]
NO_TOOLS: Mapping[str, Mapping[str, Any]] = {}
_TAGS = (THINK, END_THINK)


class ThinkingTracker:
    """Follows the text of an answer and says which part of it is what; agrees with the parser's view.

    ``<think>`` opens thinking only at the beginning of an answer, after thinking, and after a call; elsewhere
    it is text. A call within thinking ends it if the answer ends there or another call follows; if text
    follows, the model only thought about the call, and thinking goes on.

    Args:
        opened: the prompt has opened ``<think>``.
        dialect: of tool calls; only calls between tags are followed.
        schemas: of the tools whose calls may end thinking that is not closed.

    Attributes:
        place: of what comes next, as far as that is known: "gap" is white space after thinking.
        num_closed, num_calls: how often thinking was over, and calls. A call that the model only thought
            about is not one.
    """

    def __init__(
        self, *, opened: bool = False, dialect: Dialect | None = HERMES, schemas: Schemas = NO_TOOLS
    ) -> None:
        self.place: AnswerPlace = "thinking" if opened else "said"
        self.num_closed = self.num_calls = 0
        self._schemas = schemas
        self._dialect = dialect
        tagged = dialect if dialect is not None and dialect.closer else None
        self._openers = () if tagged is None else tagged.openers
        self._closer = "" if tagged is None else tagged.closer
        self._enders = () if tagged is None or not schemas else tagged.thinking_enders
        self._longest = max(map(len, (*_TAGS, self._closer, *self._openers)))
        self._fresh = True  # nothing but white space since thinking could begin
        self._expected: tuple[str, ...] = (THINK,)  # where thinking may begin
        self._call: CallReader | None = None  # begun in thinking, and perhaps only thought about
        self._unread = ""  # what the reader has not used yet
        self._fences = Fences()  # at the start of what is held
        self._held = ""  # perhaps the beginning of a tag

    def push(self, text: str) -> list[tuple[AnswerPlace, str]]:
        """The text in parts. If a tag comes in pieces, only the last piece is known to belong to it."""
        places: list[AnswerPlace] = []
        for character in text:
            self._held += character
            place, size = self._step(character)
            places.append(place)
            size = min(size, len(places))
            places[-size:] = [place] * size
        groups = groupby(zip(places, text, strict=True), lambda pair: pair[0])
        return [(place, "".join(character for _, character in group)) for place, group in groups]

    def _step(self, character: str) -> tuple[AnswerPlace, int]:
        """The place of a character, and how many, with those before it, belong there."""
        if self._call is not None:
            return self._read_call(self._call, character)
        if self._fresh and (found := self._begin()) is not None:
            return found
        for tag in self._tags():
            if self._held.endswith(tag) and self._counts(tag):
                return self._turn(tag), len(tag)
        self._release()
        return self.place, 1

    def _begin(self) -> tuple[AnswerPlace, int] | None:
        """Where thinking may begin: the place of a tag or of what may become one, or None behind that."""
        rest = self._held.lstrip()
        if rest in self._expected:
            return self._turn(rest), len(rest)
        if any(tag.startswith(rest) for tag in self._expected):
            return self.place, 1
        self._fresh = False
        self.place = "thinking" if self.place == "thinking" else "said"
        return None if self._held.endswith((*self._openers, END_THINK)) else (self.place, len(rest))

    def _tags(self) -> tuple[str, ...]:
        if self.place == "thinking":
            return (END_THINK, *self._enders)
        return (self._closer,) if self.place == "call" else self._openers

    def _counts(self, tag: str) -> bool:
        """Whether a tag that has just come is more than text."""
        if tag in (END_THINK, self._closer):
            return True
        fences = self._fences.copy()
        fences.push(self._held.removesuffix(tag))
        return fences.at_line_start if self.place == "thinking" else not fences.inside

    def _turn(self, tag: str) -> AnswerPlace:
        """Go on after a tag; the place of the tag itself."""
        thought = self.place == "thinking"
        self.num_closed += thought and tag != THINK
        self._fresh, self._expected = tag in (END_THINK, self._closer), _TAGS
        if tag == THINK:
            self.place = "thinking"
        elif tag == END_THINK:
            self.place = "gap"
            self._fences = Fences()
        elif tag == self._closer:
            self.num_calls += 1
            self.place = "said"
            self._fences.begin_line()
        else:
            self.place = "call"
            if thought and self._dialect is not None:
                self._fences.push(self._held.removesuffix(tag))
                self._call, self._unread = self._dialect.reader(tag, self._schemas), ""
        self._held = tag if self._call is not None else ""
        return "tag" if tag in _TAGS else "call"

    def _release(self) -> None:
        """Keep only what may be the beginning of a tag."""
        done, self._held = self._held[: -self._longest], self._held[-self._longest :]
        if self.place != "call":
            self._fences.push(done)

    def _read_call(self, call: CallReader, character: str) -> tuple[AnswerPlace, int]:
        """In a call that has begun in thinking, or after it."""
        if self._held.endswith(END_THINK):
            self._call = None
            return self._turn(END_THINK), len(END_THINK)
        self._unread += character
        if not call.ended:
            used, _ = call.push(self._unread)
            self._unread = self._unread[used:]
            known = call.name in (None, *self._schemas)
            return self._think_on(1) if call.failed or not known else ("call", 1)
        rest = self._unread.lstrip(SPACE)
        if call.complete and rest != self._closer and self._closer.startswith(rest):
            return "call", 1
        if not call.complete or not rest.startswith(self._closer):
            return self._think_on(len(rest))
        rest = rest.removeprefix(self._closer).lstrip(SPACE)
        if rest in self._openers:
            self._call, self._held, self._fences = None, "", Fences()
            self.num_calls += 1
            return "call", len(rest)
        if any(opener.startswith(rest) for opener in self._openers):
            return "gap" if character in SPACE else "call", 1
        return self._think_on(len(rest))

    def _think_on(self, size: int) -> tuple[AnswerPlace, int]:
        """The call was only thought about."""
        self._call, self.place = None, "thinking"
        self._release()
        return "thinking", size
