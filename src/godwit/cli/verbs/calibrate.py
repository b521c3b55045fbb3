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
    text: Annotated[Path, typer.Argument(help="A file of text like what it will read.", metavar="TEXT")],
    out: Annotated[Path, typer.Argument(help="The file to create.", metavar="OUT.safetensors")],
    tokens: Annotated[
        int, typer.Option(min=2, help="Read no more than this much of the text.", metavar="N")
    ] = 65536,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Learn from a text which columns matter, for quantize.

    The original is loaded and reads the text; give the file to godwit quantize --importance.
    """
