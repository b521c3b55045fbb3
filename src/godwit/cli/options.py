"""Options shared by several verbs, each with its type, range and help, and the decorator of verbs."""

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
        help="A directory, GGUF file, packed file or Hugging Face repository; without it, built-in.",
        metavar="MODEL",
    ),
]
System = Annotated[str | None, typer.Option(help="The system message.", metavar="TEXT")]
Tools = Annotated[
    Path | None, typer.Option(help="A JSON file with the tools that the model may call.", metavar="FILE")
]
Context = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens of prompt and answer together; without it, 16384 or what fits half of the free memory.",
        metavar="N",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Cores to use; without it, all that this process may use."),
]
Dtype = Annotated[
    DtypeName,
    typer.Option(help="auto takes the native kernels where they fit; others are PyTorch's arithmetic."),
]
Quantize = Annotated[
    QuantizeName | None,
    typer.Option(help="Pack the weights in 8 or 4 bits, or as bf16, while loading; see godwit quantize."),
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
        "--recipe", "--format", help="q4, q8, bf16, or a TOML file with formats.", metavar="NAME|FILE"
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Start over if OUT.partial was made from something else.")
]
Speculate = Annotated[bool, typer.Option(help="Guess tokens ahead where that pays; answers stay the same.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to choose the next token, as asked for on the command line.

    None: not asked for, so what the model recommends holds.
    """

    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Spread of the choice; 0 always takes the likeliest token.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Choose among the K likeliest tokens; 0 is no limit.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Choose among the fewest tokens that reach this probability."),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Drop tokens less likely than this share of the likeliest one."),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(min=0.0, help="Weaken tokens that are already in the text by this factor; 1 is off."),
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Take this from the score of each token already in the answer.")
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Take this from a token's score for each time it is in the answer.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None
    max_tokens: Annotated[int | None, typer.Option(min=1, help="End an answer after this many tokens.")] = (
        None
    )
    stop: Annotated[
        list[str], typer.Option(help="End the answer before this text; may be repeated.", metavar="TEXT")
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ThinkingOptions:
    """How much a model is to think, as asked for on the command line; None leaves it to the template."""

    reasoning_effort: Annotated[
        Effort | None, typer.Option(help="How much to think, for chat templates that know it; none is off.")
    ] = None
    thinking_budget: Annotated[
        int | None,
        typer.Option(min=0, max=1 << 24, help="Close thinking after this many tokens.", metavar="N"),
    ] = None
    thinking_budget_message: Annotated[
        str | None,
        typer.Option(help="The last words of thinking that is cut short; by default Qwen's.", metavar="TEXT"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ServedThinkingOptions(ThinkingOptions):
    """The same for a server, where requests may ask for something else."""

    effort_budgets: Annotated[
        bool,
        typer.Option(
            "--effort-budgets", help="Where the template has no efforts, turn them into thinking budgets."
        ),
    ] = False
    no_empty_answers: Annotated[
        bool,
        typer.Option("--no-empty-answers", help="Close thinking in time to answer, and never end within it."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine may use; None: what suits the model and the machine."""

    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together.", metavar="N")
    ] = None
    max_sequences: Annotated[
        int, typer.Option(min=1, max=4096, help="Answers that run at a time.", metavar="N")
    ] = 64
    memory_gib: Annotated[
        float | None,
        typer.Option(
            "--memory",
            min=0,
            max=1 << 20,
            help="For caches, in GiB; without it, half of what is free.",
            metavar="GIB",
        ),
    ] = None
    cache_dir: Annotated[
        Path | None, typer.Option(help="Keep what was read here across restarts.", metavar="DIR")
    ] = None
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Check the engine's books whenever there is nothing to do.")
    ] = False
    speculate: Annotated[
        bool, typer.Option(help="Draft tokens ahead where that pays; answers stay the same.")
    ] = True


def verb(module: str, function: str = "run") -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Turn a function that declares the options of a verb into a command that runs it.

    The options go to ``function`` of ``godwit.cli.<module>``, which is imported only then, under their own
    names; or what the declaring function makes of them, where it returns the arguments itself. Typer is shown
    one option for each field of the arguments that are dataclasses, in place of these.
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
    """Read ["42=-3.5", ...] as {token id: what is added to its logit}; -inf bans a token.

    Raises UsageError where a pair is not that.
    """
    bias: dict[int, float] = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        if not (token.isdecimal() and _is_bias(value)):
            raise UsageError(f"--logit-bias takes ID=VALUE, such as 42=-3.5, and not {pair!r}.")
        bias[int(token)] = float(value)
    return bias


def _is_bias(text: str) -> bool:
    try:
        return float(text) < math.inf
    except ValueError:
        return False
