"""Splits an answer into thinking, text and tool calls while it arrives.

The result depends on the text alone, never on how it was cut into pieces. What the model wrote is data: it is
parsed as JSON or kept as text, and never evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from godwit.dialect.dialect import CallReader, Dialect, Schemas
from godwit.dialect.fences import Fences
from godwit.dialect.hermes_calls import HERMES
from godwit.dialect.json_calls import JsonCall
from godwit.dialect.tags import END_THINK, THINK, open_end

#: Where nothing is taken for a call.
_NO_CALLS = replace(HERMES, name="none", openers=(), ends_thinking=False)


@dataclass(frozen=True)
class Text:
    """A part of the answer's text."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """A part of the thinking."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """Call number ``index`` begins; it calls the function ``name``."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A part of the call's arguments: JSON as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call is over.

    Attributes:
        complete: its arguments are a JSON object; if not, the model made a mistake or was cut off.
        raw: the text of the call, from the opening tag on.
    """

    index: int
    complete: bool
    raw: str


Delta = Text | Thinking | CallStart | CallArguments | CallEnd


class AnswerParser:
    """Splits one answer.

    Line breaks next to tags are dropped, since templates write them again. Text before a call and text after
    it are separated by as many line breaks as stood on either side of the call, whichever is more, but at
    least one.

    Args:
        dialect: of tool calls; None: the answer has no calls.
        schemas: the parameters of each tool, by its name.
        thinking: the prompt has opened ``<think>``.
        only_calls: an answer with calls has no text, so what looks like a call after some text, such as in a
            JSON string, is text.
    """

    def __init__(
        self,
        dialect: Dialect | None = None,
        schemas: Schemas | None = None,
        *,
        thinking: bool = False,
        only_calls: bool = False,
    ) -> None:
        self._dialect = dialect or _NO_CALLS
        self._only_calls = only_calls
        self._schemas = schemas or {}
        self._opened = thinking
        self._state: Callable[[bool], bool] = self._begin
        self._held = ""
        self._out: list[Delta] = []
        self._fences = Fences()
        self._trim = False  # drop line breaks until something else comes
        self._breaks = 0  # dropped since the last text
        self._tagged = self._said = self._thought = False
        self._gap = ""  # line breaks before the current call
        self._raw = ""
        self._call: CallReader = JsonCall()
        self._started = False
        self.num_calls = 0

    @property
    def thinks(self) -> bool:
        """Whether what comes next is thinking."""
        return self._state == self._think or (self._opened and self._state == self._begin)

    @property
    def speaks(self) -> bool:
        """Whether what comes next is neither thinking nor part of a call."""
        return self._state in (self._begin, self._leave_thinking, self._say) and not self.thinks

    def push(self, text: str) -> list[Delta]:
        """Add ``text``; returns what is certain now."""
        self._held += text
        return self._run(final=False)

    def flush(self) -> list[Delta]:
        """End the answer; returns what is left."""
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Delta]:
        while self._state(final):
            pass
        out, self._out = self._out, []
        return out

    # States. Each consumes what is certain of the held text and returns whether to go on with another state.

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
        """Read to the closing tag, or to a whole call that ends the answer."""
        fences, place = self._fences.copy(), 0
        tags = (END_THINK, *self._dialect.thinking_enders)
        for start, tag in _places(self._held, tags):
            fences.push(self._held[place:start])
            place = start
            if tag == END_THINK:
                return self._end_thinking(start)
            if not fences.at_line_start:
                continue
            text, closed, _ = self._held[start:].partition(END_THINK)
            whole = self._dialect.whole_calls(text, tag, self._schemas, final and not closed)
            if closed and whole is None:  # then it was only thought of
                continue
            if whole:
                return self._end_thinking(start)
            if whole is None:
                self._give_up_to(Thinking, start)
                return False
        self._give_certain(Thinking, tags, final)
        return False

    def _end_thinking(self, place: int) -> bool:
        self._give(Thinking, self._held[:place].rstrip("\n"))
        self._held = self._held[place:].removeprefix(END_THINK)
        self._trim = True
        self._fences = Fences()
        self._state = self._leave_thinking
        return True

    def _leave_thinking(self, final: bool) -> bool:
        """After thinking or a call: thinking may begin again, and a second closing tag is dropped."""
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
        begun = self._held.lstrip() if self._only_calls else ""
        if begun and not any(tag.startswith(begun[: len(tag)]) for tag in self._dialect.tags):
            self._dialect = _NO_CALLS
        tags = self._dialect.tags
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
        self._raw = tag if tag != "{" else ""  # the reader needs the brace
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
        """What was read is not a call, so it is text."""
        self._follow(self._raw)
        self._give(Text, self._gap + self._raw)
        self._state = self._say
        if self._only_calls and not self.num_calls:
            self._dialect = _NO_CALLS

    def _leave_call(self, final: bool) -> bool:
        """After a whole call: skip the closing tag, surplus braces, and what separates calls."""
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
        """In a broken call: skip to its end or to the next call."""
        closer = self._dialect.closer
        tags = [tag for tag in (closer, *self._dialect.openers) if tag]
        place, tag = next(iter(_places(self._held, tags)), (-1, ""))
        if tag:
            end = place + len(tag) if tag == closer else place
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
        """Emit all but what may turn out to be part of a tag or of the line breaks before it."""
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
        if self._dialect is not _NO_CALLS:
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
    """Positions of tags in a text, in order, with the tag; where several match, the longest."""
    place = 0
    while found := [(at, -len(tag), tag) for tag in tags if (at := text.find(tag, place)) >= 0]:
        place, _, tag = min(found)
        yield place, tag
        place += 1
