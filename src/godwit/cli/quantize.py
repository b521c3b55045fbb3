"""`godwit quantize`, `synth` and `verify`: write and check packed files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from godwit.checkpoint import Checkpoint, open_checkpoint, read_raw_config
from godwit.checkpoint.formats import is_gguf
from godwit.checkpoint.gguf import GgufCheckpoint
from godwit.checkpoint.packed import PackedFile
from godwit.checkpoint.protocol import num_parameters
from godwit.cli import common
from godwit.cli.packed import bytes_of_parts
from godwit.cli.stopping import tidy_stop
from godwit.cli.tables import Tables, size_text
from godwit.config import ModelConfig
from godwit.errors import MemoryBudgetError, UsageError
from godwit.measure.machine import memory
from godwit.models.inventory import PARTS
from godwit.models.packing import stored_recipe
from godwit.models.recipe import QuantRecipe
from godwit.shrink.importance import read_importance
from godwit.shrink.quantize import PackingReport, quantize_checkpoint
from godwit.shrink.synth import synthesize

if TYPE_CHECKING:
    from godwit.measure.quality import Quality

DEFAULT = "q4"
MAX_TEXT_BYTES = 64 << 20
_STOPPED = "{out} is not finished; run the same command again to continue from {out}.partial"


def run_quantize(
    model: str,
    out: Path,
    *,
    recipe: str | None,
    importance: Path | None,
    evaluate: Path | None,
    threads: int | None,
    restart: bool,
    as_json: bool,
) -> None:
    """Pack `model` into the file `out`, compare them on the text `evaluate`, and print a report.

    Raises: the errors of loading and packing; MemoryBudgetError if the original does not fit for comparison.
    """
    common.use_threads(threads)
    asked = None if recipe is None else QuantRecipe.find(recipe)
    checkpoint = open_checkpoint(common.source_of(model))
    as_stored = asked is None and isinstance(checkpoint, GgufCheckpoint)
    rules = asked or (stored_recipe(checkpoint) if as_stored else QuantRecipe.find(DEFAULT))
    _check_tokenizer(checkpoint)
    ids = None if evaluate is None else read_text(evaluate, checkpoint, "--evaluate")
    values = None if importance is None else read_importance(importance)
    with tidy_stop(_STOPPED.format(out=out)), working("packing") as progress:
        report = quantize_checkpoint(
            checkpoint, out, rules, importance=values, progress=progress, restart=restart
        )
    for line in report.notices if as_stored else ():
        print(line, file=sys.stderr)
    quality = None if ids is None else _compare(checkpoint, out, ids)
    _print(report, checkpoint.config, quality, as_json=as_json)


def run_synth(
    config: str,
    out: Path,
    *,
    layers: int | None,
    recipe: str,
    seed: int,
    skew: Literal["uniform", "real"],
    restart: bool,
    as_json: bool,
) -> None:
    """Write a random model with the architecture of `config` to the file `out`, and print a report."""
    raw = read_raw_config(common.source_of(config))
    with tidy_stop(_STOPPED.format(out=out)), working("drawing") as progress:
        report = synthesize(
            raw,
            out,
            num_layers=layers,
            format=recipe,
            seed=seed,
            skew=skew == "real",
            progress=progress,
            restart=restart,
        )
    _print(report, PackedFile.open(out).config, None, as_json=as_json)


def run_verify(file: Path, *, as_json: bool = False) -> None:
    """Check every byte of a packed file and report on stdout.

    Raises:
        CheckpointError: the file is damaged.
        UsageError: it is a GGUF file, which has no checksums.
    """
    if is_gguf(file):
        raise UsageError(
            f"{file}: a GGUF file holds no checksums to verify; compare its SHA-256 with the one given where "
            "it came from"
        )
    packed = PackedFile.open(file)
    with working("reading") as progress:
        packed.verify(progress)
    if as_json:
        content = {"path": str(file), "whole": True, "tensors": len(packed.blobs), "bytes": packed.nbytes}
        print(json.dumps(content, indent=2))
    else:
        print(f"{file}: whole; {len(packed.blobs):,} tensors, {size_text(packed.nbytes)}")


@contextmanager
def working(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the remaining time, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """Check the tokenizer before the slow part; warn if there is none."""
    if "tokenizer.json" in checkpoint.files():
        common.tokenizer_of(checkpoint)
    else:
        without = "has no tokenizer, so the packed model can only be used with godwit bench and inspect"
        print(f"warning: {checkpoint.path} {without}", file=sys.stderr)


def read_text(path: Path, checkpoint: Checkpoint, what: str) -> list[int]:
    """The tokens of a text, for running the original model on it.

    Raises:
        UsageError: the text cannot be read, or is too short or too long.
        MemoryBudgetError: the original, which `what` needs, does not fit in memory.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UsageError(
                f"{path}: larger than {MAX_TEXT_BYTES >> 20} MiB; a few thousand words are enough"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); give another file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason}); give another file") from None
    ids = common.tokenizer_of(checkpoint).encode(text)
    if len(ids) < 2:
        raise UsageError(f"{path}: has {len(ids)} tokens; at least two are needed")
    needed = 2 * num_parameters(checkpoint)
    available = memory()["available"]
    if available is not None and needed > available:
        raise MemoryBudgetError(
            f"{what} loads the original, which takes at least {size_text(needed)}, but "
            f"{size_text(available)} are available; use a machine with more memory, or omit it"
        )
    return ids


