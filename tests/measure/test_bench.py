from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch

from godwit import _native
from godwit.errors import KernelParityError, MemoryBudgetError, UsageError
from godwit.measure import bench as module
from godwit.measure import bench_cases
from godwit.measure.bench import bench, spread
from godwit.measure.bench_cases import BenchPlan, Case, CaseRunner
from godwit.measure.ceilings import measure_ceilings
from godwit.measure.costs import ARITHMETICS, costs_of, formats_of, trunk_caches
from godwit.measure.parity import KernelCheck
from godwit.models.batch import ForwardBatch
from godwit.models.caches import PagedKV
from godwit.models.causal_lm import CausalLM
from tests.engine.tiny import tiny_model

PLAN = BenchPlan((5, 33), 3, (0, 20), (1, 3), repeats=3, chunk=16, profile=True)


@pytest.fixture(autouse=True)
def _short_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_ceilings", partial(measure_ceilings, 1 << 20, 0.0))
    monkeypatch.setattr(module, "PAUSE", 0.0)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.parametrize("kind", ["attention", "delta", "hybrid"])
def test_a_report_is_finite_and_agrees_with_itself(kind: str) -> None:
    model = tiny_model(kind)
    report = json.loads(json.dumps(bench(model, PLAN), allow_nan=False))
    assert all(math.isfinite(number) and number >= 0 for number in numbers(report))
    bandwidth = report["ceilings"]["read_bandwidth"]["median"] * 1e9
    costs = costs_of(model.config, formats_of(model), trunk_caches(model))
    peaks = {name: report["ceilings"][name]["max"] * 1e9 for name in ARITHMETICS}
    assert [row["tokens"] for row in report["prefill"]] == [5, 33]
    assert [(row["depth"], row["batch"]) for row in report["decode"]] == [(0, 1), (20, 1), (0, 3), (20, 3)]
    for row in report["decode"]:
        speed = row["tokens_per_second"]
        assert speed["min"] <= speed["median"] <= speed["max"]
        assert speed["median"] * row["bytes_per_token"] / bandwidth == pytest.approx(row["mbu"])
        flops = costs.decode_flops(row["depth"] + (row["tokens"] - 1) / 2)
        assert row["flops_per_token"] == flops.total
        assert speed["median"] * flops.seconds(peaks) == pytest.approx(row["mfu"])
    for row in report["prefill"]:
        assert row["tokens"] / row["seconds_to_first_token"]["median"] == pytest.approx(
            row["tokens_per_second"]["median"]
        )
    assert report["parity"] == [] and report["formats"] == ["float32"]
    assert len(report["profile"]) == 6


def test_bytes_are_those_of_the_costs_at_the_mean_depth() -> None:
    model = tiny_model("attention")
    costs = costs_of(model.config, formats_of(model), trunk_caches(model))
    rows = bench(model, BenchPlan((), 3, (20,), (2,), repeats=1))["decode"]
    (row,) = rows
    # three steps read 21, 22 and 23 tokens of each of two sequences
    assert row["bytes_per_token"] == costs.weights / 2 + 22 * costs.kv_per_token
    assert row["flops_per_token"] == costs.decode_flops(21).total
    assert row["experts_per_layer"] is None


def test_routed_experts_are_counted() -> None:
    model = tiny_model("hybrid")
    runner = CaseRunner(model, [Case("decode", 4, 8, 6)], 16)
    one, six = (runner.routed(Case("decode", 4, 8, batch)) for batch in (1, 6))
    assert one == [2.0] * 4  # top two of four
    assert all(2.0 < used <= 4.0 for used in six)


