"""`godwit train`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from godwit.cli.options import verb


@verb("train")
def train(
    *,
    recipe: Annotated[Path, typer.Argument(help="The training recipe.", metavar="RECIPE.toml")],
    resume: Annotated[
        bool, typer.Option(help="Resume from the last state in the output directory, if there is one.")
    ] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many more steps.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output directory; default: runs/ + the recipe's name.", metavar="DIR")
    ] = None,
) -> None:
    """Train a model from a recipe."""
