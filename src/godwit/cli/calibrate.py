"""`godwit calibrate`: measure the importance of matrix columns on a text, for `godwit quantize`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import godwit
from godwit.checkpoint import open_checkpoint
from godwit.checkpoint.publish import refuse_existing
from godwit.cli import common
from godwit.cli.quantize import read_text, working
from godwit.measure.machine import memory
from godwit.models.loader import load_model
from godwit.models.open import resolve_dtype
from godwit.shrink.importance import PRIOR, collect_importance, write_importance


def run(model: str, text: Path, out: Path, *, tokens: int, threads: int | None, as_json: bool) -> None:
    """Run `model` on at most `tokens` tokens of `text`, write importances to `out` and print a report.

    Raises: the errors of loading a model; UsageError if the text is unsuitable; MemoryBudgetError if the
    model does not fit; CheckpointError if `out` exists or cannot be written.
    """
    common.use_threads(threads)
    refuse_existing(out)
    source = open_checkpoint(common.source_of(model))
    ids = read_text(text, source, "godwit calibrate")[:tokens]
    with common.loading(model) as progress:
        original = load_model(
            source, dtype=resolve_dtype("auto", source, memory()["available"]), progress=progress
        )
    started = time.monotonic()
    with working("reading") as progress:
        found = collect_importance(original, ids, progress=progress)
    seconds = time.monotonic() - started
    made_of = {"godwit": godwit.__version__, "model": source.path.name, "text": text.name}
    write_importance(out, found, made_of)
    if as_json:
        report = {
            "path": str(out),
            "matrices": len(found.values),
            "tokens": found.tokens,
            "experts": found.experts,
            "experts_rarely_seen": found.rare,
            "seconds": seconds,
        }
        print(json.dumps(report, indent=2))
        return
    print(f"{out}: {len(found.values):,} matrices, {found.tokens:,} tokens read in {seconds:,.1f} s.")
    if found.rare:
        few = f"{found.rare:,} of {found.experts:,} experts saw fewer than {PRIOR} tokens"
        print(f"{few}; use more text for better results.")