def test_equal_tokens_are_not_fed_to_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model("hybrid"), list[ForwardBatch]()
    forward = model.forward

    def spy(batch: ForwardBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(batch)
        return forward(batch, *args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    runner = CaseRunner(model, [Case("decode", 5, 20, 4), Case("prefill", 40)], 16)
    runner.seconds(Case("decode", 5, 20, 4))
    assert len(seen) == 5 and len({tuple(batch.input_ids.tolist()) for batch in seen}) == 5
    assert all(len(set(batch.input_ids.tolist())) > 1 for batch in seen)
    assert [batch.seq_lens for batch in seen] == [(21 + i,) * 4 for i in range(5)]
    tables = seen[0].block_tables
    assert tables is not None and len(set(tables.flatten().tolist())) == tables.numel()
    seen.clear()
    runner.seconds(Case("prefill", 40))
    assert [batch.lengths for batch in seen] == [[16], [16], [8]]
    assert seen[-1].seq_lens == (40,)
    runner.cache.check_integrity()


def test_caches_hold_what_a_deep_context_would() -> None:
    runner = CaseRunner(tiny_model("hybrid"), [Case("decode", 2, 100, 2)], 16)
    before = [cache.state.clone() for cache in runner.cache.caches.recurrent()]
    runner.seconds(Case("decode", 2, 100, 2))
    for cache, state in zip(runner.cache.caches.recurrent(), before, strict=True):
        assert not torch.equal(cache.state, state)
        assert torch.isfinite(cache.state).all() and cache.state.std() > 1e-3
    paged = [cache for cache in runner.cache.caches.layers if isinstance(cache, PagedKV)]
    assert paged and all((kv.k != 0).all() and kv.v.std() > 0.5 for kv in paged)


def test_cases_take_turns_and_ceilings_come_between(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    run = CaseRunner.seconds

    def seconds(self: CaseRunner, case: Case) -> float:
        order.append(str(case))
        return run(self, case)

    def between() -> Any:
        order.append("ceilings")
        return measure_ceilings(1 << 20, 0.0)

    monkeypatch.setattr(CaseRunner, "seconds", seconds)
    monkeypatch.setattr(module, "measure_ceilings", between)
    said: list[str] = []
    bench(
        tiny_model("attention"),
        BenchPlan((4,), 2, (0,), (1,), repeats=2, chunk=16, profile=True),
        said.append,
    )
    cases = ["prefill of 4", "decode at depth 0, batch 1"]
    assert order == ["prefill of 16", "ceilings", *cases, "ceilings", *cases, "ceilings", *cases]
    look = "measuring what the machine can do now"
    assert said == [
        "comparing the kernels with the reference",
        "warming up: prefill of 16",
        "counting the experts in use",
        look,
        *(f"round 1 of 2: {case}" for case in cases),
        look,
        *(f"round 2 of 2: {case}" for case in cases),
        look,
        *(f"profiling: {case}" for case in cases),
    ]


def interrupted_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Ctrl-C in the middle of a case, counted from the warm-up on."""
    run, calls = CaseRunner.seconds, count(1)

    def seconds(self: CaseRunner, case: Case) -> float:
        if next(calls) == call:
            raise KeyboardInterrupt
        return run(self, case)

    monkeypatch.setattr(CaseRunner, "seconds", seconds)


@pytest.mark.parametrize(("call", "rounds", "profiles"), [(5, 1, 0), (7, 2, 0), (9, 3, 1)])
def test_what_is_finished_by_ctrl_c_counts(
    monkeypatch: pytest.MonkeyPatch, call: int, rounds: int, profiles: int
) -> None:
    interrupted_at(monkeypatch, call)
    report = bench(tiny_model("attention"), BenchPlan((4,), 2, repeats=3, chunk=16, profile=True))
    assert report["interrupted"] and report["repeats"] == rounds
    assert len(report["prefill"]) == len(report["decode"]) == 1 and len(report["profile"]) == profiles
    assert not bench(tiny_model("attention"), BenchPlan((4,), 2, repeats=1, chunk=16))["interrupted"]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_ctrl_c_before_a_round_is_finished(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    interrupted_at(monkeypatch, call)
    with pytest.raises(KeyboardInterrupt):
        bench(tiny_model("attention"), BenchPlan((4,), 2, repeats=3, chunk=16))


def test_no_figure_while_the_kernels_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    red = [KernelCheck("q4", 0.5, 0.07, True)]
    monkeypatch.setattr(module, "check_kernels", lambda config, formats: red)
    monkeypatch.setattr(module, "measure", lambda *args: pytest.fail("it measured"))
    with pytest.raises(KernelParityError, match="no speeds are reported: with q4 weights"):
        bench(tiny_model("attention"), PLAN)


def test_the_parity_of_the_formats_in_use_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def green(config: Any, formats: Any) -> list[KernelCheck]:
        asked.extend(formats)
        return [KernelCheck("q8", 0.01, 0.07, True)]

    monkeypatch.setattr(module, "check_kernels", green)
    report = bench(tiny_model("attention"), BenchPlan((2,), 0, repeats=1))
    assert report["parity"] == [{"format": "q8", "error": 0.01, "limit": 0.07, "cut_invariant": True}]
    assert set(asked) == {"float32"}


@pytest.mark.parametrize("format", ["q4", "bf16"])
def test_a_packed_model_end_to_end(format: str) -> None:
    from godwit.models.native import pack_model

    report = bench(pack_model(tiny_model("hybrid"), format), dataclasses.replace(PLAN, repeats=1))
    assert format in report["formats"] and all(number >= 0 for number in numbers(report))
    assert {check["format"] for check in report["parity"]} == {format, "bf16"}
    for found in report["profile"]:
        assert found["ops"] and 0 < sum(op["seconds"] for op in found["ops"].values()) <= found["seconds"]


def test_profiling_is_switched_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    switched: list[bool] = []
    monkeypatch.setattr(_native, "set_profiling", switched.append)
    monkeypatch.setattr(_native, "profile", lambda: {"ffn": (0.25, 4)})
    runner = CaseRunner(tiny_model("attention"), [Case("prefill", 4)], 4)
    found = bench_cases.profile_case(runner, Case("prefill", 4))
    assert found["ops"] == {"ffn": {"seconds": 0.25, "calls": 4}} and switched == [True, False]
    with pytest.raises(MemoryBudgetError):
        bench_cases.profile_case(runner, Case("prefill", 400))
    assert switched[2:] == [True, False]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (BenchPlan((0,), 0), "nothing to measure"),
        (BenchPlan((), 4, ()), "nothing to measure"),
        (BenchPlan((4097,), 0), "4097 tokens is longer than the model's context of 4096"),
        (BenchPlan((), 128, (0, 4000)), "4128 tokens"),
    ],
)
def test_plans_that_cannot_be(plan: BenchPlan, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        bench(tiny_model("attention"), plan)


def test_caches_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "memory", lambda: {"total": 10**9, "available": 10**5})
    with pytest.raises(MemoryBudgetError, match="use smaller depths or batches"):
        CaseRunner(tiny_model("attention"), [Case("decode", 8, 2000, 4)], 16)


def test_cases_are_named_once() -> None:
    cases = BenchPlan((7, 7, 0), 2, (0, 0), (1,)).cases(100)
    assert [str(case) for case in cases] == ["prefill of 7", "decode at depth 0, batch 1"]
    assert [case.blocks for case in cases] == [1, 1]
    assert Case("decode", 17, 16, 3).blocks == 9


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([1.0, 4.0]) == {"median": 2.5, "min": 1.0, "max": 4.0}


def test_a_model_is_left_as_it_was() -> None:
    model: CausalLM = tiny_model("hybrid")
    before = {name: p.clone() for name, p in model.named_parameters()}
    bench(model, BenchPlan((4,), 2, repeats=1))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
