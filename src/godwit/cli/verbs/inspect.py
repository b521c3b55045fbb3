"""`godwit inspect`: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from godwit.cli.options import AsJson, verb


@verb("inspect")
def inspect(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A directory, GGUF or packed file, config.json or Hub repository; default: built-in.",
            metavar="MODEL",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 31, help="Context length to compute the memory for.", metavar="N"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's architecture, size and memory requirements."""
