"""The machine: its processor's name, and its memory within the limits of this process."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's model name, or the architecture if the system does not report it."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def memory(root: Path = Path("/")) -> dict[str, int | None]:
    """Bytes of memory, total and available to this process, within the limit of its cgroup (v2 and v1).

    None if the system does not report it. `root` is a prefix of /proc and /sys, for tests.
    """
    kib = {}
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        kib[name] = int(value.split()[0])
    if "MemTotal" not in kib:
        return {"total": _total_by_sysconf(), "available": None}
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    for limit, used in _cgroup_memory(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return {"total": total, "available": available}


def _total_by_sysconf() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of this process's cgroup and its ancestors, if a limit is set."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif controllers == "memory":
            mount, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = mount / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(mount):
                break
            limit, used = (next(iter(_lines(directory / name)), "") for name in names)
            if limit.isdigit() and used.isdigit() and int(limit) < _NO_LIMIT:
                yield int(limit), int(used)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
