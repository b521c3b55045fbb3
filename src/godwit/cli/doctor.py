"""`godwit doctor`: what this machine offers, what Godwit will use of it, and what is missing."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import godwit

DISTRIBUTION = "godwit-llm"
DEFAULT_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def run(*, as_json: bool = False, root: Path = Path("/")) -> int:
    """Print the report to stdout; 0 where all that is required is there, else 1.

    `root` stands before /proc and /sys, for tests.
    """
    report = examine(root)
    print(json.dumps(report, indent=2) if as_json else as_text(report))
    return 1 if report["missing"] else 0


def examine(root: Path = Path("/")) -> dict[str, Any]:
    """Collect the report. Sizes are bytes; `missing` needs mending, `notes` need not."""
    missing: list[str] = []
    notes: list[str] = []
    required, optional = packages()
    if not required:
        notes.append(f"The package {DISTRIBUTION} is not installed, so its dependencies cannot be checked.")
    missing += [f"The package {name} is not installed." for name, found in required.items() if found is None]
    native = native_report()
    if native is None:
        missing.append("The native module godwit._native was not built; install the package to build it.")
    torch = torch_report(native or {})
    if torch is None and required.get("torch"):
        missing.append("PyTorch is installed but cannot be loaded; reinstall the package torch.")
    if torch and not torch["bf16_matmul_fast"]:
        notes.append("bfloat16 matrix products are slow on this CPU; float32 is the better choice.")
    default_model = default_model_report()
    if not default_model["present"]:
        notes.append("The built-in model is not in this installation; name a model instead.")
    return {
        "godwit": godwit.__version__,
        "python": platform.python_version(),
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cpu": cpu_name(root)},
        "cores": {"usable": native["cores"] if native else None, "machine": os.cpu_count()},
        "memory": memory(root),
        "disk_free": {path: shutil.disk_usage(path).free for path in disk_paths()},
        "native": native,
        "torch": torch,
        "default_model": default_model,
        "required_packages": required,
        "optional_packages": optional,
        "missing": missing,
        "notes": notes,
    }


def cpu_name(root: Path) -> str:
    """The processor's own name, or the architecture where the system does not tell."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def memory(root: Path) -> dict[str, int | None]:
    """Bytes of memory in all and free for this process, within the limit of its cgroup (v2 and v1)."""
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
    """(limit, used) in bytes of this process's cgroup and of those above it, where a limit is set."""
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
            if limit.isdigit() and used.isdigit() and int(limit) < NO_LIMIT:
                yield int(limit), int(used)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def native_report() -> dict[str, Any] | None:
    """Instruction sets and cores as the native module sees them; None where it is not built."""
    try:
        from godwit import _native
    except ImportError:
        return None
    return {
        "cores": _native.num_cores(),
        "features": _native.cpu_features(),
        "instruction_sets": _native.available_instruction_sets(),
        "chosen": _native.instruction_set(),
    }


def torch_report(native: dict[str, Any]) -> dict[str, Any] | None:
    """Version, threads and devices of PyTorch; None where it cannot be loaded."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: a shared library of its own is absent
        return None
    features: dict[str, bool] = native.get("features", {})
    # PyTorch accepts bfloat16 on every CPU, but only these units multiply it without widening it first.
    units = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if features.get(name)]
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "mkldnn": mkldnn,
        "bf16_units": units,
        "bf16_matmul_fast": mkldnn and bool(units),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def default_model_report() -> dict[str, Any]:
    """Where the built-in model lies and which of its files are absent."""
    directory = Path(godwit.__file__).parent / "default_model"
    absent = [name for name in DEFAULT_MODEL_FILES if not (directory / name).is_file()]
    return {"path": str(directory), "present": not absent, "absent_files": absent}


def disk_paths() -> list[str]:
    """Where files land: the current directory, and where models are downloaded to (or its parent)."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface")
    cache = cache.expanduser().absolute()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return list(dict.fromkeys([str(Path.cwd()), str(existing)]))


def packages() -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Installed versions of the (required, optional) packages that this distribution declares."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}, {}
    required: dict[str, str | None] = {}
    optional: dict[str, str | None] = {}
    for line in declared:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        (optional if "extra ==" in line else required)[name] = _version(name)
    return required, optional


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def as_text(report: dict[str, Any]) -> str:
    """The report for a reader, one fact a line."""
    machine, native, torch = report["machine"], report["native"], report["torch"]
    cores, size = report["cores"], report["memory"]
    rows = [
        ("godwit", f"{report['godwit']}, Python {report['python']}"),
        ("machine", f"{machine['system']}, {machine['cpu']}"),
        ("cores", f"{cores['usable'] or 'unknown'} usable of {cores['machine']}"),
        ("memory", f"{_gib(size['available'])} available of {_gib(size['total'])}"),
        *(("disk free", f"{_gib(free)} at {path}") for path, free in report["disk_free"].items()),
        ("native module", _native_text(native)),
        ("torch", _torch_text(torch)),
        ("built-in model", "present" if report["default_model"]["present"] else "absent"),
        ("packages", _package_text(report["required_packages"])),
        ("optional", _package_text(report["optional_packages"])),
    ]
    if native:
        have = [name for name, usable in native["features"].items() if usable]
        rows.insert(6, ("instructions", " ".join(have) or "none known"))
    lines = [f"{name:<16}{value}" for name, value in rows]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"missing: {item}" for item in report["missing"]] or ["Nothing that is required is missing."]
    return "\n".join(lines)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _native_text(native: dict[str, Any] | None) -> str:
    if native is None:
        return "absent"
    return f"uses {native['chosen']} of {', '.join(native['instruction_sets'])}"


def _torch_text(torch: dict[str, Any] | None) -> str:
    if torch is None:
        return "absent"
    fast = ", ".join(torch["bf16_units"]) if torch["bf16_matmul_fast"] else "no"
    return (
        f"{torch['version']}, {torch['threads']} threads, fast bfloat16: {fast}, "
        f"GPUs: {', '.join(torch['gpus']) or 'none'}"
    )


def _package_text(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'absent'}" for name, version in found.items()) or "unknown"
