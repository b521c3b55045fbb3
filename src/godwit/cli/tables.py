"""What tables share: where they go, which is stdout by way of rich, and how sizes are written."""

from __future__ import annotations

from rich.console import Console


class Tables(Console):
    """Prints tables and lines to stdout."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Leave it to the command, as with all other output; rich would end the process with 1."""
        raise BrokenPipeError


def size_text(size: int) -> str:
    """Bytes for a reader, in decimal units."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size} B"
