"""The machine's current limits: memory bandwidth, arithmetic, and interference by other processes."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

from godwit import _native
from godwit.measure.machine import memory

MIN_BYTES = 256 << 20
NOISY_BANDWIDTH = 0.15  # (largest - smallest) / median of the bandwidths of one run
NOISY_SHARE = 0.05  # of the processors' time, used by others


@dataclass(frozen=True)
class Ceilings:
    """Read bandwidth in GB/s; multiply-adds on registers in 10^9 operations per second.

    The arithmetic is that of the instruction set in use: `int8` for products with q4 and q8 weights,
    `bfloat16` for those with the keys and values of attention, `float32` for all others. An instruction set
    without bfloat16 products widens them, so that `bfloat16` equals float32.
    """

    read_bandwidth: float
    int8: float
    bfloat16: float
    float32: float


FIGURES = tuple(field.name for field in fields(Ceilings))


def measure_ceilings(num_bytes: int | None = None, seconds: float = 0.1) -> Ceilings:
    """The best of a few attempts each, with all threads of the kernels.

    Args:
        num_bytes: how much memory to read; None: more than fits in the processor's caches.
        seconds: for each arithmetic; a few milliseconds at least.
    """
    return Ceilings(
        _native.read_bandwidth(bytes_beyond_cache() if num_bytes is None else num_bytes, 5),
        *(_native.peak(name, seconds) for name in ("int8", "bfloat16", "float32")),
    )


def bytes_beyond_cache(root: Path = Path("/")) -> int:
    """Twice the last-level cache, at least 256 MiB, but no more than a quarter of the free memory."""
    wanted = max(MIN_BYTES, 2 * last_level_cache(root))
    available = memory(root)["available"]
    return wanted if available is None else min(wanted, available // 4)


def last_level_cache(root: Path = Path("/")) -> int:
    """Bytes of the largest cache of the first processor; 0 if the system does not report it."""
    sizes = [0]
    for file in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        number, unit = text[:-1], text[-1:]
        if number.isdigit() and unit in ("K", "M"):
            sizes.append(int(number) << (10 if unit == "K" else 20))
    return max(sizes)


@dataclass(frozen=True)
class CpuTimes:
    """Seconds since boot of the processors that this process may use, and its own."""

    total: float
    busy: float
    steal: float
    own: float

    @staticmethod
    def now(root: Path = Path("/")) -> CpuTimes | None:
        """None if the system does not report them."""
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        names = {f"cpu{core}" for core in cores}
        try:
            lines = (root / "proc/stat").read_text().splitlines()
        except OSError:
            return None
        ticks = [[int(x) for x in line.split()[1:9]] for line in lines if line.split(" ")[0] in names]
        if not ticks:
            return None
        user, nice, system, idle, iowait, irq, softirq, steal = map(sum, zip(*ticks, strict=True))
        busy = user + nice + system + irq + softirq
        own = os.times()
        hertz = os.sysconf("SC_CLK_TCK")
        return CpuTimes(
            (busy + idle + iowait + steal) / hertz, busy / hertz, steal / hertz, own.user + own.system
        )


@dataclass(frozen=True)
class Noise:
    """How steady a run was; shares of the processors' time are None if the system does not report them.

    Attributes:
        bandwidth_spread: (largest - smallest) / median of the repeated measurement.
        steal: share that the hypervisor gave to other machines.
        others: share that other processes on this machine used.
    """

    bandwidth_spread: float
    steal: float | None
    others: float | None

    @staticmethod
    def between(before: CpuTimes | None, after: CpuTimes | None, bandwidths: list[float]) -> Noise:
        """The noise between two moments."""
        spread = (max(bandwidths) - min(bandwidths)) / median(bandwidths)
        if before is None or after is None or after.total <= before.total:
            return Noise(spread, None, None)
        total = after.total - before.total
        others = after.busy - before.busy - (after.own - before.own)
        return Noise(spread, (after.steal - before.steal) / total, max(0.0, others / total))

    def warnings(self) -> list[str]:
        """One sentence for each disturbance that may affect the results."""
        found = []
        if self.bandwidth_spread > NOISY_BANDWIDTH:
            found.append(f"the memory bandwidth varied by {self.bandwidth_spread:.0%} during the run")
        if (self.steal or 0.0) > NOISY_SHARE:
            found.append(f"the hypervisor gave {self.steal:.0%} of the processors' time to other machines")
        if (self.others or 0.0) > NOISY_SHARE:
            found.append(f"other processes took {self.others:.0%} of the processors' time")
        return found


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of this process; None if the system does not report them.

    Attributes:
        peak: most resident memory so far, including pages of mapped files.
        resident: resident now.
        proportional: resident now, with pages shared with other processes divided among them.
    """

    peak: int | None
    resident: int | None
    proportional: int | None

    @staticmethod
    def now(root: Path = Path("/")) -> MemoryUse:
        """The current values."""
        status = _kib(root / "proc/self/status")
        rollup = _kib(root / "proc/self/smaps_rollup")
        return MemoryUse(status.get("VmHWM"), status.get("VmRSS"), rollup.get("Pss"))


def _kib(path: Path) -> dict[str, int]:
    """The lines ``Name:  123 kB`` of a file of /proc, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in words if len(w) == 3}


def reset_peak(root: Path = Path("/")) -> bool:
    """Reset the peak of resident memory; False if the system does not support that."""
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
