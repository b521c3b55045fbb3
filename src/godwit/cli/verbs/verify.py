"""`godwit verify`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from godwit.cli.options import AsJson, verb


@verb("quantize", "run_verify")
def verify(
    *,
    file: Annotated[Path, typer.Argument(help="A packed file.", metavar="FILE.godwit")],
    as_json: AsJson = False,
) -> None:
    """Check every byte of a packed file against its checksums."""
