from __future__ import annotations

from pathlib import Path

import pytest

from godwit.measure import machine

MEMINFO = (
    "MemTotal:       8388608 kB\nMemFree:        1048576 kB\nMemAvailable:   4194304 kB\nHugePages_Total: 0\n"
)
GIB = 2**30


def plant(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_memory_without_a_limit(tmp_path: Path) -> None:
    plant(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/a\n", sys__fs__cgroup__a__memory="")
    assert machine.memory(tmp_path) == {"total": 8 * GIB, "available": 4 * GIB}


@pytest.mark.parametrize(
    ("groups", "directory", "limit", "used"),
    [
        ("0::/a/b\n", "a/b", "memory.max", "memory.current"),
        ("0::/a/b\n", "", "memory.max", "memory.current"),
        ("4:memory:/a\n0::/\n", "memory/a", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_memory_within_the_limit_of_a_cgroup(
    tmp_path: Path, groups: str, directory: str, limit: str, used: str
) -> None:
    plant(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=groups)
    group = tmp_path / "sys/fs/cgroup" / directory
    group.mkdir(parents=True)
    (group / limit).write_text(f"{2 * GIB}\n")
    (group / used).write_text(f"{GIB // 2}\n")
    assert machine.memory(tmp_path) == {"total": 2 * GIB, "available": 2 * GIB - GIB // 2}


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096), ""])
def test_no_limit_is_no_limit(tmp_path: Path, limit: str) -> None:
    plant(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(limit)
    (group / "memory.current").write_text("1")
    assert machine.memory(tmp_path)["total"] == 8 * GIB


def test_where_there_is_no_proc(tmp_path: Path) -> None:
    assert machine.memory(tmp_path)["available"] is None
    assert machine.cpu_name(tmp_path)


def test_the_processor_says_its_name(tmp_path: Path) -> None:
    plant(tmp_path, proc__cpuinfo="processor\t: 0\nmodel name\t: Fast CPU 9000\n")
    assert machine.cpu_name(tmp_path) == "Fast CPU 9000"
