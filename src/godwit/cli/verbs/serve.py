"""`godwit serve`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from godwit.cli.options import Dtype, EngineOptions, Model, Quantize, ServedThinkingOptions, Threads, verb


@verb("serve")
def serve(
    *,
    model: Model = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; 0.0.0.0: all interfaces.", metavar="ADDRESS"),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    names: Annotated[
        list[str],
        typer.Option(
            "--name",
            default_factory=list,
            show_default=False,
            help="A name for the model in requests, which may contain *; may be repeated.",
            metavar="NAME",
        ),
    ],
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Require an API key from this file, which has one per line: KEY [LABEL] [rpm=N] [tpm=N], "
            "with limits of requests and tokens per minute; or set GODWIT_API_KEY."
        ),
    ] = None,
    hosts: Annotated[
        list[str],
        typer.Option(
            "--allow-host",
            default_factory=list,
            show_default=False,
            help="A host name that clients may use, in addition to this machine's; * is any; may be "
            "repeated. Required for other machines if there are no API keys.",
            metavar="NAME",
        ),
    ],
    per_address: Annotated[
        int,
        typer.Option(
            "--connections-per-address",
            min=1,
            help="Maximum connections from one remote address; 1,024 in total.",
        ),
    ] = 256,
    cors_origins: Annotated[
        list[str],
        typer.Option(
            "--cors-origin",
            default_factory=list,
            show_default=False,
            help="An origin whose web pages may use the server; may be repeated.",
            metavar="URL",
        ),
    ],
    refuse_media: Annotated[
        bool,
        typer.Option("--refuse-media", help="Reject images and files instead of replacing them by a note."),
    ] = False,
    engine: EngineOptions,
    thinking: ServedThinkingOptions,
    threads: Threads = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Serve a model through the OpenAI and Anthropic APIs."""
