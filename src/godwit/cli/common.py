"""Shared by the commands: finding a model, its settings, and an engine to run it."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from godwit.cli import doctor
from godwit.cli.options import DtypeName, QuantizeName, SamplingOptions, ThinkingOptions
from godwit.errors import CheckpointError, MemoryBudgetError, UsageError
from godwit.measure.machine import memory

if TYPE_CHECKING:
    from godwit.checkpoint import Checkpoint
    from godwit.cli.responder import Responder
    from godwit.config import ModelConfig
    from godwit.engine import CacheSize, SamplingParams, ThinkingRules
    from godwit.models.causal_lm import CausalLM
    from godwit.text.tokenizer import Tokenizer

BUILT_IN = "built-in"
PERSONA = "You are Godwit, a helpful assistant."
DEFAULT_CONTEXT = 16384
MIN_CONTEXT = 512
MAX_TOOLS_BYTES = 16 << 20
# The default if neither the user nor the model specifies how to sample.
FALLBACK_SAMPLING = {"temperature": 0.7, "top_p": 0.9}
_FROM_FILE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
              "frequency_penalty")  # fmt: skip


@dataclass(frozen=True)
class OpenedModel:
    """A model whose files are open but whose weights are not loaded."""

    name: str
    source: Checkpoint
    tokenizer: Tokenizer

    def system(self, asked: str | None) -> str | None:
        """The system message: the given one ("" is none), else the built-in model's, with the date."""
        if asked is not None:
            return asked or None
        if self.name != BUILT_IN:
            return None
        return f"{PERSONA} Today is {datetime.date.today().isoformat()}."

    def check_context(self, asked: int | None, num_prompt: int = 0) -> None:
        """Reject an impossible context or prompt before any weights are loaded.

        Args:
            asked: tokens of context; None: the default.
            num_prompt: tokens of the prompt.

        Raises:
            UsageError: more than the model supports, or a prompt that leaves no room for an answer.
            MemoryBudgetError: the caches alone do not fit the free memory.
        """
        most = self.source.config.max_position
        if asked is not None and asked > most:
            raise UsageError(f"--context {asked}: this model supports at most {most} tokens; use fewer")
        context = min(most, DEFAULT_CONTEXT) if asked is None else asked
        if num_prompt >= context:
            more = "" if context == most else f" or raise --context (at most {most})"
            raise UsageError(
                f"the prompt has {num_prompt} tokens and the context {context}, which leaves no room for an "
                f"answer; shorten the prompt{more}"
            )
        available = memory()["available"]
        if asked is None or available is None:
            return
        needed = cache_size(self.source.config).total(asked)
        if needed > available:
            raise MemoryBudgetError(
                f"--context {asked} takes {needed / 2**30:.1f} GiB for keys, values and states, but "
                f"{available / 2**30:.1f} GiB of memory are free; use fewer tokens"
            )

    def start(
        self,
        *,
        context: int | None = None,
        threads: int | None,
        dtype: DtypeName,
        quantize: QuantizeName | None = None,
        speculate: bool = True,
        reuse: bool = True,
    ) -> Responder:
        """Load the weights and start an engine, with progress on stderr. Close it when done.

        Args:
            context: tokens of prompt and answer together; None: :data:`DEFAULT_CONTEXT`, or fewer if the
                model supports fewer or half of the free memory holds fewer.
            threads: as for :func:`use_threads`.
            dtype, quantize: as for :func:`load_weights`.
            speculate, reuse: as for :class:`~godwit.cli.responder.Responder`.

        Raises: the errors of loading; MemoryBudgetError if the context does not fit.
        """
        from godwit.cli.responder import Responder

        num_threads = use_threads(threads)
        with loading(self.name) as progress:
            model = load_weights(self.source, dtype, quantize, progress)
        available = memory()["available"]
        if context is None:
            context = resolve_context(model, None if available is None else available // 2)
        responder = Responder(
            model, self.tokenizer, context, max_bytes=available, speculate=speculate, reuse=reuse
        )
        most = model.config.max_position
        limit = "" if context == most else f" of {most} (--context)"
        print(
            f"{self.name}: {described(model)}, context {context}{limit}, "
            f"{num_threads} thread{'s' * (num_threads > 1)}",
            file=sys.stderr,
        )
        return responder


def open_model(model: str | None) -> OpenedModel:
    """Find a model by path, repository or name, or the built-in one.

    Raises:
        CheckpointError: there is no such model, or this installation lacks the built-in one.
    """
    source = source_of(model)
    from godwit.text.tokenizer import Tokenizer

    trusted = isinstance(source, Path)  # the built-in one
    with ThreadPoolExecutor(1) as pool:
        # A child process checks it while this one loads PyTorch.
        known = os.path.isfile(os.path.join(source, "tokenizer.json"))
        early = pool.submit(Tokenizer.from_dir, source, trusted=trusted) if known else None
        from godwit.models.open import open_source

        checkpoint = open_source(source)
        here = early is not None and checkpoint.path.is_dir()
        tokenizer = early.result() if early and here else tokenizer_of(checkpoint)
    return OpenedModel(model or BUILT_IN, checkpoint, tokenizer)


def source_of(model: str | None) -> str | Path:
    """The path or repository that MODEL means; without one, the built-in model.

    Raises:
        CheckpointError: this installation lacks the built-in model.
    """
    if model is None or (model == BUILT_IN and not os.path.lexists(model)):
        return built_in()
    return model


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer in a model's directory, or inside a model of one file.

    Raises:
        CheckpointError: there is none, as in files made for benchmarks.
    """
    from godwit.text.tokenizer import Tokenizer

    if checkpoint.path.is_dir():
        return Tokenizer.from_dir(checkpoint.path)
    files = checkpoint.files()
    if "tokenizer.json" not in files:
        raise CheckpointError(
            f"{checkpoint.path}: has no tokenizer, so it can only be used with godwit bench and inspect"
        )
    return Tokenizer.from_files(files, str(checkpoint.path))


def load_weights(
    source: Checkpoint,
    dtype: DtypeName = "auto",
    quantize: QuantizeName | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """:func:`godwit.models.open.load_weights` with notices on stderr and this machine's free memory."""
    from godwit.models import open as models

    return models.load_weights(
        source,
        dtype,
        quantize,
        progress=progress,
        notice=lambda line: print(line, file=sys.stderr),
        available=memory()["available"],
    )


def described(model: CausalLM) -> str:
    """A short description of a loaded model: size, weight formats and kernels."""
    from godwit.models.open import described

    return described(model)


def built_in() -> Path:
    """The directory of the built-in model.

    Raises:
        CheckpointError: this installation lacks it.
    """
    report = doctor.default_model_report()
    if not report["present"]:
        raise CheckpointError(
            f"the built-in model is not in this installation ({report['path']} lacks "
            f"{', '.join(report['absent_files'])}); install a release of godwit-llm, or give a model: a "
            "directory, or a Hugging Face repository as organisation/name"
        )
    return Path(report["path"])


@contextmanager
def loading(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar while tensors are loaded, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("loading {task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def use_threads(threads: int | None) -> int:
    """Set the number of threads, by default one per usable core, and return it."""
    import torch

    native = doctor.native_report()
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = native["cores"] if native else None
    if threads is not None:
        torch.set_num_threads(threads)
    if native is not None:
        from godwit import _native

        _native.set_num_threads(torch.get_num_threads())
    return torch.get_num_threads()


def resolve_context(model: CausalLM, budget: int | None) -> int:
    """The default context in tokens: the model's, limited by :data:`DEFAULT_CONTEXT` and ``budget`` bytes."""
    from godwit.engine import CacheSize

    limit = min(model.config.max_position, DEFAULT_CONTEXT)
    if budget is None:
        return limit
    return max(CacheSize.of(model).tokens_within(budget, limit), min(limit, MIN_CONTEXT))


def cache_size(config: ModelConfig) -> CacheSize:
    """Sizes of the caches of a model of this configuration."""
    import torch

    from godwit.engine.cache import CacheSize
    from godwit.models.causal_lm import CausalLM

    with torch.device("meta"):
        return CacheSize.of(CausalLM(config))


def sampling_params(
    options: SamplingOptions, defaults: Mapping[str, Any], logit_bias: Mapping[int, float] | None = None
) -> SamplingParams:
    """The user's options, then ``defaults`` from generation_config.json, then ours.

    Raises:
        UsageError: an option is invalid.
        CheckpointError: a value in generation_config.json is invalid.
    """
    from godwit.engine import SamplingParams

    base = recommended(defaults)
    try:
        SamplingParams(**base)
    except UsageError as error:
        raise CheckpointError(f"the model's generation_config.json: {error}; correct or remove it") from None
    asked = {name: value for name, value in vars(options).items() if value is not None}
    return SamplingParams(**{**base, **asked, "logit_bias": logit_bias or {}})


def recommended(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a generation_config.json as arguments of SamplingParams."""
    given: dict[str, Any] = {name: defaults[name] for name in _FROM_FILE if name in defaults}
    if isinstance(top_k := given.get("top_k"), float) and top_k.is_integer():
        given["top_k"] = int(top_k)
    if defaults.get("do_sample") is False:
        given["temperature"] = 0.0
    elif not given.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        given |= FALLBACK_SAMPLING
    if "max_new_tokens" in defaults:
        given["max_tokens"] = defaults["max_new_tokens"]
    return given


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Tools from a JSON file: a list of ``{"type": "function", "function": {...}}`` or of the inner objects.

    Raises:
        UsageError: the file cannot be read or has other content.
    """
    try:
        if path.stat().st_size > MAX_TOOLS_BYTES:
            raise UsageError(f"{path}: larger than {MAX_TOOLS_BYTES >> 20} MiB, so it is not a list of tools")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if isinstance(raw, dict) and isinstance(raw.get("tools"), list):
        raw = raw["tools"]
    if not isinstance(raw, list):
        raise UsageError(f'{path}: must be a list of tools, such as [{{"name": ..., "parameters": ...}}]')
    return [_tool(entry, f"{path}: tool {index}") for index, entry in enumerate(raw, 1)]


def _tool(entry: Any, where: str) -> dict[str, Any]:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UsageError(f"{where} has no name; each tool is an object with name, description and parameters")
    return entry if "function" in entry else {"type": "function", "function": function}


def thinking_variables(tokenizer: Tokenizer, options: ThinkingOptions) -> dict[str, Any]:
    """The template variables that control thinking."""
    template = tokenizer.chat_template
    return {} if template is None else template.thinking_variables(None, options.reasoning_effort)


def thinking_rules(options: ThinkingOptions, *, opened: bool) -> ThinkingRules:
    """The limits of thinking in an answer; ``opened``: the prompt already starts it.

    Raises:
        UsageError: the message cannot be used.
    """
    from godwit.engine import ThinkingRules
    from godwit.engine.thinking import DEFAULT_MESSAGE

    message = options.thinking_budget_message
    return ThinkingRules(
        opened=opened,
        budget=options.thinking_budget,
        message=DEFAULT_MESSAGE if message is None else message,
    )
