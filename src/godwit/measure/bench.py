"""How fast a model runs, beside what this machine could do at the same moment.

The cases of a run take turns, round after round, and the machine's own ceilings are measured between rounds,
so that whatever slows the machine down slows all of them down. Each figure is a median with the smallest and
largest beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from time import perf_counter, sleep
from typing import Any, Literal

import torch
from torch import Tensor

from godwit import _native
from godwit.config import MoeSpec
from godwit.engine.cache import CacheSize, HybridCache, num_blocks
from godwit.engine.sampling import as_rows
from godwit.errors import MemoryBudgetError, UsageError
from godwit.measure.ceilings import (
    FIGURES,
    Ceilings,
    CpuTimes,
    MemoryUse,
    Noise,
    measure_ceilings,
    reset_peak,
)
from godwit.measure.costs import ARITHMETICS, Costs, costs_of, distinct_experts, formats_of, trunk_caches
from godwit.measure.machine import memory
from godwit.measure.parity import KernelCheck, check_kernels, require_parity
from godwit.models.batch import ForwardBatch
from godwit.models.caches import Caches, PagedKV
from godwit.models.causal_lm import CausalLM

WARM_UP_STEPS = 4
PAUSE = 0.05  # seconds for the threads to fall asleep after the ceilings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One thing to measure: reading a prompt of ``tokens``, or ``tokens`` steps of decoding.

    Attributes:
        depth: tokens in the caches of each sequence before the first step.
        batch: sequences that are decoded together.
    """

    kind: Literal["prefill", "decode"]
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of the caches in use at the end."""
        return self.batch * num_blocks(self.depth + self.tokens)

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prefill of {self.tokens}"
        return f"decode at depth {self.depth}, batch {self.batch}"


@dataclass(frozen=True)
class BenchPlan:
    """What to measure. The depths and the batches are combined in all ways.

    Attributes:
        prompts: numbers of tokens to read.
        new_tokens: steps of decoding in each case.
        depths, batches: see :class:`Case`.
        repeats: rounds.
        chunk: tokens of a prompt read in one step.
        profile: add a round in which the native ops are timed one by one.
    """

    prompts: Sequence[int] = (512,)
    new_tokens: int = 128
    depths: Sequence[int] = (0,)
    batches: Sequence[int] = (1,)
    repeats: int = 5
    chunk: int = 4096
    profile: bool = False

    def cases(self, max_position: int) -> list[Case]:
        """The cases, each with a place in the model's context.

        Raises:
            UsageError: there is none, or one is longer than the context.
        """
        prefill = [Case("prefill", tokens) for tokens in self.prompts if tokens]
        decode = [
            Case("decode", self.new_tokens, depth, batch) for batch in self.batches for depth in self.depths
        ]
        found = list(dict.fromkeys(prefill + (decode if self.new_tokens else [])))
        if not found:
            raise UsageError("there is nothing to measure: ask for a prompt (-p) or for new tokens (-n)")
        longest = max(case.depth + case.tokens for case in found)
        if longest > max_position:
            raise UsageError(
                f"{longest} tokens are asked for in one sequence, but the model is made for {max_position}"
            )
        return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


class Runner:
    """Runs cases on a model; all of them share one set of caches.

    Keys, values and states before the first step are random numbers of a plausible size: what is in a cache
    changes the answer and not the time. Every step is fed other random tokens, each sequence its own, so that
    the routing is as varied as the model's weights make it.

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
                f"{available / 1e9:.1f} GB are free; ask for smaller depths or batches"
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
        """Run one case once: until the first token is known, or until the last one is."""
        with torch.inference_mode():
            if case.kind == "prefill":
                return self._prefill(case)
            steps = [self.tokens(case.batch) for _ in range(case.tokens)]
            return self._decode(case, steps, None)

    def routed(self, case: Case) -> list[float]:
        """Experts used by a step of decoding in each sparse layer, the mean of a few steps."""
        steps = min(WARM_UP_STEPS, case.tokens)
        logits: list[Tensor] = []
        with torch.inference_mode():
            self._decode(case, [self.tokens(case.batch) for _ in range(steps)], logits)
        sparse = [layer.ffn for layer in self.model.config.layers if isinstance(layer.ffn, MoeSpec)]
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
    """Random keys and values, of the size that norms give them."""
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


@dataclass(frozen=True)
class Measurements:
    """The raw results of a run: seconds of each case, the ceilings between rounds, and the circumstances.

    Attributes:
        interrupted: Ctrl-C ended it early; the seconds are of the rounds that were finished.
    """

    cases: dict[Case, list[float]]
    routed: dict[Case, list[float]]
    ceilings: list[Ceilings]
    noise: Noise
    memory: MemoryUse
    cache_bytes: int
    profile: dict[Case, dict[str, Any]]
    interrupted: bool

    @property
    def rounds(self) -> int:
        return len(next(iter(self.cases.values())))


