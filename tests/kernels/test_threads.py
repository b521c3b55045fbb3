"""The thread pool, seen through real ops: results never depend on it, and it survives what processes do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from godwit import _native
from godwit.qtensor import quantize

EVERY_SET = _native.available_instruction_sets()
FORMATS = ("q4", "q8", "bf16")
# With chunks of a few tiles: none to share, a chunk and a rest, more chunks than threads.
ROWS = (1, 16, 63, 64, 65, 130, 517)

# A process of its own with a matrix and its product with `x`, both always the same.
PRELUDE = """
import os, sys, threading, time
import numpy as np
from godwit import _native
generator = np.random.default_rng(0)
size = _native.weight_bytes("q8", 300, 96)
memory = generator.integers(1, 64, size + 64, np.uint8)  # as half-precision numbers all below 2
w = _native.Weight("q8", 300, 96, memory[-memory.ctypes.data % 64 :][:size])
x = generator.standard_normal((5, 96), np.float32)
def product():
    out = np.full((5, 300), np.nan, np.float32)
    _native.linear(x, w, None, out)
    return out
def good():
    return np.array_equal(product(), expected)
expected = product()
"""


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before, threads = _native.instruction_set(), _native.num_threads()
    yield
    _native.set_profiling(False)
    _native.set_instruction_set(before)
    _native.set_num_threads(threads)


def matrix(rows: int, cols: int, fmt: str = "q8") -> _native.Weight:
    return _native.Weight(fmt, rows, cols, quantize(torch.randn(rows, cols), fmt).data)


def product(x: Tensor, w: _native.Weight) -> Tensor:
    out = torch.full((x.shape[0], w.rows), torch.nan)
    _native.linear(x, w, None, out)
    return out


def run(script: str) -> str:
    """What a Python of its own says on stdout; it must end well and say nothing else."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + script], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.parametrize("name", EVERY_SET)
@pytest.mark.parametrize("fmt", FORMATS)
def test_results_do_not_depend_on_the_number_of_threads(name: str, fmt: str) -> None:
    _native.set_instruction_set(name)
    cases = [(torch.randn(3, 70), matrix(rows, 70, fmt)) for rows in ROWS]
    _native.set_num_threads(1)
    expected = [product(x, w) for x, w in cases]
    assert not any(out.isnan().any() for out in expected)
    for count in (2, 3, 8, 2):
        _native.set_num_threads(count)
        assert _native.num_threads() == count
        for (x, w), out in zip(cases, expected, strict=True):
            assert torch.equal(product(x, w), out)


def test_thousands_of_small_jobs_while_the_pool_changes_its_size() -> None:
    cases = [(torch.randn(1 + rows % 3, 33), matrix(rows, 33)) for rows in (17, 80, 129)]
    _native.set_num_threads(1)
    expected = [product(x, w) for x, w in cases]
    for job in range(3000):
        if job % 200 == 0:
            _native.set_num_threads(1 + job // 200 % 5)
        x, w = cases[job % 3]
        assert torch.equal(product(x, w), expected[job % 3])


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_threads_than_one_are_refused(count: int) -> None:
    _native.set_num_threads(3)
    with pytest.raises(ValueError, match=f"There must be at least 1 thread, not {count}"):
        _native.set_num_threads(count)
    assert _native.num_threads() == 3


def test_ops_of_several_python_threads_take_turns() -> None:
    cases = [(torch.randn(2, 96), matrix(200 + 40 * i, 96)) for i in range(4)]
    expected = [product(x, w) for x, w in cases]
    wrong: list[int] = []

    def work(number: int) -> None:
        x, w = cases[number]
        for turn in range(60):
            if number == 0 and turn % 20 == 0:
                _native.set_num_threads(1 + turn // 20)
            if not torch.equal(product(x, w), expected[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_busy_neighbour_changes_no_result() -> None:
    x, w = torch.randn(4, 96), matrix(500, 96)
    _native.set_num_threads(1)
    expected = product(x, w)
    spin = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-S", "-c", spin], stdout=subprocess.PIPE) as neighbour:
        try:
            assert neighbour.stdout is not None
            neighbour.stdout.readline()
            _native.set_num_threads(_native.num_cores() + 1)
            assert all(torch.equal(product(x, w), expected) for _ in range(50))
        finally:
            neighbour.kill()


def test_denormals_stay_whatever_the_calling_thread_does_with_them() -> None:
    x, factor = torch.randn(8, 64), torch.full((64,), 1e-40)
    expected = torch.empty(8, 64)
    _native.rms_norm(x, factor, 1e-6, expected)
    assert expected.count_nonzero() == expected.numel() and expected.abs().max() < 1.2e-38
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        out = torch.empty(8, 64)
        _native.rms_norm(x, factor, 1e-6, out)
        flushed = (factor * 0.5).count_nonzero() == 0
    finally:
        torch.set_flush_denormal(False)
    assert flushed and torch.equal(out, expected)


def test_one_thread_for_each_core_to_begin_with() -> None:
    assert run("print(_native.num_threads() == _native.num_cores())") == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_on() -> None:
    script = """
_native.set_num_threads(3)
stop = False
def work():
    while not stop: product()
thread = threading.Thread(target=work); thread.start()
statuses = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        before = all(good() for _ in range(5))
        _native.set_num_threads(2)
        if not (before and good()): os._exit(3)
        sys.exit()
    statuses.append(os.waitpid(child, 0)[1])
stop = True
thread.join()
print(statuses == [0] * 8 and good())
"""
    assert run(script) == "True"


def test_the_process_ends_while_another_thread_computes() -> None:
    script = """
_native.set_num_threads(3)
def work():
    while True: product()
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
print("bye")
"""
    assert run(script) == "bye"


def test_profile_counts_while_it_is_on() -> None:
    x, w = torch.randn(2, 64), matrix(100, 64)
    _native.set_profiling(True)
    assert _native.profile() == {}
    for _ in range(3):
        product(x, w)
    _native.set_profiling(False)
    measured = _native.profile()
    seconds, calls = measured["linear"]
    assert calls == 3 and 0 < seconds < 60
    product(x, w)
    assert _native.profile() == measured
    _native.set_profiling(True)
    assert _native.profile() == {}


def test_scratch_memory_is_kept_and_does_not_grow_without_need() -> None:
    x, w = torch.randn(3000, 600), matrix(40, 600)
    product(x, w)
    product(x, w)
    held = _native.scratch_bytes()
    assert held >= x.numel()  # codes alone take a byte for each
    for _ in range(3):
        product(x[:100], w)
        product(x, w)
    assert _native.scratch_bytes() == held


def test_bandwidth_is_a_positive_number() -> None:
    assert 0 < _native.read_bandwidth(1 << 16, 2) < 1e5
    assert 0 < _native.read_bandwidth(1) < 1e5


@pytest.mark.parametrize(("size", "repeats"), [(0, 1), (-8, 1), (8, 0)])
def test_bandwidth_of_nothing_is_refused(size: int, repeats: int) -> None:
    with pytest.raises(ValueError, match="bytes and repeats must be positive"):
        _native.read_bandwidth(size, repeats)
