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


def text_rules(refused: str = "") -> list[str]:
    """Terminals of Lark: ``FREE`` is a text that ends outside of fences, ``REST`` one that may end anywhere.

    Args:
        refused: a regular expression of lines that the text must not have outside of fences; "" for none.
    """
    unless = f" & ~/{refused}/" if refused else ""
    code, begun = "|".join(_code(*one) for one in _FENCES), "|".join(_begun(*one) for one in _FENCES)
    return [
        f"PLAIN: /[ \\t]*({_PLAIN})?/{unless}",
        f'LINES: (PLAIN "\\n" | /{_TICKS}\\n|{code}/)*',
        "FREE: LINES PLAIN",
        f"REST: LINES (PLAIN | /({begun}|[ \\t]*(```|~~~))[^\\n]*/)",
    ]


#: Marks of fences, and how many; the last of each mark stands for all longer ones.
_FENCES = [(mark, count) for mark in "`~" for count in range(3, MAX_MARKS + 1)]
#: A line, after its blanks, that is not a fence, and one with backticks that only looks like one.
_PLAIN = "[^`~ \\t\\n][^\\n]*|`{1,2}([^`\\n][^\\n]*)?|~{1,2}([^~\\n][^\\n]*)?"
_TICKS = "[ \\t]*`{3,}[^`\\n]+`[^\\n]*"


def _begun(mark: str, count: int) -> str:
    """Fenced code before the line that ends it."""
    opening = f"{mark}{{{count}{',' if count == MAX_MARKS else ''}}}"
    info = "[^`\\n]*" if mark == "`" else "([^~\\n][^\\n]*)?"
    closing = f"{mark}{{{count},}}[ \\t\\r]*"
    other = f"[^{mark} \\t\\n][^\\n]*|{mark}{{1,{count - 1}}}([^{mark}\\n][^\\n]*)?"
    line = f"[ \\t]*({other}|{closing}([^{mark} \\t\\r\\n]|[ \\t\\r]{mark})[^\\n]*)?"
    return f"[ \\t]*{opening}{info}\\n({line}\\n)*"


def _code(mark: str, count: int) -> str:
    """Fenced code with both of its fences."""
    return f"{_begun(mark, count)}[ \\t]*{mark}{{{count},}}[ \\t\\r]*\\n"