def measure(model: CausalLM, plan: BenchPlan, say: Say) -> Measurements:
    """Run all cases of ``plan``, round after round. Ctrl-C ends it, and what is finished by then counts.

    Raises:
        KeyboardInterrupt: no round was finished by then.
    """
    cases = plan.cases(model.config.max_position)
    warm_up = Case("prefill", min(plan.chunk, model.config.max_position))  # touches nearly every expert
    runner = Runner(model, [warm_up, *cases], plan.chunk)
    say(f"warming up: {warm_up}")
    runner.seconds(warm_up)
    say("counting the experts in use")
    routed = {case: runner.routed(case) for case in cases if case.kind == "decode"}
    peaks = [MemoryUse.now().peak]
    before = CpuTimes.now()
    ceilings = [_ceilings(say)]
    rounds: list[list[float]] = []
    profile: dict[Case, dict[str, Any]] = {}
    interrupted = False
    try:
        for number in range(1, plan.repeats + 1):
            rounds.append(_round(runner, cases, f"round {number} of {plan.repeats}", say))
            peaks.append(MemoryUse.now().peak)
            ceilings.append(_ceilings(say))
        for case in cases if plan.profile else ():
            say(f"profiling: {case}")
            profile[case] = profile_case(runner, case)
    except KeyboardInterrupt:
        if not rounds:
            raise
        interrupted = True
    seconds = {case: list(times) for case, times in zip(cases, zip(*rounds, strict=True), strict=True)}
    noise = Noise.between(before, CpuTimes.now(), [c.read_bandwidth for c in ceilings])
    now = MemoryUse.now()
    known = [peak for peak in peaks if peak is not None]
    use = MemoryUse(max(known, default=None), now.resident, now.proportional)
    return Measurements(seconds, routed, ceilings, noise, use, runner.cache_bytes, profile, interrupted)


def _round(runner: Runner, cases: Sequence[Case], name: str, say: Say) -> list[float]:
    """Seconds of each case."""
    seconds = []
    for case in cases:
        say(f"{name}: {case}")
        seconds.append(runner.seconds(case))
    return seconds


def _ceilings(say: Say) -> Ceilings:
    """Measured, and the memory for it forgotten."""
    say("measuring what the machine can do now")
    found = measure_ceilings()
    reset_peak()
    sleep(PAUSE)
    return found


def profile_case(runner: Runner, case: Case) -> dict[str, Any]:
    """Seconds of one run, and of them those in each native op."""
    _native.set_profiling(True)
    try:
        seconds = runner.seconds(case)
        ops = {name: {"seconds": time, "calls": calls} for name, (time, calls) in _native.profile().items()}
    finally:
        _native.set_profiling(False)
    return {"seconds": seconds, "ops": ops}


def bench(model: CausalLM, plan: BenchPlan, say: Say = lambda text: None) -> dict[str, Any]:
    """Measure, and refuse where the kernels that would be measured are wrong.

    Raises:
        KernelParityError: they are.
        KeyboardInterrupt: before the first round was finished; after it the report says `interrupted`.
        UsageError, MemoryBudgetError: the plan does not suit the model or the machine.
    """
    plan.cases(model.config.max_position)
    formats = formats_of(model)
    say("comparing the kernels with the reference")
    checks = check_kernels(model.config, formats.values())
    require_parity(checks)
    return report(model, plan, measure(model, plan, say), formats, checks)


def report(
    model: CausalLM,
    plan: BenchPlan,
    measured: Measurements,
    formats: dict[str, str],
    checks: list[KernelCheck],
) -> dict[str, Any]:
    """All figures of a run as JSON values; seconds, bytes, tokens a second unless a name says otherwise."""
    costs = costs_of(model.config, formats, trunk_caches(model))
    ceilings = {name: spread([getattr(found, name) for found in measured.ceilings]) for name in FIGURES}
    bandwidth = 1e9 * ceilings["read_bandwidth"]["median"]
    # Whatever disturbs a machine makes arithmetic slower and never faster, so the best counts.
    peaks = {name: 1e9 * ceilings[name]["max"] for name in ARITHMETICS}
    prefill, decode = [], []
    for case, seconds in measured.cases.items():
        if case.kind == "prefill":
            prefill.append(_prefill_row(case, seconds, costs, peaks))
        else:
            decode.append(_decode_row(case, seconds, measured.routed[case], costs, bandwidth, peaks))
    return {
        "threads": torch.get_num_threads(),
        "instruction_set": _native.instruction_set(),
        "formats": sorted(set(formats.values())),
        "parity": [asdict(check) for check in checks],
        "repeats": measured.rounds,
        "interrupted": measured.interrupted,
        "chunk": plan.chunk,
        "context": "random numbers in the caches, random tokens",
        "ceilings": ceilings,
        "noise": asdict(measured.noise),
        "warnings": measured.noise.warnings(),
        "prefill": prefill,
        "decode": decode,
        "memory": {**asdict(measured.memory), "caches": measured.cache_bytes},
        "profile": [{"case": str(case), **found} for case, found in measured.profile.items()],
    }


def _prefill_row(
    case: Case, seconds: Sequence[float], costs: Costs, peaks: Mapping[str, float]
) -> dict[str, Any]:
    speed = spread([case.tokens / t for t in seconds])
    flops = costs.prefill_flops(case.tokens) * (1 / case.tokens)
    return {
        "tokens": case.tokens,
        "tokens_per_second": speed,
        "seconds_to_first_token": spread(seconds),
        "flops_per_token": flops.total,
        "mfu": flops.seconds(peaks) * speed["median"],
    }


def _decode_row(
    case: Case,
    seconds: Sequence[float],
    routed: list[float],
    costs: Costs,
    bandwidth: float,
    peaks: Mapping[str, float],
) -> dict[str, Any]:
    speed = spread([case.tokens * case.batch / t for t in seconds])
    depth = case.depth + (case.tokens - 1) / 2  # the mean of the steps
    nbytes = costs.step_bytes(case.batch, depth, routed) / case.batch
    flops = costs.decode_flops(depth)
    by_chance = [distinct_experts(e.num_experts, e.top_k, case.batch) for e in costs.experts]
    return {
        "depth": case.depth,
        "batch": case.batch,
        "tokens": case.tokens,
        "tokens_per_second": speed,
        "bytes_per_token": nbytes,
        "flops_per_token": flops.total,
        "experts_per_layer": fmean(routed) if routed else None,
        "experts_per_layer_by_chance": fmean(by_chance) if by_chance else None,
        "mbu": nbytes * speed["median"] / bandwidth,
        "mfu": flops.seconds(peaks) * speed["median"],
    }
