"""`godwit generate`: its options."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from godwit.cli.options import (
    AsJson,
    Context,
    Dtype,
    Model,
    Quantize,
    SamplingOptions,
    Speculate,
    System,
    ThinkingOptions,
    Threads,
    Tools,
    parse_logit_bias,
    verb,
)


@verb("generate")
def generate(
    *,
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; default: read stdin.", metavar="TEXT")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    system: System = None,
    tools: Tools = None,
    as_json: AsJson = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Write the answer only when complete.")
    ] = False,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(help="Add VALUE to the score of token ID; may be repeated.", metavar="ID=VALUE"),
    ] = None,
    sampling: SamplingOptions,
    thinking: ThinkingOptions,
    context: Context = None,
    speculate: Speculate = True,
    threads: Threads = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> dict[str, Any]:
    """Answer one prompt and exit."""
    given = dict(locals())
    given["stream"] = not given.pop("no_stream")
    given["logit_bias"] = parse_logit_bias(logit_bias or [])
    return given
