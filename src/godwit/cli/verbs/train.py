"""`godwit train`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from godwit.cli.options import verb


@verb("train")
def train(
    *,
    recipe: Annotated[Path, typer.Argument(help="What to train, on what and how.", metavar="RECIPE.toml")],
    resume: Annotated[
        bool, typer.Option(help="Go on from the last state in the output directory, if there is one.")
    ] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many more steps.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write in place of the recipe's directory.", metavar="DIR")
    ] = None,
) -> None:
    """Train a model from a recipe."""
