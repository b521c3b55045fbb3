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
        typer.Option(help="Where to listen; 0.0.0.0 is every address of this machine.", metavar="ADDRESS"),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    names: Annotated[
        list[str],
        typer.Option(
            "--name",
            default_factory=list,
            show_default=False,
            help="What requests may call the model, also with *; may be repeated.",
            metavar="NAME",
        ),
    ],
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Ask for one of the keys in this file, one a line: KEY [LABEL] [rpm=N] [tpm=N], with limits "
            "of requests and tokens a minute; or set GODWIT_API_KEY."
        ),
    ] = None,
    hosts: Annotated[
        list[str],
        typer.Option(
            "--allow-host",
            default_factory=list,
            show_default=False,
            help="A host name by which clients may address the server besides those of this machine; may be "
            "repeated, * is any. Needed beyond this machine where there are no keys.",
            metavar="NAME",
        ),
    ],
    per_address: Annotated[
        int,
        typer.Option(
            "--connections-per-address",
            min=1,
            help="Connections from any one address but this machine's; 1,024 in all.",
        ),
    ] = 256,
    cors_origins: Annotated[
        list[str],
        typer.Option(
            "--cors-origin",
            default_factory=list,
            show_default=False,
            help="A web page's origin that may use the server; may be repeated.",
            metavar="URL",
        ),
    ],
    refuse_media: Annotated[
        bool,
        typer.Option("--refuse-media", help="Refuse images and files, rather than say they were left out."),
    ] = False,
    engine: EngineOptions,
    thinking: ServedThinkingOptions,
    threads: Threads = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Serve a model over OpenAI's and Anthropic's APIs."""
