"""`godwit calibrate`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from godwit.cli.options import AsJson, Original, Threads, verb


@verb("calibrate")
def calibrate(
    *,
    model: Original,
    text: Annotated[Path, typer.Argument(help="A text file similar to what it will read.", metavar="TEXT")],
    out: Annotated[Path, typer.Argument(help="The file to create.", metavar="OUT.safetensors")],
    tokens: Annotated[int, typer.Option(min=2, help="Maximum tokens to read.", metavar="N")] = 65536,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure on a text which weights matter most, for quantize.

    Runs the original model on the text; pass the resulting file to godwit quantize --importance.
    """
