from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit import _native

LEVELS = ["scalar", "avx2", "avx512", "amx"]
LINUX = sys.platform == "linux"


@pytest.fixture(autouse=True)
def _restore_the_choice() -> Iterator[None]:
    before = _native.instruction_set()
    yield
    _native.set_instruction_set(before)


def plant(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def test_features_agree_with_the_kernel() -> None:
    if not (LINUX and platform.machine() == "x86_64"):
        pytest.skip("needs the flags that Linux shows of an x86-64 CPU")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    shown = set(flags.partition(":")[2].split())
    features = _native.cpu_features()
    assert len(features) == 17
    linux_names = {"sse4.2": "sse4_2", "avx512_vbmi": "avx512vbmi"}
    assert features == {name: linux_names.get(name, name) in shown for name in features}


def test_levels_come_plainest_first_and_the_widest_is_chosen() -> None:
    levels = _native.available_instruction_sets()
    assert levels == LEVELS[: len(levels)] and levels
    assert chosen_by("") == levels[-1]


def chosen_by(name: str) -> str:
    """The instruction set of a process whose environment names one, or what it ends with."""
    code = "from godwit import _native; print(_native.instruction_set())"
    environment = {**os.environ, "GODWIT_INSTRUCTION_SET": name}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return (result.stderr if result.returncode else result.stdout).splitlines()[-1]


def test_the_environment_forces_a_level() -> None:
    levels = _native.available_instruction_sets()
    assert [chosen_by(level) for level in levels] == levels
    lacking = "ImportError: GODWIT_INSTRUCTION_SET: This CPU cannot run the instruction set '{}'; it offers: "
    for level in LEVELS[len(levels) :]:
        assert chosen_by(level).startswith(lacking.format(level))
    assert chosen_by("AVX2").startswith("ImportError: GODWIT_INSTRUCTION_SET: There is no instruction set")


def test_levels_need_all_their_features() -> None:
    features, levels = _native.cpu_features(), _native.available_instruction_sets()
    needs = {
        "avx2": ["avx2", "fma", "f16c"],
        "avx512": [f"avx512{name}" for name in ("f", "bw", "vl", "dq", "_vnni", "_vbmi", "_bf16")],
        "amx": ["amx_tile", "amx_int8", "amx_bf16"],
    }
    for level, names in needs.items():
        if level in levels:
            assert all(features[name] for name in names)
        elif level != "amx" and LEVELS[LEVELS.index(level) - 1] in levels:  # the system may refuse tiles
            assert not all(features.get(name, False) for name in names)


def test_every_available_level_can_be_forced() -> None:
    for level in _native.available_instruction_sets():
        _native.set_instruction_set(level)
        assert _native.instruction_set() == level


@pytest.mark.parametrize("name", ["", "AVX2", "sse9", "scalar "])
def test_unknown_level_is_refused_and_the_choice_stays(name: str) -> None:
    _native.set_instruction_set("scalar")
    with pytest.raises(ValueError, match=r"There is no instruction set named .*offers: scalar"):
        _native.set_instruction_set(name)
    assert _native.instruction_set() == "scalar"


def test_level_that_the_cpu_lacks_is_refused() -> None:
    lacking = [level for level in LEVELS if level not in _native.available_instruction_sets()]
    if not lacking:
        pytest.skip("this CPU lacks no level")
    for level in lacking:
        with pytest.raises(ValueError, match=f"This CPU cannot run the instruction set '{level}'"):
            _native.set_instruction_set(level)


def test_cores_without_any_quota_are_those_of_the_affinity_mask(tmp_path: Path) -> None:
    expected = len(os.sched_getaffinity(0)) if LINUX else os.cpu_count()
    assert _native.num_cores(str(tmp_path)) == expected
    assert 1 <= _native.num_cores() <= (expected or 1)


@pytest.mark.skipif(not LINUX, reason="needs the affinity mask of Linux")
def test_affinity_bounds_the_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert _native.num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


ONE_V2 = "0::/a/b\n"
ONE_V1 = "5:cpuset:/x\n3:cpu,cpuacct:/a\n1:name=systemd:/\n0::/\n"
QUOTAS = {
    "v2 own": (ONE_V2, {"sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}),
    "v2 parent": (
        ONE_V2,
        {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "1000 100000"},
    ),
    "v2 in a container": (ONE_V2, {"sys/fs/cgroup/cpu.max": "100000 100000\n"}),
    "v2 above the namespace": ("0::/../c\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}),
    "v1": (
        ONE_V1,
        {
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_quota_bounds_the_cores(tmp_path: Path, case: str) -> None:
    groups, files = QUOTAS[case]
    assert _native.num_cores(plant(tmp_path, {"proc/self/cgroup": groups, **files})) == 1


@pytest.mark.parametrize("text", ["max 100000", "", "garbage", "-1 100000", "100 0", "1e400 1", "nan nan"])
def test_no_quota_or_a_strange_one_bounds_nothing(tmp_path: Path, text: str) -> None:
    unbounded = _native.num_cores(str(tmp_path))
    files = {"proc/self/cgroup": "junk\n0::/a\n", "sys/fs/cgroup/a/cpu.max": text}
    assert _native.num_cores(plant(tmp_path, files)) == unbounded


def test_part_of_a_core_counts_as_a_whole_one(tmp_path: Path) -> None:
    if _native.num_cores(str(tmp_path)) < 2:
        pytest.skip("needs two cores")
    files = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "110000 100000\n"}
    assert _native.num_cores(plant(tmp_path, files)) == 2
