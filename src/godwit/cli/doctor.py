"""`godwit doctor`: what this machine has, what Godwit uses, and what is missing."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import godwit
from godwit.kernels.bfloat16 import bf16_units, multiplies_bf16_fast
from godwit.measure.machine import cpu_name, memory

DISTRIBUTION = "godwit-llm"
DEFAULT_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def run(*, as_json: bool = False, root: Path = Path("/")) -> int:
    """Print the report to stdout; return 0 if nothing required is missing, else 1.

    `root` is the parent of /proc and /sys, for tests.
    """
    report = examine(root)
    print(json.dumps(report, indent=2) if as_json else as_text(report))
    return 1 if report["missing"] else 0


def examine(root: Path = Path("/")) -> dict[str, Any]:
    """Collect the report. Sizes are in bytes; `missing` must be fixed, `notes` need not be."""
    missing: list[str] = []
    notes: list[str] = []
    required, optional = packages()
    if not required:
        notes.append(f"The package {DISTRIBUTION} is not installed, so its dependencies cannot be checked.")
    missing += [f"The package {name} is not installed." for name, found in required.items() if found is None]
    native = native_report()
    if native is None:
        missing.append("The native module godwit._native is not built; install the package to build it.")
    torch = torch_report(native or {})
    if torch is None and required.get("torch"):
        missing.append("PyTorch is installed but cannot be imported; reinstall the package torch.")
    if torch and not torch["bf16_matmul_fast"]:
        notes.append(
            "PyTorch multiplies bfloat16 slowly on this CPU: godwit train uses float32 unless its recipe "
            "says otherwise, and --dtype bfloat16 is slow. The native kernels are not affected."
        )
    default_model = default_model_report()
    if not default_model["present"]:
        notes.append("The built-in model is not installed; give a model to each command.")
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


def native_report() -> dict[str, Any] | None:
    """Instruction sets and cores as seen by the native module; None if it is not built."""
    try:
        from godwit import _native
    except ImportError:
        return None
    return {
        "cores": _native.num_cores(),
        "features": _native.cpu_features(),
        "instruction_sets": _native.available_instruction_sets(),
        "chosen": _native.instruction_set(),
        "forced": os.environ.get("GODWIT_INSTRUCTION_SET") or None,
    }


def torch_report(native: dict[str, Any]) -> dict[str, Any] | None:
    """Version, threads and devices of PyTorch; None if it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: one of its shared libraries is missing
        return None
    features: dict[str, bool] = native.get("features", {})
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
        "bf16_units": bf16_units(features),
        "bf16_matmul_fast": multiplies_bf16_fast(features),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def default_model_report() -> dict[str, Any]:
    """The directory of the built-in model, and its missing files."""
    directory = Path(godwit.__file__).parent / "default_model"
    absent = [name for name in DEFAULT_MODEL_FILES if not (directory / name).is_file()]
    return {"path": str(directory), "present": not absent, "absent_files": absent}


def disk_paths() -> list[str]:
    """The current directory and the download directory of models (or its nearest existing parent)."""
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
    """The report as text, one fact per line."""
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
    why = " (GODWIT_INSTRUCTION_SET)" if native["forced"] else ""
    return f"uses {native['chosen']}{why} of {', '.join(native['instruction_sets'])}"


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
