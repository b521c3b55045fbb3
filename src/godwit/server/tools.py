"""Takes an answer apart while it arrives: thinking, text and tool calls, in the form that its template has.

What is given out depends on the text alone, never on how it was cut into pieces. What the model wrote is
data: it is parsed as JSON or taken as text, and never evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from godwit.engine.constraint_calls import END_CALL, MARKS
from godwit.engine.constraint_grammar import END_THINK, THINK
from godwit.engine.stop_matcher import open_end
from godwit.server.calls import CallReader
from godwit.server.dialects import PLAIN, Dialect, Format, Schemas, dialect_of, format_of
from godwit.server.fences import Fences
from godwit.server.json_calls import JsonCall

__all__ = [
    "MARKS",
    "AnswerParser",
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Delta",
    "Format",
    "Text",
    "Thinking",
    "format_of",
]


@dataclass(frozen=True)
class Text:
    """A part of what is said."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """A part of what is thought before."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """The call numbered ``index`` begins, of the function ``name``."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A part of the call's arguments, which are JSON as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call is over.

    Attributes:
        complete: its arguments are a JSON object; otherwise the model erred or was cut off.
        raw: what was written, from the opening tag on.
    """

    index: int
    complete: bool
    raw: str


Delta = Text | Thinking | CallStart | CallArguments | CallEnd


class AnswerParser:
    """Takes one answer apart.

    Line breaks beside the tags are left out, since templates write them again. Text before and after a call
    stays apart by the more of the line breaks that stood on either side of it, one at least.

    Args:
        format: of tool calls; None: nothing is taken for a call.
        schemas: the parameters of each tool, by its name.
        thinking: the prompt has opened ``<think>`` already.
        only_calls: an answer that calls tools does nothing else, so what looks like a call behind some text,
            such as in a string of JSON, is a part of that.
    """

    def __init__(
        self,
        format: Format | None = None,
        schemas: Schemas | None = None,
        *,
        thinking: bool = False,
        only_calls: bool = False,
    ) -> None:
        self._dialect: Dialect = PLAIN if format is None else dialect_of(format)
        self._only_calls = only_calls
        self._schemas = schemas or {}
        self._opened = thinking
        self._state: Callable[[bool], bool] = self._begin
        self._held = ""
        self._out: list[Delta] = []
        self._fences = Fences()
        self._trim = False  # leave line breaks out until something else comes
        self._breaks = 0  # of those that were left out since some text
        self._tagged = self._said = self._thought = False
        self._gap = ""  # line breaks before the call that is read
        self._raw = ""
        self._call: CallReader = JsonCall()
        self._started = False
        self.num_calls = 0

    @property
    def thinks(self) -> bool:
        """Whether the text is in its thinking now."""
        return self._state == self._think or (self._opened and self._state == self._begin)

    @property
    def speaks(self) -> bool:
        """Whether the text is neither in its thinking nor in a call now."""
        return self._state in (self._begin, self._leave_thinking, self._say) and not self.thinks

    def push(self, text: str) -> list[Delta]:
        """What is certain with ``text``."""
        self._held += text
        return self._run(final=False)

    def flush(self) -> list[Delta]:
        """What is left at the end of the answer."""
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Delta]:
        while self._state(final):
            pass
        out, self._out = self._out, []
        return out

    # The states. Each takes from what is held all that is certain; it returns whether another one goes on.

    def _begin(self, final: bool) -> bool:
        rest = self._held.lstrip()
        if not final and len(rest) < len(THINK) and THINK.startswith(rest):
            return False
        self._state = self._say
        if self._opened or rest.startswith(THINK):
            self._held = rest.removeprefix(THINK) if rest.startswith(THINK) else self._held
            self._trim = self._tagged = True
            self._state = self._think
        return True

    def _think(self, final: bool) -> bool:
        """Up to the closing tag, or to a whole call with which the answer ends."""
        fences, place = self._fences.copy(), 0
        for start, tag in _places(self._held, (END_THINK, *self._dialect.ends_thinking)):
            fences.push(self._held[place:start])
            place = start
            if tag == END_THINK:
                return self._end_thinking(start)
            if not fences.at_line_start:
                continue
            closed = END_THINK in self._held[start:]  # then it was only thought of
            whole = not closed and self._dialect.whole_calls(self._held[start:], self._schemas, final)
            if whole:
                return self._end_thinking(start)
            if whole is None:
                self._give_up_to(Thinking, start)
                return False
        self._give_certain(Thinking, (END_THINK, *self._dialect.ends_thinking), final)
        return False

    def _end_thinking(self, place: int) -> bool:
        self._give(Thinking, self._held[:place].rstrip("\n"))
        self._held = self._held[place:].removeprefix(END_THINK)
        self._trim = True
        self._fences = Fences()
        self._state = self._leave_thinking
        return True

    def _leave_thinking(self, final: bool) -> bool:
        """Behind thinking or a call: thinking may begin again, and a second closing tag is left out."""
        rest = self._held.lstrip()
        if not final and any(len(rest) < len(tag) and tag.startswith(rest) for tag in (THINK, END_THINK)):
            return False
        if rest.startswith(THINK):
            self._held = rest.removeprefix(THINK)
            if self._thought:
                self._out.append(Thinking("\n"))
            self._trim, self._state = True, self._think
        elif rest.startswith(END_THINK):
            self._held = rest.removeprefix(END_THINK)
        else:
            self._state = self._say
        return True

    def _say(self, final: bool) -> bool:
        if self._only_calls and (begun := self._held.lstrip()):
            tags = (*self._dialect.openers, *self._dialect.line_openers)
            if not any(tag.startswith(begun[: len(tag)]) for tag in tags):
                self._dialect = PLAIN
        tags = (*self._dialect.openers, *self._dialect.line_openers)
        fences, done = self._fences.copy(), 0
        for place, tag in _places(self._held, tags):
            fences.push(self._held[done:place])
            done = place
            bare = tag in self._dialect.line_openers
            if fences.at_line_start if bare else not fences.inside:
                return self._begin_call(place, tag)
        self._give_certain(Text, tags, final)
        return False

    def _begin_call(self, place: int, tag: str) -> bool:
        said = self._held[:place].rstrip("\n")
        self._follow(self._held[:place])
        self._give(Text, said)
        self._gap = self._held[len(said) : place]
        self._raw = tag if tag != "{" else ""  # JSON is read from its brace on
        self._held = self._held[place + len(self._raw) :]
        self._started = False
        self._call = self._dialect.reader(tag, self._schemas)
        self._state = self._read_call
        return True

    def _read_call(self, final: bool) -> bool:
        call = self._call
        used, arguments = call.push(self._held)
        self._raw += self._held[:used]
        self._held = self._held[used:]
        if final and not (call.ended or call.failed):
            arguments += call.flush(self._held)
        if call.name is not None and not self._started:
            self._started = self._tagged = self._trim = True
            self._breaks = max(self._breaks, len(self._gap))
            self._out.append(CallStart(self.num_calls, call.name))
        if arguments:
            self._out.append(CallArguments(self.num_calls, arguments))
        if not self._started and call.failed:
            self._give_back()
        elif call.complete and (call.ended or call.failed):
            self._end_call()
            self._state = self._leave_call
        elif call.ended or call.failed:
            self._state = self._drop_call
        return call.ended or call.failed

    def _give_back(self) -> None:
        """What was read is no call, and so a text."""
        self._follow(self._raw)
        self._give(Text, self._gap + self._raw)
        self._state = self._say
        if self._only_calls and not self.num_calls:
            self._dialect = PLAIN

    def _leave_call(self, final: bool) -> bool:
        """Behind a whole call: the closing tag, braces that are too many, and what separates calls."""
        rest = self._held.lstrip(self._dialect.between)
        closer = self._dialect.closer
        if not final and ((closer and len(rest) < len(closer) and closer.startswith(rest)) or not rest):
            return False
        if not closer:
            skipped = self._held[: len(self._held) - len(rest)]
            self._breaks = max(self._breaks, len(skipped) - len(skipped.rstrip("\n")))
        self._held = rest.removeprefix(closer)
        self._fences.begin_line()
        self._state = self._leave_thinking
        if self._dialect.chains and rest.startswith("{"):
            return self._begin_call(0, "{")
        return True

    def _drop_call(self, final: bool) -> bool:
        """In a call that is broken: on to its end, or to the next one."""
        tags = [tag for tag in (END_CALL, *self._dialect.openers) if tag]
        place, tag = next(iter(_places(self._held, tags)), (-1, ""))
        if tag:
            end = place + len(tag) if tag == END_CALL else place
        else:
            end = len(self._held) - (0 if final else open_end(self._held, tags))
        self._raw += self._held[:end]
        self._held = self._held[end:]
        if tag or final:
            self._end_call()
            self._fences.begin_line()
            self._state = self._say
        return bool(tag)

    def _end_call(self) -> None:
        self._out.append(CallEnd(self.num_calls, self._call.complete, self._raw))
        self.num_calls += 1
        self._trim = True

    def _give_certain(self, kind: type[Text] | type[Thinking], tags: Sequence[str], final: bool) -> None:
        """Give out all but what may yet belong to one of the tags or to the line breaks before it."""
        ready = self._held if final else self._held[: len(self._held) - open_end(self._held, tags)]
        if self._tagged or (tags and not final):
            ready = ready.rstrip("\n")
        self._give_up_to(kind, len(ready))
        self._held = "" if final else self._held

    def _give_up_to(self, kind: type[Text] | type[Thinking], size: int) -> None:
        ready = self._held[:size]
        if kind is Thinking and len(self._held) > size:
            ready = ready.rstrip("\n")
        self._follow(ready)
        self._give(kind, ready)
        self._held = self._held[len(ready) :]

    def _follow(self, text: str) -> None:
        if self._dialect is not PLAIN:
            self._fences.push(text)

    def _give(self, kind: type[Text] | type[Thinking], text: str) -> None:
        if self._trim:
            bare = text.lstrip("\n")
            self._breaks = max(self._breaks, len(text) - len(bare))
            text = bare
            if text and kind is Text and self._said:
                text = "\n" * max(1, self._breaks) + text
        if text:
            self._trim, self._breaks = False, 0
            self._said |= kind is Text
            self._thought |= kind is Thinking
            self._out.append(kind(text))


def _places(text: str, tags: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Where tags stand in a text, from its start on, and which ones; of several at one place the longest."""
    place = 0
    while found := [(at, -len(tag), tag) for tag in tags if (at := text.find(tag, place)) >= 0]:
        place, _, tag = min(found)
        yield place, tag
        place += 1
