"""What a reader of tool calls looks like."""

from __future__ import annotations

from typing import Protocol


class CallReader(Protocol):
    """Reads one call, from behind its opening tag.

    Attributes:
        name: the function's, from when on the text is taken for a call of it.
        failed: the text is no call, or from here on none that can be read.
        ended: nothing more belongs to the call.
        complete: its arguments are a JSON object.
    """

    name: str | None
    failed: bool
    ended: bool
    complete: bool

    def push(self, text: str) -> tuple[int, str]:
        """Read on in ``text``: how many characters are used up, and what of the arguments is certain."""
        ...

    def flush(self, rest: str) -> str:
        """The text ends with ``rest``, which no push used up."""
        ...
