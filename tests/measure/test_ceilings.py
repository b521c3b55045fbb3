from __future__ import annotations

from pathlib import Path

import pytest
import torch

from godwit import _native
from godwit.measure import ceilings
from godwit.measure.ceilings import CpuTimes, MemoryUse, Noise

STAT = """cpu  400 0 400 800 0 0 0 40 0 0
cpu0 100 10 80 200 5 1 4 10 7 0
cpu1 300 0 320 600 0 0 0 30 0 0
intr 1
"""


def plant(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_ceilings_are_positive_and_finite() -> None:
    found = ceilings.measure_ceilings(1 << 20, 0.0)
    assert len(ceilings.FIGURES) == 4
    for name in ceilings.FIGURES:
        assert 0.0 < getattr(found, name) < 1e7


@pytest.mark.parametrize("name", _native.available_instruction_sets())
def test_every_instruction_set_has_its_own_peaks(name: str) -> None:
    before = _native.instruction_set()
    try:
        _native.set_instruction_set(name)
        for arithmetic in ("int8", "bfloat16", "float32"):
            assert 0.1 < _native.peak(arithmetic, 0.0) < 1e6
    finally:
        _native.set_instruction_set(before)


def test_peaks_of_nothing_known() -> None:
    with pytest.raises(ValueError, match="no arithmetic named 'int4'; there are int8, bfloat16 and float32"):
        _native.peak("int4")
    for seconds in (-1.0, 61.0, float("nan")):
        with pytest.raises(ValueError, match="seconds must lie between 0 and 60"):
            _native.peak("int8", seconds)


def test_the_last_cache_decides_how_much_is_read(tmp_path: Path) -> None:
    cache = "sys__devices__system__cpu__cpu0__cache__"
    plant(tmp_path, **{f"{cache}index0__size": "48K\n", f"{cache}index3__size": "480M\n"})
    assert ceilings.last_level_cache(tmp_path) == 480 << 20
    meminfo = "MemTotal: 8388608 kB\nMemAvailable: {} kB\n"
    plant(tmp_path, proc__meminfo=meminfo.format(8388608))
    assert ceilings.bytes_beyond_cache(tmp_path) == 960 << 20
    plant(tmp_path, proc__meminfo=meminfo.format(1048576))
    assert ceilings.bytes_beyond_cache(tmp_path) == 256 << 20
    plant(tmp_path, proc__meminfo=meminfo.format(8388608), **{f"{cache}index3__size": "?\n"})
    assert ceilings.bytes_beyond_cache(tmp_path) == 256 << 20


def test_times_of_the_processors_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    times = CpuTimes.now(plant(tmp_path, proc__stat=STAT))
    assert times is not None
    assert (times.busy, times.steal, times.total) == (1.95, 0.1, 4.1)
    assert times.own > 0.0


def test_times_of_this_machine_grow_with_work() -> None:
    before = CpuTimes.now()
    if before is None:
        pytest.skip("needs /proc/stat")
    for _ in range(50):
        torch.randn(100, 1000) @ torch.randn(1000, 1000)
    after = CpuTimes.now()
    assert after is not None
    assert after.own > before.own and after.busy >= before.busy


def test_where_there_is_no_proc(tmp_path: Path) -> None:
    assert CpuTimes.now(tmp_path) is None
    assert MemoryUse.now(tmp_path) == MemoryUse(None, None, None)
    assert not ceilings.reset_peak(tmp_path)
    noise = Noise.between(None, None, [10.0, 9.0, 11.0])
    assert noise.bandwidth_spread == pytest.approx(0.2) and noise.steal is None and noise.others is None
    assert noise.warnings() == ["the memory bandwidth varied by 20% during the run"]


def test_noise_is_what_others_took() -> None:
    before, after = CpuTimes(100.0, 50.0, 1.0, 10.0), CpuTimes(120.0, 68.0, 3.0, 22.0)
    noise = Noise.between(before, after, [10.0, 10.0])
    assert (noise.bandwidth_spread, noise.steal) == (0.0, 0.1) and noise.others == pytest.approx(0.3)
    first, second = noise.warnings()
    assert "10%" in first and "hypervisor" in first
    assert "30%" in second and "other processes" in second


def test_a_quiet_machine_gives_no_warning() -> None:
    before, after = CpuTimes(100.0, 50.0, 0.0, 10.0), CpuTimes(120.0, 65.0, 0.2, 24.9)
    assert Noise.between(before, after, [10.0, 10.5, 9.9]).warnings() == []


def test_own_time_beyond_the_busy_time_is_no_noise() -> None:
    noise = Noise.between(CpuTimes(0, 0, 0, 0), CpuTimes(10, 5, 0, 5.02), [1.0])
    assert noise.others == 0.0


def test_memory_of_a_process(tmp_path: Path) -> None:
    plant(
        tmp_path,
        proc__self__status="Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n",
        proc__self__smaps_rollup="0-f ---p 0 00:00 0 [rollup]\nRss: 1024 kB\nPss:  512 kB\nPss_Dirty: 1 kB\n",
    )
    assert MemoryUse.now(tmp_path) == MemoryUse(2 << 20, 1 << 20, 512 << 10)


def test_the_peak_can_begin_anew() -> None:
    if MemoryUse.now().peak is None:
        pytest.skip("needs /proc/self/status")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    high = MemoryUse.now().peak
    del block
    if not ceilings.reset_peak():
        pytest.skip("this system does not let the peak be reset")
    low = MemoryUse.now().peak
    assert high is not None and low is not None and low < high
