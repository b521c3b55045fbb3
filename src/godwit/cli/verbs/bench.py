"""`godwit bench`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from godwit.cli.options import AsJson, Dtype, Model, Quantize, Threads, verb


@verb("bench")
def bench(
    *,
    model: Model = None,
    prompts: Annotated[
        str | None,
        typer.Option("-p", help="Prompts to read, such as 512,4096 tokens; 0 for none.", metavar="N,N..."),
    ] = None,
    new_tokens: Annotated[
        int,
        typer.Option(
            "-n", min=0, max=1 << 24, help="Steps of decoding in each case; 0 for none.", metavar="N"
        ),
    ] = 128,
    depths: Annotated[
        str | None,
        typer.Option("-d", help="Tokens in the caches before decoding, such as 0,4096.", metavar="N,N..."),
    ] = None,
    batches: Annotated[
        str, typer.Option("-b", help="Sequences decoded together, such as 1,4,8.", metavar="N,N...")
    ] = "1",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which all cases take turns.")] = 5,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt that are read in one step.", metavar="N")
    ] = 4096,
    threads: Threads = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show the share of each native op.")] = False,
    as_json: AsJson = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the JSON to this file too.", metavar="FILE")
    ] = None,
) -> None:
    """Measure speed beside what the machine can do now."""
