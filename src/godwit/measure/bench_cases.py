"""The cases of a benchmark, and running one of them on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from godwit import _native
from godwit.engine.cache import CacheSize, HybridCache, num_blocks
from godwit.engine.sampling import as_rows
from godwit.errors import MemoryBudgetError, UsageError
from godwit.measure.machine import memory
from godwit.models.batch import ForwardBatch
from godwit.models.caches import Caches, PagedKV
from godwit.models.causal_lm import CausalLM

WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Case:
    """One measurement: the prefill of a prompt of ``tokens``, or ``tokens`` steps of decoding.

    Attributes:
        depth: tokens in the caches of each sequence before the first step.
        batch: sequences decoded together.
    """

    kind: Literal["prefill", "decode"]
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def blocks(self) -> int:
        """Cache blocks in use at the end."""
        return self.batch * num_blocks(self.depth + self.tokens)

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prefill of {self.tokens}"
        return f"decode at depth {self.depth}, batch {self.batch}"


@dataclass(frozen=True)
class BenchPlan:
    """What to measure: every prompt, and every combination of depth and batch.

    Attributes:
        prompts: lengths of prompts.
        new_tokens: steps of decoding in each case.
        depths, batches: see :class:`Case`.
        repeats: rounds.
        chunk: tokens of a prompt read in one step.
        profile: add a round in which each native op is timed.
    """

    prompts: Sequence[int] = (512,)
    new_tokens: int = 128
    depths: Sequence[int] = (0,)
    batches: Sequence[int] = (1,)
    repeats: int = 5
    chunk: int = 4096
    profile: bool = False

    def cases(self, max_position: int) -> list[Case]:
        """The cases, without repetitions.

        Raises:
            UsageError: there is none, or one is longer than the model's context ``max_position``.
        """
        prefill = [Case("prefill", tokens) for tokens in self.prompts if tokens]
        decode = [
            Case("decode", self.new_tokens, depth, batch) for batch in self.batches for depth in self.depths
        ]
        found = list(dict.fromkeys(prefill + (decode if self.new_tokens else [])))
        if not found:
            raise UsageError("there is nothing to measure; give prompts (-p) or new tokens (-n)")
        longest = max(case.depth + case.tokens for case in found)
        if longest > max_position:
            raise UsageError(
                f"a sequence of {longest} tokens is longer than the model's context of {max_position}; "
                "ask for shorter prompts or smaller depths"
            )
        return found


class CaseRunner:
    """Runs cases on a model; all of them share one set of caches.

    Keys, values and states before the first step are random numbers of a plausible size, since the contents
    of a cache do not affect the time. Every step and every sequence gets its own random tokens, so that
    routing is as varied as the model's weights allow.

    Raises:
        MemoryBudgetError: the caches do not fit.
    """

    def __init__(self, model: CausalLM, cases: Sequence[Case], chunk: int) -> None:
        self.model = model
        self.chunk = chunk
        blocks, rows = max(case.blocks for case in cases), max(case.batch for case in cases)
        size = CacheSize.of(model)
        self.cache_bytes = blocks * size.per_block + rows * size.per_row
        available = memory()["available"]
        if available is not None and self.cache_bytes > available:
            raise MemoryBudgetError(
                f"the caches of these cases take {self.cache_bytes / 1e9:.1f} GB, but only "
                f"{available / 1e9:.1f} GB are free; use smaller depths or batches"
            )
        self.cache = HybridCache(model, blocks, rows)
        self.generator = torch.Generator().manual_seed(0)
        fill_blocks(self.cache.caches, self.generator)

    def tokens(self, count: int) -> list[int]:
        """Random ids."""
        ids: list[int] = torch.randint(
            self.model.config.vocab_size, (count,), generator=self.generator
        ).tolist()
        return ids

    def seconds(self, case: Case) -> float:
        """Run one case once: until the first token (prefill) or the last one (decoding)."""
        with torch.inference_mode():
            if case.kind == "prefill":
                return self._prefill(case)
            steps = [self.tokens(case.batch) for _ in range(case.tokens)]
            return self._decode(case, steps, None)

    def routed(self, case: Case) -> list[float]:
        """Experts used by a step of decoding in each sparse layer, averaged over a few steps."""
        steps = min(WARM_UP_STEPS, case.tokens)
        logits: list[Tensor] = []
        with torch.inference_mode():
            self._decode(case, [self.tokens(case.batch) for _ in range(steps)], logits)
        sparse = [layer.ffn for layer in self.model.config.layers if layer.ffn.num_experts]
        used = [
            len(set(found.topk(sparse[i % len(sparse)].top_k).indices.flatten().tolist()))
            for i, found in enumerate(logits)
        ]
        return [fmean(used[i :: len(sparse)]) for i in range(len(sparse))]

    def _prefill(self, case: Case) -> float:
        ids = self.tokens(case.tokens)
        seq = self.cache.add_sequence()
        began = perf_counter()
        for start in range(0, case.tokens, self.chunk):
            piece = ids[start : start + self.chunk]
            self.cache.extend(seq, len(piece))
            batch = self.cache.batch({seq: piece})
            hidden = self.model(batch, self.cache.caches)
        self._choose(hidden, batch)
        seconds = perf_counter() - began
        self.cache.free(seq)
        return seconds

    def _decode(self, case: Case, steps: list[list[int]], router_logits: list[Tensor] | None) -> float:
        seqs = [self.cache.add_sequence() for _ in range(case.batch)]
        for seq in seqs:
            self.cache.extend(seq, case.depth)
        fill_rows(self.cache.caches, case.batch, self.generator)
        began = perf_counter()
        for tokens in steps:
            for seq in seqs:
                self.cache.extend(seq, 1)
            batch = self.cache.batch({seq: [token] for seq, token in zip(seqs, tokens, strict=True)})
            self._choose(self.model(batch, self.cache.caches, router_logits=router_logits), batch)
        seconds = perf_counter() - began
        for seq in seqs:
            self.cache.free(seq)
        return seconds

    def _choose(self, hidden: Tensor, batch: ForwardBatch) -> list[int]:
        logits = self.model.compute_logits(hidden, batch.last_rows)
        chosen: list[int] = as_rows(logits).argmax(-1).tolist()  # as the engine does
        return chosen


def fill_blocks(caches: Caches, generator: torch.Generator) -> None:
    """Random keys and values, of unit variance as after a norm."""
    for cache in caches.layers:
        if isinstance(cache, PagedKV):
            for tensor in (cache.k, cache.v):
                pattern = torch.randn(tensor[:64].shape, generator=generator).to(tensor.dtype)
                for start in range(0, len(tensor), 64):
                    part = tensor[start : start + 64]
                    part.copy_(pattern[: len(part)])


def fill_rows(caches: Caches, num_rows: int, generator: torch.Generator) -> None:
    """Random states and convolution windows."""
    for cache in caches.recurrent():
        cache.state[:num_rows].normal_(0.0, 0.1, generator=generator)
        cache.conv[:num_rows].normal_(generator=generator)


def profile_case(runner: CaseRunner, case: Case) -> dict[str, Any]:
    """Seconds of one run, and the seconds and calls of each native op in it."""
    _native.set_profiling(True)
    try:
        seconds = runner.seconds(case)
        ops = {name: {"seconds": time, "calls": calls} for name, (time, calls) in _native.profile().items()}
    finally:
        _native.set_profiling(False)
    return {"seconds": seconds, "ops": ops}
