"""Options shared by several commands, and the decorator that declares a command."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from godwit.cli.outcome import one_sentence
from godwit.errors import UsageError
from godwit.text.chat_template import Effort

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizeName = Literal["q8", "q4", "bf16"]

Model = Annotated[
    str | None,
    typer.Argument(
        help="A directory, GGUF file, packed file or Hugging Face repository; default: built-in.",
        metavar="MODEL",
    ),
]
System = Annotated[str | None, typer.Option(help="The system message.", metavar="TEXT")]
Tools = Annotated[
    Path | None, typer.Option(help="A JSON file of tools that the model may call.", metavar="FILE")
]
Context = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Maximum tokens of prompt and answer; default: 16384, or what fits in half of the free memory.",
        metavar="N",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Threads to use; default: one per core available."),
]
Dtype = Annotated[
    DtypeName,
    typer.Option(help="auto uses the native kernels if possible; the others use PyTorch."),
]
Quantize = Annotated[
    QuantizeName | None,
    typer.Option(help="Pack the weights to q8, q4 or bf16 while loading; see godwit quantize."),
]
Original = Annotated[
    str,
    typer.Argument(
        help="A directory, GGUF file, Hugging Face repository, or built-in; not packed.", metavar="MODEL"
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe", "--format", help="q4, q8, bf16, or a TOML file of formats.", metavar="NAME|FILE"
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Start over if OUT.partial is from another model or recipe.")
]
Speculate = Annotated[bool, typer.Option(help="Speculative decoding when it is faster; same answers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options from the command line; None: use the model's recommendation."""

    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Randomness; 0 always picks the likeliest token.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from the K likeliest tokens; 0: no limit.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample from the fewest tokens that have this probability."),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Drop tokens less likely than this fraction of the likeliest one."
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(min=0.0, help="Penalize tokens already in the text by this factor; 1: off."),
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtract this from the score of each token already in the answer.")
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option(help="Subtract this from a token's score for each time it is in the answer."),
    ] = None
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens of an answer.")] = None
    stop: Annotated[
        list[str], typer.Option(help="Stop before this text; may be repeated.", metavar="TEXT")
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ThinkingOptions:
    """Thinking options from the command line; None: the chat template's default."""

    reasoning_effort: Annotated[
        Effort | None,
        typer.Option(help="How much to think, if the chat template supports it; none: no thinking."),
    ] = None
    thinking_budget: Annotated[
        int | None,
        typer.Option(min=0, max=1 << 24, help="End thinking after this many tokens.", metavar="N"),
    ] = None
    thinking_budget_message: Annotated[
        str | None,
        typer.Option(
            help="The text that ends thinking at its budget; default: Qwen's.",
            metavar="TEXT",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ServedThinkingOptions(ThinkingOptions):
    """Thinking options of a server, which requests can override."""

    effort_budgets: Annotated[
        bool,
        typer.Option(
            "--effort-budgets", help="Map efforts to thinking budgets if the template has no efforts."
        ),
    ] = False
    no_empty_answers: Annotated[
        bool,
        typer.Option("--no-empty-answers", help="Always end thinking early enough to leave room to answer."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Limits of an engine; None: chosen by model and machine."""

    context: Annotated[
        int | None, typer.Option(min=2, help="Maximum tokens of prompt and answer.", metavar="N")
    ] = None
    max_sequences: Annotated[
        int, typer.Option(min=1, max=4096, help="Maximum answers generated at a time.", metavar="N")
    ] = 64
    memory_gib: Annotated[
        float | None,
        typer.Option(
            "--memory",
            min=0,
            max=1 << 20,
            help="Memory for caches in GiB; default: half of the free memory.",
            metavar="GIB",
        ),
    ] = None
    cache_dir: Annotated[
        Path | None, typer.Option(help="Keep the prefix cache here across restarts.", metavar="DIR")
    ] = None
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Check the engine's internal consistency when it is idle.")
    ] = False
    speculate: Speculate = True


def verb(module: str, function: str = "run") -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Turn a function that declares a command's options into a command.

    The command imports ``godwit.cli.<module>`` and calls its ``function`` with the options as keyword
    arguments, or with the arguments that the declaring function returns, if any. Parameters that are
    dataclasses appear to Typer as one option per field.
    """

    def decorate(declaration: Callable[..., Any]) -> Callable[..., None]:
        signature = inspect.signature(declaration, eval_str=True)
        groups: dict[str, Any] = {
            p.name: p.annotation for p in signature.parameters.values() if is_dataclass(p.annotation)
        }

        @wraps(declaration)
        def command(ctx: typer.Context, **given: Any) -> None:
            with one_sentence(ctx):
                for name, kind in groups.items():
                    given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
                arguments = declaration(**given)
                run = getattr(import_module(f"godwit.cli.{module}"), function)
                if code := run(**(given if arguments is None else arguments)):
                    raise typer.Exit(code)

        parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        for p in signature.parameters.values():
            spread = _options_of(groups[p.name]) if p.name in groups else [p]
            parameters += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in spread]
        command.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=None
        )
        return command

    return decorate


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints, blank = get_type_hints(group, include_extras=True), group()
    return [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=getattr(blank, f.name), annotation=hints[f.name]
        )
        for f in fields(group)
    ]


def parse_logit_bias(pairs: list[str]) -> dict[int, float]:
    """Parse ["42=-3.5", ...] as {token id: value to add to its logit}; -inf bans a token.

    Raises:
        UsageError: a pair has another form.
    """
    bias: dict[int, float] = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        if not (token.isdecimal() and _is_bias(value)):
            raise UsageError(f"--logit-bias takes ID=VALUE, such as 42=-3.5, not {pair!r}")
        bias[int(token)] = float(value)
    return bias


def _is_bias(text: str) -> bool:
    try:
        return float(text) < math.inf
    except ValueError:
        return False
