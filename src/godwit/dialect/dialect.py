"""What a dialect is: how a model writes tool calls, with what reads them and the grammar that forces them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from godwit.dialect.grammar import CallGrammar

Schemas = Mapping[str, Mapping[str, Any]]
#: Characters of an unfinished call in thinking that are examined.
MAX_EXAMINED = 512
SPACE = " \t\r\n"


class CallReader(Protocol):
    """Reads one call, from behind its opening tag.

    Attributes:
        name: the function's, once the text is certain to be a call of it.
        failed: the text is not a call, or cannot be read any further.
        ended: nothing more belongs to the call.
        complete: its arguments are a JSON object.
    """

    name: str | None
    failed: bool
    ended: bool
    complete: bool

    def push(self, text: str) -> tuple[int, str]:
        """Read on in ``text``.

        Returns: the number of characters used, and the part of the arguments that is certain.
        """
        ...

    def flush(self, rest: str) -> str:
        """Read ``rest``, which no push used, at the end of the answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a model writes calls.

    Attributes:
        name: for messages and tests.
        written_in: whether a chat template writes calls like this.
        reader: makes the reader of one call from its opening tag and the parameters of the tools.
        grammar: of calls, alone or in text; what it lets through, the reader reads back.
        openers: tags that begin a call anywhere but in fenced code.
        line_openers: tags that do so only at the start of a line.
        closer: tag that may follow a call.
        between: characters that are left out after a call.
        chains: a brace after a call begins the next one.
        ends_thinking: the model sometimes leaves out ``</think>`` before its calls.
        short_ids: the chat template takes ids of nine letters and digits only.
    """

    name: str
    written_in: Callable[[str], bool]
    reader: Callable[[str, Schemas], CallReader]
    grammar: CallGrammar
    openers: tuple[str, ...] = ()
    line_openers: tuple[str, ...] = ()
    closer: str = ""
    between: str = SPACE + "}],;"
    chains: bool = False
    ends_thinking: bool = False
    short_ids: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        """All that may begin a call."""
        return (*self.openers, *self.line_openers)

    @property
    def thinking_enders(self) -> tuple[str, ...]:
        """Tags of a call that may end thinking which was not closed."""
        return self.openers if self.ends_thinking else ()

    def whole_calls(self, text: str, opener: str, schemas: Schemas, final: bool) -> bool | None:
        """Whether a text begins with a whole call of a known tool, and then ends or goes on with another one.

        None: more text is needed to tell.
        """
        call, undecided = self.reader(opener, schemas), not final and self.closer not in text
        used, _ = call.push(text[len(opener) : MAX_EXAMINED if undecided else None])
        if call.failed or call.name not in (None, *schemas):
            return False
        if undecided or not (call.ended or final):
            return None
        rest = text[len(opener) + used :].lstrip(SPACE)
        if not call.complete or (rest and not rest.startswith(self.closer)) or not (rest or final):
            return None if call.complete and not final and self.closer.startswith(rest) else False
        rest = rest.removeprefix(self.closer).lstrip(SPACE)
        if not final and len(rest) < len(opener) and opener.startswith(rest):
            return None
        return not rest or rest.startswith(opener)
