"""`godwit synth`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from godwit.cli.options import AsJson, RecipeName, Restart, verb


@verb("quantize", "run_synth")
def synth(
    *,
    config: Annotated[
        str, typer.Argument(help="A config.json, or a directory or repository with one.", metavar="CONFIG")
    ],
    out: Annotated[Path, typer.Argument(help="The packed file to create.", metavar="OUT.godwit")],
    layers: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Only the first N layers.", metavar="N"),
    ] = None,
    recipe: RecipeName = "q4",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same file.")] = 0,
    skew: Annotated[
        Literal["uniform", "real"],
        typer.Option(help="Expert usage: uniform, or skewed as in real models."),
    ] = "uniform",
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Write a packed model with random weights.

    It has the size and speed of the real one, for benchmarks.
    """
