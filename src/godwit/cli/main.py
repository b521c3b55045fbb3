"""The `godwit` program, assembled from its commands."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import godwit
from godwit.cli.outcome import drop_output
from godwit.cli.verbs.bench import bench
from godwit.cli.verbs.calibrate import calibrate
from godwit.cli.verbs.chat import chat
from godwit.cli.verbs.doctor import doctor
from godwit.cli.verbs.generate import generate
from godwit.cli.verbs.inspect import inspect
from godwit.cli.verbs.quantize import quantize
from godwit.cli.verbs.serve import serve
from godwit.cli.verbs.synth import synth
from godwit.cli.verbs.train import train
from godwit.cli.verbs.verify import verify

app = typer.Typer(
    name="godwit",
    no_args_is_help=True,
    add_completion=False,
    # Rich help and tracebacks would take more start-up time than everything else.
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
    "Face repository, or the built-in model. Exit codes: docs/commands.md."
)
def _shared(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run, serve, shrink, measure and train sparse hybrid language models on the machine you have."""
    ctx.obj = debug


# In the order of the help.
for command in (
    *(chat, generate, serve, inspect, doctor, bench),
    *(quantize, calibrate, synth, verify, train),
):
    app.command()(command)


def main() -> None:
    """The console script `godwit`; exits with the command's exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (stays open until exit)
    try:
        app(prog_name="godwit")
    except OSError as error:  # while typer prints the help
        drop_output()
        sys.exit(f"godwit: cannot write the output ({error.strerror or error})")
