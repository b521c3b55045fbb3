"""Where a text that arrives in pieces shows code: between fences of Markdown, in which nothing is called."""

from __future__ import annotations

import re

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)", re.DOTALL)


class Fences:
    """Follows a text from its start."""

    def __init__(self) -> None:
        self._line = ""
        self._fence = ""

    def push(self, text: str) -> None:
        """Go on by some text."""
        *whole, rest = text.split("\n")
        for line in whole:
            self._end_line(self._line + line)
            self._line = ""
        self._line += rest

    @property
    def at_line_start(self) -> bool:
        """Whether a line begins here, outside of fences."""
        return not self._line and not self._fence

    @property
    def inside(self) -> bool:
        """Whether this is within fences, or in the line of the first one."""
        return bool(self._fence) or _FENCE.match(self._line) is not None

    def begin_line(self) -> None:
        """What comes next begins a line, whatever came before."""
        self._line = ""

    def copy(self) -> Fences:
        """Another one at the same place."""
        other = Fences()
        other._line, other._fence = self._line, self._fence
        return other

    def _end_line(self, line: str) -> None:
        found = _FENCE.fullmatch(line)
        if found is None:
            return
        marks, rest = found.groups()
        if self._fence:
            if marks.startswith(self._fence) and not rest.strip():
                self._fence = ""
        elif not ("`" in marks and "`" in rest):
            self._fence = marks
