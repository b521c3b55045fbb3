"""Terminal input and output of a chat: reading messages and showing answers, with colours if possible."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

DIM, CYAN, RED, PLAIN = "\x1b[2m", "\x1b[36m", "\x1b[31m", "\x1b[0m"
BLOCK = '"""'
# A model can write any character; control characters must not reach the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """`text` with its control characters replaced."""
    return _CONTROL.sub("\ufffd", text)


def tolerate_any_text() -> None:
    """Make the standard streams replace characters that they cannot encode or decode, instead of failing."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@dataclass(frozen=True)
class TypedMessage:
    """What the user typed; `literal`: in a block, so never a command."""

    text: str
    literal: bool = False


class Terminal:
    """Reads from stdin; writes answers to stdout and everything else to stderr.

    Prompts, colours and line editing are only used if the streams are terminals.
    """

    def __init__(self) -> None:
        tolerate_any_text()
        self.interactive = sys.stdin.isatty()
        self._open: IO[str] | None = None  # the stream with an unfinished line
        self._kind = ""
        self._after_tag = False
        self._progress = ""
        if self.interactive:
            with contextlib.suppress(ImportError):  # missing from some builds of Python
                import readline  # noqa: F401 (adds editing and history to input())

    def read(self, prompt: str) -> TypedMessage | None:
        r"""The next message, or None at the end of the input; raises KeyboardInterrupt.

        A line that ends with ``\`` continues on the next; text between two ``\"\"\"`` is literal.
        """
        line = self._line(prompt)
        if line is None:
            return None
        if line.lstrip().startswith(BLOCK):
            return TypedMessage(self._block(line.lstrip().removeprefix(BLOCK)), literal=True)
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line("... ")
        return TypedMessage("\n".join([*lines, *([] if line is None else [line])]))

    def _block(self, line: str | None) -> str:
        lines: list[str] = []
        while line is not None:
            if line.rstrip().endswith(BLOCK):
                lines.append(line.rstrip().removesuffix(BLOCK))
                break
            lines.append(line)
            line = self._line("... ")
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self.interactive and sys.stdout.isatty():
            try:
                return input(prompt)
            except EOFError:
                return None
        if self.interactive:
            self._write(sys.stderr, prompt)
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None

    def begin_answer(self) -> None:
        """Start a new answer."""
        self._kind, self._after_tag = "", False

    def part(self, kind: str, text: str) -> None:
        """Show a part of the answer, of kind "text" or "thinking"."""
        if kind != self._kind:
            self.end_line()
            self._after_tag = self._kind != "" or kind == "thinking"
            self._kind = kind
        if self._after_tag:
            text = text.lstrip("\n")
            self._after_tag = not text
        if kind == "thinking":
            self._say(sys.stdout if sys.stdout.isatty() else sys.stderr, text, DIM)
        else:
            self._say(sys.stdout, text)

    def call(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Show a tool call on its own line."""
        self.end_line()
        self._kind = "call"
        self._say(sys.stdout, f"call {name} {json.dumps(arguments, ensure_ascii=False)}\n", CYAN)

    def end_line(self) -> None:
        """End the current line of the answer, if one is open."""
        if self._open is not None:
            self._say(self._open, "\n")

    def note(self, text: str) -> None:
        """Show a message from the program."""
        self._clear_progress()
        self._write(sys.stderr, _styled(sys.stderr, harmless_lines(text), DIM) + "\n")

    def error(self, text: str) -> None:
        """Show an error."""
        self._clear_progress()
        self._write(sys.stderr, _styled(sys.stderr, harmless_lines(text), RED) + "\n")

    def progress(self, done: int, total: int, step: int) -> None:
        """Show the progress of reading a prompt of several steps, if stderr is a terminal."""
        if total > step and sys.stderr.isatty():
            self._clear_progress()
            self._progress = f"reading {done} of {total} tokens"
            self._write(sys.stderr, _styled(sys.stderr, self._progress, DIM))

    def _clear_progress(self) -> None:
        if self._progress:
            self._write(sys.stderr, f"\r{' ' * len(self._progress)}\r")
            self._progress = ""

    def _say(self, stream: IO[str], text: str, style: str = "") -> None:
        if not text:
            return
        self._clear_progress()
        self._open = None if text.endswith("\n") else stream
        self._write(stream, _styled(stream, harmless(text) if stream.isatty() else text, style))

    def _write(self, stream: IO[str], text: str) -> None:
        stream.write(text)
        stream.flush()


def harmless_lines(text: str) -> str:
    """`text` without control characters and trailing whitespace."""
    return harmless(text).rstrip()


def _styled(stream: IO[str], text: str, style: str) -> str:
    colours = stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return f"{style}{text}{PLAIN}" if style and colours else text
