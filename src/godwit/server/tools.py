"""Takes an answer apart while it arrives: thinking, text and tool calls, in the form that its template has.

Two forms of calls are known, both between ``<tool_call>`` and ``</tool_call>``: the JSON of Hermes 2 Pro, and
the tags of Qwen3-Coder. What is given out depends on the text alone, never on how it was cut into pieces.
What the model wrote is data: it is parsed as JSON or taken as text, and never evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from godwit.server.calls import CallReader
from godwit.server.hermes import HermesCall
from godwit.server.xml_calls import FUNCTION, XmlCall

Format = Literal["hermes", "xml"]
CALL, END_CALL, THINK, END_THINK = "<tool_call>", "</tool_call>", "<think>", "</think>"
_OPENERS: dict[Format | None, tuple[str, ...]] = {None: (), "hermes": (CALL,), "xml": (CALL, FUNCTION)}
# Models that write XML calls sometimes forget to close their thinking before one.
_FORGOTTEN_ENDS: dict[Format | None, tuple[str, ...]] = {"xml": (f"{CALL}\n{FUNCTION}", CALL + FUNCTION)}


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


def format_of(template: str) -> Format | None:
    """How a model with this chat template calls tools; None where the template knows no tools."""
    if "tools" not in template:
        return None
    return "xml" if FUNCTION in template else "hermes"


def ends_of_thinking(format: Format | None) -> tuple[str, ...]:
    """What ends thinking in an answer that may have calls of this format."""
    return (END_THINK, *_FORGOTTEN_ENDS.get(format, ()))


class AnswerParser:
    """Takes one answer apart.

    Line breaks beside the tags are left out: templates write them again.

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
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        thinking: bool = False,
        only_calls: bool = False,
    ) -> None:
        self._format: Format | None = format
        self._only_calls = only_calls
        self._schemas = schemas or {}
        self._opened = thinking
        self._openers = _OPENERS[format]
        self._state: Callable[[bool], bool] = self._begin
        self._held = ""
        self._out: list[Delta] = []
        self._trim = False  # leave line breaks out until something else comes
        self._tagged = self._thought = False
        self._gap = ""  # line breaks before the call that is read
        self._raw = ""
        self._call: CallReader = HermesCall()
        self._started = self._cut = False
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

    def flush(self, *, cut: bool = False) -> list[Delta]:
        """What is left at the end of the answer; ``cut``: it ended before its time."""
        self._cut = cut
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
        closers = ends_of_thinking(self._format)
        place, tag = _first(self._held, closers)
        if not tag:
            self._give_certain(Thinking, closers, final)
            return False
        self._give(Thinking, self._held[:place].rstrip("\n"))
        self._held = self._held[place:].removeprefix(END_THINK)
        self._trim = True
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
        begun = self._held.lstrip() if self._only_calls else ""
        if begun and not any(tag.startswith(begun[: len(tag)]) for tag in self._openers):
            self._openers = ()
        place, tag = _first(self._held, self._openers)
        if not tag:
            self._give_certain(Text, self._openers, final)
            return False
        said = self._held[:place].rstrip("\n")
        self._give(Text, said)
        self._gap = self._held[len(said) : place]
        self._held = self._held[place + len(tag) :]
        self._raw, self._started = tag, False
        as_tags = self._format == "xml"
        self._call = XmlCall(self._schemas, opened=tag == FUNCTION) if as_tags else HermesCall()
        self._state = self._read_call
        return True

    def _read_call(self, final: bool) -> bool:
        call = self._call
        used, arguments = call.push(self._held)
        self._raw += self._held[:used]
        self._held = self._held[used:]
        if final and not (call.ended or call.failed):
            arguments += call.flush(self._held, self._cut)
            if not call.failed:
                self._raw, self._held = self._raw + self._held, ""
        if call.name is not None and not self._started:
            self._started = self._tagged = True
            self._out.append(CallStart(self.num_calls, call.name))
        if arguments:
            self._out.append(CallArguments(self.num_calls, arguments))
        if not self._started and call.failed:
            self._give(Text, self._gap + self._raw)
            self._state = self._say
        elif call.complete and (call.ended or call.failed):
            self._end_call()
            self._state = self._leave_call
        elif call.ended or call.failed:
            self._state = self._drop_call
        return call.ended or call.failed

    def _leave_call(self, final: bool) -> bool:
        """Behind a whole call: the closing tag, and closing braces that are too many."""
        rest = self._held.lstrip(" \t\r\n}")
        if not final and len(rest) < len(END_CALL) and END_CALL.startswith(rest):
            return False
        self._held = rest.removeprefix(END_CALL)
        self._state = self._leave_thinking
        return True

    def _drop_call(self, final: bool) -> bool:
        """In a call that is broken: on to its end, or to the next one."""
        place, tag = _first(self._held, (END_CALL, *self._openers))
        if tag:
            end = place + len(tag) if tag == END_CALL else place
        else:
            end = len(self._held) - (0 if final else _open_end(self._held, (END_CALL, *self._openers)))
        self._raw += self._held[:end]
        self._held = self._held[end:]
        if tag or final:
            self._end_call()
            self._state = self._say
        return bool(tag)

    def _end_call(self) -> None:
        self._out.append(CallEnd(self.num_calls, self._call.complete, self._raw))
        self.num_calls += 1
        self._trim = True

    def _give_certain(self, kind: type[Text] | type[Thinking], tags: Sequence[str], final: bool) -> None:
        """Give out all but what may yet belong to one of the tags or to the line breaks before it."""
        ready = self._held if final else self._held[: len(self._held) - _open_end(self._held, tags)]
        if self._tagged or (tags and not final):
            ready = ready.rstrip("\n")
        self._give(kind, ready)
        self._held = "" if final else self._held[len(ready) :]

    def _give(self, kind: type[Text] | type[Thinking], text: str) -> None:
        if self._trim:
            text = text.lstrip("\n")
        if text:
            self._trim = False
            self._thought = self._thought or kind is Thinking
            self._out.append(kind(text))


def _first(text: str, tags: Sequence[str]) -> tuple[int, str]:
    """Where the first of the tags stands and which it is, of several the longest; "" for none."""
    found = [(place, -len(tag), tag) for tag in tags if (place := text.find(tag)) >= 0]
    return (min(found)[0], min(found)[2]) if found else (-1, "")


def _open_end(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which one of the tags begins."""
    sizes = [size for tag in tags for size in range(1, len(tag)) if text.endswith(tag[:size])]
    return max(sizes, default=0)