def _compare(checkpoint: Checkpoint, out: Path, ids: list[int]) -> Quality:
    from godwit.measure.quality import compare
    from godwit.models.loader import load_model
    from godwit.models.native import load_packed
    from godwit.models.open import resolve_dtype

    original = load_model(checkpoint, dtype=resolve_dtype("auto", checkpoint, memory()["available"]))
    with working("comparing") as progress:
        return compare(original, load_packed(out), ids, progress=progress)


def _print(report: PackingReport, config: ModelConfig, quality: Quality | None, *, as_json: bool) -> None:
    weights = sum(blob.num_weights for blob in report.blobs.values())
    content: dict[str, Any] = {
        "path": str(report.path),
        "bytes": report.nbytes,
        "weights": weights,
        "bits": 8 * report.nbytes / weights,
        "seconds": report.seconds,
        "resumed_tensors": report.resumed,
        "parts": bytes_of_parts(report.blobs, config),
        "quality": quality and asdict(quality),
    }
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        _show(content)


def _show(content: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE, show_footer=True)
    table.add_column("part", "total")
    table.add_column("weights", f"{content['weights']:,}", justify="right", no_wrap=True)
    table.add_column("size", size_text(content["bytes"]), justify="right", no_wrap=True)
    table.add_column("bits per weight", f"{content['bits']:.2f}", justify="right", no_wrap=True)
    for name, part in content["parts"].items():
        row = (f"{part['weights']:,}", size_text(part["bytes"]), f"{part['bits']:.2f}")
        table.add_row(PARTS[name], *row)
    console = Tables()
    console.print(table)
    resumed = content["resumed_tensors"]
    went_on = f"; {resumed:,} tensors were already written" if resumed else ""
    console.print(
        f"{content['path']}: written in {content['seconds']:,.1f} s{went_on}.", soft_wrap=True, markup=False
    )
    quality = content["quality"]
    if quality:
        console.print(
            f"Against the original over {quality['tokens']:,} tokens: perplexity {quality['perplexity']:.3f} "
            f"-> {quality['perplexity_changed']:.3f}, mean KL divergence {quality['kl']:.4f} nats (99 % "
            f"below {quality['kl_99']:.3f}), same likeliest token {100 * quality['same_top']:.1f} %.",
            soft_wrap=True,
        )
