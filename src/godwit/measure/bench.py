"""How fast a model runs, compared with what the machine can do at the same time.

The cases of a run take turns, round after round, and the machine's limits are measured between rounds, so
that a disturbance affects all of them equally. Each result is a median with the minimum and maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from time import sleep
from typing import Any

import torch

from godwit import _native
from godwit.measure.bench_cases import BenchPlan, Case, CaseRunner, profile_case
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
from godwit.measure.parity import KernelCheck, check_kernels, require_parity
from godwit.models.causal_lm import CausalLM

PAUSE = 0.05  # seconds for threads to go idle after measuring the ceilings

Say = Callable[[str], None]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


@dataclass(frozen=True)
class Measurements:
    """The raw results of a run: seconds of each case, ceilings between rounds, and the conditions.

    Attributes:
        interrupted: Ctrl-C ended it early; only finished rounds count.
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
    """Run all cases of ``plan``, round after round. Ctrl-C ends it; finished rounds count.

    Raises:
        KeyboardInterrupt: before the first round was finished.
    """
    cases = plan.cases(model.config.max_position)
    warm_up = Case("prefill", min(plan.chunk, model.config.max_position))  # uses nearly every expert
    runner = CaseRunner(model, [warm_up, *cases], plan.chunk)
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


def _round(runner: CaseRunner, cases: Sequence[Case], name: str, say: Say) -> list[float]:
    """Seconds of each case."""
    seconds = []
    for case in cases:
        say(f"{name}: {case}")
        seconds.append(runner.seconds(case))
    return seconds


def _ceilings(say: Say) -> Ceilings:
    """Measure, then reset the peak of memory, which the measurement raised."""
    say("measuring what the machine can do now")
    found = measure_ceilings()
    reset_peak()
    sleep(PAUSE)
    return found


def bench(model: CausalLM, plan: BenchPlan, say: Say = lambda text: None) -> dict[str, Any]:
    """Check the kernels, then measure.

    Raises:
        KernelParityError: the kernels' results are wrong.
        KeyboardInterrupt: before the first round was finished; after it the report says `interrupted`.
        UsageError, MemoryBudgetError: the plan does not fit the model or the machine.
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
    """All results of a run as JSON values, in seconds and bytes unless a name says otherwise."""
    costs = costs_of(model.config, formats, trunk_caches(model))
    ceilings = {name: spread([getattr(found, name) for found in measured.ceilings]) for name in FIGURES}
    bandwidth = 1e9 * ceilings["read_bandwidth"]["median"]
    # Disturbances only make arithmetic slower, so the best measurement counts.
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
