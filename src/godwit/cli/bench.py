"""`godwit bench`: how fast a model runs, absolutely and relative to the machine's limits."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from godwit.cli import common
from godwit.cli.options import DtypeName, QuantizeName
from godwit.cli.tables import Tables, size_text
from godwit.errors import UsageError
from godwit.measure.report import result_row, write_json

if TYPE_CHECKING:
    from godwit.checkpoint import Checkpoint
    from godwit.models.causal_lm import CausalLM

USUAL_PROMPTS = (512, 4096)
USUAL_DEPTHS = (0, 4096, 32768)
MAX_COUNT = 1 << 24


def run(
    model: str | None,
    *,
    prompts: str | None,
    new_tokens: int,
    depths: str | None,
    batches: str,
    repeats: int,
    chunk: int,
    threads: int | None,
    dtype: DtypeName,
    quantize: QuantizeName | None,
    profile: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Measure, and print tables or, with `as_json`, a JSON object to stdout; also write it to `output`.

    Raises:
        UsageError: invalid numbers; also the errors of opening a model.
        KernelParityError: the kernels' results are wrong.
        KeyboardInterrupt: after Ctrl-C, once the finished rounds have been reported.
    """
    asked_prompts = None if prompts is None else counts(prompts, "-p", low=0)
    asked_depths = None if depths is None else counts(depths, "-d", low=0)
    asked_batches = counts(batches, "-b", low=1)
    if output is not None and output.is_dir():
        raise UsageError(f"--output {output}: a directory; give a file")
    from godwit.measure.bench import bench
    from godwit.measure.bench_cases import BenchPlan

    common.use_threads(threads)
    source = opened(model)
    limit = source.config.max_position
    plan = BenchPlan(
        usual(USUAL_PROMPTS, limit) if asked_prompts is None else asked_prompts,
        new_tokens,
        usual(USUAL_DEPTHS, limit - new_tokens) if asked_depths is None else asked_depths,
        asked_batches,
        repeats,
        chunk,
        profile,
    )
    plan.cases(limit)  # raises before any weights are loaded
    name = model or common.BUILT_IN
    with common.loading(name) as progress:
        loaded = common.load_weights(source, dtype, quantize, progress)
    row = result_row(
        shlex.join(["godwit", *sys.argv[1:]]),
        model=describe(loaded, name),
        **bench(loaded, plan, lambda text: print(text, file=sys.stderr)),
    )
    if as_json:
        print(json.dumps(row, indent=2))
    else:
        show(row)
    if output is not None:
        save(output, row)
    if row["interrupted"]:
        raise KeyboardInterrupt(f"interrupted; the results are from {rounds_text(row)}")


def save(path: Path, row: dict[str, Any]) -> None:
    """Write the JSON to a file.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        write_json(path, row)
    except OSError as error:
        raise UsageError(f"--output {path}: could not be written ({error.strerror or error})") from None


def counts(text: str, option: str, low: int) -> tuple[int, ...]:
    """Parse numbers separated by commas.

    Raises:
        UsageError: the text has another form.
    """
    words = text.split(",")
    if not all(word.isdecimal() and low <= int(word) <= MAX_COUNT for word in words):
        raise UsageError(
            f"{option} takes whole numbers of at least {low}, separated by commas, such as 512,4096, "
            f"not {text!r:.60}"
        )
    return tuple(int(word) for word in words)


def usual(numbers: Sequence[int], limit: int) -> tuple[int, ...]:
    """The numbers that fit in a model's context, or the context itself if none does."""
    return tuple(number for number in numbers if number <= limit) or (max(0, limit),)


def opened(model: str | None) -> Checkpoint:
    """Open the model's files without loading weights; benchmarks need no tokenizer."""
    from godwit.models.open import open_source

    return open_source(common.source_of(model))


def describe(model: CausalLM, name: str) -> dict[str, Any]:
    """The measured model."""
    config = model.config
    return {
        "name": name,
        "model_type": config.model_type,
        "layers": len(config.layers),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def show(row: dict[str, Any]) -> None:
    """Print the report as tables."""
    console = Tables()
    console.print(_head(row), soft_wrap=True)
    for table in (_prefill(row["prefill"]), _decode(row["decode"]), *map(_profile, row["profile"])):
        if table.row_count:
            console.print(table)
    console.print(_foot(row), soft_wrap=True)
    for warning in row["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _head(row: dict[str, Any]) -> str:
    model, ceilings = row["model"], row["ceilings"]
    return (
        f"{model['name']}: {model['layers']} layers of {model['model_type']}, {', '.join(row['formats'])}; "
        f"{row['threads']} thread{'s' * (row['threads'] > 1)}, {row['instruction_set']}\n"
        f"{row['machine']['cpu']} can now read {_range(ceilings['read_bandwidth'], 1)} GB/s and compute "
        f"{_range(ceilings['int8'], 0)} GOP/s in int8, {_range(ceilings['bfloat16'], 0)} GFLOP/s in "
        f"bfloat16, {_range(ceilings['float32'], 0)} in float32"
    )


def _foot(row: dict[str, Any]) -> str:
    use = row["memory"]
    sizes = [("peak", use["peak"]), ("proportional", use["proportional"]), ("caches", use["caches"])]
    text = ", ".join(f"{size_text(size)} {name}" for name, size in sizes if size is not None)
    checks = ", ".join(f"{c['format']} {c['error']:.1e} of {c['limit']:.1e}" for c in row["parity"])
    return (
        f"memory: {text}\n"
        f"medians of {rounds_text(row)}; {row['context']}; experts: used per step and layer\n"
        f"kernel error against the reference: {checks or 'none, the reference itself was measured'}"
    )


def rounds_text(row: dict[str, Any]) -> str:
    """The number of rounds measured."""
    many = "s" * (row["repeats"] != 1)
    return f"{row['repeats']} round{many}{' finished before Ctrl-C' * row['interrupted']}"


def _range(value: dict[str, float], digits: int) -> str:
    numbers = [f"{value[name]:,.{digits}f}" for name in ("median", "min", "max")]
    return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _prefill(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("prompt", "tokens/s", "min-max", "first token", "MFU")
    for row in rows:
        first = f"{row['seconds_to_first_token']['median']:.3f} s"
        table.add_row(f"{row['tokens']:,}", *_speed(row), first, f"{row['mfu']:.1%}")
    return table


def _decode(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("depth", "batch", "tokens/s", "min-max", "bytes/token", "experts", "MBU", "MFU")
    for row in rows:
        experts = row["experts_per_layer"]
        table.add_row(
            f"{row['depth']:,}",
            str(row["batch"]),
            *_speed(row),
            size_text(round(row["bytes_per_token"])),
            "" if experts is None else f"{experts:.1f}",
            f"{row['mbu']:.0%}",
            f"{row['mfu']:.1%}",
        )
    return table


def _speed(row: dict[str, Any]) -> tuple[str, str]:
    median, low, high = (_rate(row["tokens_per_second"][name]) for name in ("median", "min", "max"))
    return median, f"{low}-{high}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _profile(found: dict[str, Any]) -> Table:
    table = _table("share", "seconds", "calls")
    table.title, table.title_justify = found["case"], "left"
    table.add_column("op")
    ops = sorted(found["ops"].items(), key=lambda item: -item[1]["seconds"])
    rows = [(name, op["seconds"], str(op["calls"])) for name, op in ops]
    rows.append(("between the ops", found["seconds"] - sum(seconds for _, seconds, _ in rows), ""))
    for name, seconds, calls in rows:
        table.add_row(f"{seconds / found['seconds']:.1%}", f"{seconds:.4f}", calls, name)
    return table
