"""Benchmark results with the command, machine, commit and date of their measurement."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import godwit
from godwit.measure.machine import cpu_name, memory


def result_row(command: str, packages: Sequence[str] = ("torch",), **figures: Any) -> dict[str, Any]:
    """One row: ``figures`` with what is needed to reproduce them.

    Args:
        command: the command line, as a user would type it.
        packages: distributions whose versions affect the figures.
        figures: JSON values.
    """
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "godwit": godwit.__version__,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "memory": memory()["total"]},
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        **figures,
    }


def commit() -> str:
    """The checked-out commit, with "-dirty" if files differ from it; "unknown" outside a checkout."""
    try:
        revision = _git("rev-parse", "HEAD")
        return revision + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    found = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=30)
    return found.stdout.strip()


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON to a temporary file, then rename it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(target)
