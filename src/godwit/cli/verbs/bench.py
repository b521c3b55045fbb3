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
        typer.Option("-p", help="Prompt lengths in tokens, such as 512,4096; 0: none.", metavar="N,N..."),
    ] = None,
    new_tokens: Annotated[
        int,
        typer.Option("-n", min=0, max=1 << 24, help="Decoding steps per case; 0: none.", metavar="N"),
    ] = 128,
    depths: Annotated[
        str | None,
        typer.Option("-d", help="Tokens in the cache before decoding, such as 0,4096.", metavar="N,N..."),
    ] = None,
    batches: Annotated[
        str, typer.Option("-b", help="Batch sizes for decoding, such as 1,4,8.", metavar="N,N...")
    ] = "1",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every case once.")] = 5,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens processed per step.", metavar="N")] = 4096,
    threads: Threads = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show the time of each native op.")] = False,
    as_json: AsJson = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the JSON to this file.", metavar="FILE")
    ] = None,
) -> None:
    """Measure a model's speed relative to the machine's current limits."""
