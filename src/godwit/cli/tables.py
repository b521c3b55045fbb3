"""Where tables go: stdout, by way of rich."""

from __future__ import annotations

from rich.console import Console


class Tables(Console):
    """Prints tables and lines to stdout."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Leave it to the command, as with all other output; rich would end the process with 1."""
        raise BrokenPipeError
