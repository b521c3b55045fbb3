"""Shared by tables: a rich console on stdout, and formatted sizes."""

from __future__ import annotations

from rich.console import Console


class Tables(Console):
    """Prints tables and lines to stdout."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Let the command handle it, as for all output; rich would exit with code 1."""
        raise BrokenPipeError


def size_text(size: int) -> str:
    """A number of bytes in readable decimal units."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size} B"
