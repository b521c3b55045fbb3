"""The `godwit` command: options, help and exit codes. What a verb does lies in its own module."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import godwit
from godwit.cli.options import (
    AsJson,
    Context,
    Dtype,
    Model,
    Original,
    Quantize,
    RecipeName,
    Restart,
    SamplingOptions,
    ServedThinkingOptions,
    Speculate,
    System,
    ThinkingOptions,
    Threads,
    Tools,
    parse_logit_bias,
    takes_options,
)
from godwit.cli.outcome import drop_output, one_sentence

app = typer.Typer(
    name="godwit",
    no_args_is_help=True,
    add_completion=False,
    # Rich help and rich tracebacks would cost more start-up time than the rest of the command.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"godwit {godwit.__version__}")
        raise typer.Exit


@app.callback(
    epilog="Answers go to stdout, everything else to stderr. MODEL is a directory, a packed file, a Hugging "
    "Face repository, or the model built in. Exit codes: docs/commands.md."
)
def _shared(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run, serve, shrink, measure and train sparse hybrid language models on the machine you have."""
    ctx.obj = debug


@app.command()
@takes_options
def chat(
    ctx: typer.Context,
    *,
    model: Model = None,
    system: System = None,
    tools: Tools = None,
    sampling: SamplingOptions,
    thinking: ThinkingOptions,
    context: Context = None,
    speculate: Speculate = True,
    threads: Threads = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Talk with a model in the terminal."""
    with one_sentence(ctx):
        from godwit.cli.chat import run

        run(
            model,
            system=system,
            tools=tools,
            sampling=sampling,
            thinking=thinking,
            context=context,
            speculate=speculate,
            threads=threads,
            dtype=dtype,
            quantize=quantize,
        )


@app.command()
@takes_options
def generate(
    ctx: typer.Context,
    *,
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to answer; without it, stdin.", metavar="TEXT")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the chat template.")] = False,
    system: System = None,
    tools: Tools = None,
    as_json: AsJson = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Write the answer once complete.")] = False,
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
) -> None:
    """Answer one prompt and exit."""
    with one_sentence(ctx):
        from godwit.cli.generate import run

        run(
            model,
            prompt=prompt,
            raw=raw,
            system=system,
            tools=tools,
            as_json=as_json,
            stream=not no_stream,
            logit_bias=parse_logit_bias(logit_bias or []),
            sampling=sampling,
            thinking=thinking,
            context=context,
            speculate=speculate,
            threads=threads,
            dtype=dtype,
            quantize=quantize,
        )


@app.command()
@takes_options
def serve(
    ctx: typer.Context,
    *,
    model: Model = None,
    host: Annotated[
        str,
        typer.Option(help="Where to listen; 0.0.0.0 is every address of this machine.", metavar="ADDRESS"),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(help="What requests may call the model, also with *; may be repeated.", metavar="NAME"),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Ask for one of the keys in this file, one a line: KEY [LABEL] [rpm=N] [tpm=N], with limits "
            "of requests and tokens a minute; or set GODWIT_API_KEY."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A host name by which clients may address the server besides those of this machine; may be "
            "repeated, * is any. Needed beyond this machine where there are no keys.",
            metavar="NAME",
        ),
    ] = None,
    connections_per_address: Annotated[
        int,
        typer.Option(min=1, help="Connections from any one address but this machine's; 1,024 in all."),
    ] = 256,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may use the server; may be repeated.", metavar="URL"),
    ] = None,
    refuse_media: Annotated[
        bool,
        typer.Option("--refuse-media", help="Refuse images and files, rather than say they were left out."),
    ] = False,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together.", metavar="N")
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, max=4096, help="Answers that run at a time.", metavar="N")
    ] = 64,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0, max=1 << 20, help="For caches, in GiB; without it, half of what is free.", metavar="GIB"
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Keep what was read here across restarts.", metavar="DIR")
    ] = None,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Check the engine's books whenever there is nothing to do.")
    ] = False,
    speculate: Speculate = True,
    thinking: ServedThinkingOptions,
    threads: Threads = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Serve a model over OpenAI's and Anthropic's APIs."""
    with one_sentence(ctx):
        from godwit.cli.serve import EngineOptions, run

        run(
            model,
            host=host,
            port=port,
            names=name or [],
            api_key_file=api_key_file,
            cors_origins=cors_origin or [],
            refuse_media=refuse_media,
            hosts=allow_host or [],
            per_address=connections_per_address,
            engine=EngineOptions(
                context=context,
                memory_gib=memory,
                max_sequences=max_sequences,
                cache_dir=cache_dir,
                self_check=self_check,
                speculate=speculate,
            ),
            thinking=thinking,
            threads=threads,
            dtype=dtype,
            quantize=quantize,
        )


@app.command()
def inspect(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A directory, packed file, config.json or Hugging Face repository; without it, built-in.",
            metavar="MODEL",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 31, help="Tokens of context to reckon the memory for.", metavar="N"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model is and the memory it takes."""
    with one_sentence(ctx):
        from godwit.cli.inspect import run

        run(model, context=context, as_json=as_json)


@app.command()
def doctor(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Show what this machine offers and what is missing."""
    with one_sentence(ctx):
        from godwit.cli.doctor import run

        raise typer.Exit(run(as_json=as_json))


@app.command()
def bench(
    ctx: typer.Context,
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
    with one_sentence(ctx):
        from godwit.cli.bench import run

        run(
            model,
            prompts=prompts,
            new_tokens=new_tokens,
            depths=depths,
            batches=batches,
            repeats=repeats,
            chunk=chunk,
            threads=threads,
            dtype=dtype,
            quantize=quantize,
            profile=profile,
            as_json=as_json,
            output=output,
        )


@app.command()
def quantize(
    ctx: typer.Context,
    model: Original,
    out: Annotated[Path, typer.Argument(help="The packed file to create.", metavar="OUT.godwit")],
    recipe: RecipeName = "q4",
    importance: Annotated[
        Path | None,
        typer.Option(help="How much each column of a matrix matters, from godwit calibrate.", metavar="FILE"),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="Compare with the original on this text file.", metavar="FILE")
    ] = None,
    threads: Threads = None,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Pack a model into one file of fewer bits.

    A run that was cut off goes on when the same command is given again.
    """
    with one_sentence(ctx):
        from godwit.cli.quantize import run_quantize

        run_quantize(
            model,
            out,
            recipe=recipe,
            importance=importance,
            evaluate=evaluate,
            threads=threads,
            restart=restart,
            as_json=as_json,
        )


@app.command()
def calibrate(
    ctx: typer.Context,
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
    with one_sentence(ctx):
        from godwit.cli.calibrate import run

        run(model, text, out, tokens=tokens, threads=threads, as_json=as_json)


@app.command()
def synth(
    ctx: typer.Context,
    config: Annotated[
        str, typer.Argument(help="A config.json, or a directory or repository with one.", metavar="CONFIG")
    ],
    out: Annotated[Path, typer.Argument(help="The packed file to create.", metavar="OUT.godwit")],
    layers: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Only the first of the model's layers.", metavar="N"),
    ] = None,
    recipe: RecipeName = "q4",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same file.")] = 0,
    skew: Annotated[
        Literal["uniform", "real"],
        typer.Option(help="Whether experts are equally popular, or as in real models."),
    ] = "uniform",
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Write a packed model of random weights.

    It has the shape and speed of the real one, and says nothing.
    """
    with one_sentence(ctx):
        from godwit.cli.quantize import run_synth

        run_synth(
            config,
            out,
            layers=layers,
            recipe=recipe,
            seed=seed,
            skew=skew == "real",
            restart=restart,
            as_json=as_json,
        )


@app.command()
def verify(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="A packed file.", metavar="FILE.godwit")],
    as_json: AsJson = False,
) -> None:
    """Check every byte of a packed file: its checksums, and the zeros between the parts."""
    with one_sentence(ctx):
        from godwit.cli.quantize import run_verify

        run_verify(file, as_json=as_json)


@app.command()
def train(
    ctx: typer.Context,
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
    with one_sentence(ctx):
        from godwit.cli.train import run

        run(recipe, resume=resume, steps=steps, out=out)


def main() -> None:
    """The console script `godwit`; ends the process with the verb's exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
    try:
        app(prog_name="godwit")
    except OSError as error:  # of the help, which typer prints
        drop_output()
        sys.exit(f"godwit: the output cannot be written ({error.strerror or error})")
