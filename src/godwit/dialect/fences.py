"""Fenced code of Markdown, in which nothing is called: in a text that arrives in pieces, and for grammars."""

from __future__ import annotations

import re

#: A longer fence is taken for one of this length, since a regular expression cannot count.
MAX_MARKS = 6
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)", re.DOTALL)
_BLANKS = " \t\r"


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
        """Whatever came before, a line begins here."""
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
            if marks.startswith(self._fence) and not rest.strip(_BLANKS):
                self._fence = ""
        elif not ("`" in marks and "`" in rest):
            self._fence = marks[:MAX_MARKS]


def _fenced(mark: str, count: int) -> str:
    """Fenced code with its two fences, of which the first has ``count`` marks."""
    opening = f"{mark}{{{count}{',' if count == MAX_MARKS else ''}}}"
    info = "[^`\\n]*" if mark == "`" else "([^~\\n][^\\n]*)?"
    closing = f"{mark}{{{count},}}[ \\t\\r]*"
    other = f"[^{mark} \\t\\n][^\\n]*|{mark}{{1,{count - 1}}}([^{mark}\\n][^\\n]*)?"
    line = f"[ \\t]*({other}|{closing}([^{mark} \\t\\r\\n]|[ \\t\\r]{mark})[^\\n]*)?"
    return f"[ \\t]*{opening}{info}\\n({line}\\n)*[ \\t]*{closing}\\n"


_BEGUN = "[^`~ \\t\\n][^\\n]*|`{1,2}([^`\\n][^\\n]*)?|~{1,2}([^~\\n][^\\n]*)?"
_LINE = f"[ \\t]*({_BEGUN}|`{{3,}}[^`\\n]+`[^\\n]*)?\\n"
_CODE = "|".join(_fenced(mark, count) for mark in "`~" for count in range(3, MAX_MARKS + 1))
#: Regular expressions of texts after which a line begins outside of fences, and of those that end outside.
OUTSIDE_LINES = f"({_LINE}|{_CODE})*"
OUTSIDE = f"{OUTSIDE_LINES}[ \\t]*({_BEGUN})?"
