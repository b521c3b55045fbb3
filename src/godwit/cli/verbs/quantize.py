"""`godwit quantize`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from godwit.cli.options import AsJson, Original, Restart, Threads, verb


@verb("quantize", "run_quantize")
def quantize(
    *,
    model: Original,
    out: Annotated[Path, typer.Argument(help="The packed file to create.", metavar="OUT.godwit")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "--format",
            help="q4, q8, bf16, or a TOML file with formats; without it, q4; of a GGUF file what it holds.",
            metavar="NAME|FILE",
        ),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(help="The importance of each matrix column, from godwit calibrate.", metavar="FILE"),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="Compare with the original on this text.", metavar="FILE")
    ] = None,
    threads: Threads = None,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model to one packed file.

    An interrupted run resumes when the same command is run again.
    """
