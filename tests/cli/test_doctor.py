from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from godwit.cli import doctor

MEMINFO = (
    "MemTotal:       8388608 kB\nMemFree:        1048576 kB\nMemAvailable:   4194304 kB\nHugePages_Total: 0\n"
)
GIB = 2**30


def plant(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_report_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == []
    assert report["native"]["chosen"] in report["native"]["instruction_sets"]
    assert report["cores"]["usable"] >= 1
    assert report["torch"]["version"]
    assert {"torch", "numpy", "tokenizers"} <= set(report["required_packages"])
    assert "transformers" in report["optional_packages"]
    assert doctor.run() == 0
    assert "Nothing that is required is missing." in capsys.readouterr().out


def test_what_is_missing_is_said_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "native_report", lambda: None)
    monkeypatch.setattr(doctor, "torch_report", lambda native: None)
    monkeypatch.setattr(doctor, "packages", lambda: ({"torch": "2.13.0", "numpy": None}, {"pytest": None}))
    assert doctor.run() == 1
    shown = capsys.readouterr().out
    assert "missing: The package numpy is not installed." in shown
    assert "missing: The native module godwit._native was not built" in shown
    assert "missing: PyTorch is installed but cannot be loaded" in shown
    assert "Nothing that is required" not in shown


def test_a_source_tree_that_is_not_installed_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert doctor.packages() == ({}, {})
    assert any("not installed" in note for note in doctor.examine()["notes"])


def test_memory_without_a_limit(tmp_path: Path) -> None:
    plant(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/a\n", sys__fs__cgroup__a__memory="")
    assert doctor.memory(tmp_path) == {"total": 8 * GIB, "available": 4 * GIB}


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
    assert doctor.memory(tmp_path) == {"total": 2 * GIB, "available": 2 * GIB - GIB // 2}


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096), ""])
def test_no_limit_is_no_limit(tmp_path: Path, limit: str) -> None:
    plant(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(limit)
    (group / "memory.current").write_text("1")
    assert doctor.memory(tmp_path)["total"] == 8 * GIB


def test_memory_where_there_is_no_proc(tmp_path: Path) -> None:
    assert doctor.memory(tmp_path)["available"] is None
    assert doctor.cpu_name(tmp_path)


def test_default_model_names_the_absent_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit.__file__", str(tmp_path / "__init__.py"))
    plant(tmp_path / "default_model", **{"config.json": "{}", "tokenizer.json": "{}"})
    assert doctor.default_model_report()["absent_files"] == ["model.safetensors"]
    plant(tmp_path / "default_model", **{"model.safetensors": ""})
    assert doctor.default_model_report()["present"]
