from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from godwit.cli import doctor


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
    assert "missing: The native module godwit._native is not built" in shown
    assert "missing: PyTorch is installed but cannot be imported" in shown
    assert "Nothing that is required" not in shown


def test_a_source_tree_that_is_not_installed_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert doctor.packages() == ({}, {})
    assert any("not installed" in note for note in doctor.examine()["notes"])


def test_default_model_names_the_absent_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit.__file__", str(tmp_path / "__init__.py"))
    plant(tmp_path / "default_model", **{"config.json": "{}", "tokenizer.json": "{}"})
    assert doctor.default_model_report()["absent_files"] == ["model.safetensors"]
    plant(tmp_path / "default_model", **{"model.safetensors": ""})
    assert doctor.default_model_report()["present"]


@pytest.mark.parametrize(("features", "fast"), [({"avx2": True}, False), ({"amx_bf16": True}, True)])
def test_what_is_said_of_bfloat16(
    features: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = {
        "cores": 2,
        "features": features,
        "instruction_sets": ["scalar"],
        "chosen": "scalar",
        "forced": None,
    }
    monkeypatch.setattr(doctor, "native_report", lambda: native)
    report = doctor.examine()
    assert report["torch"]["bf16_matmul_fast"] == (fast and report["torch"]["mkldnn"])
    notes = [note for note in report["notes"] if "bfloat16" in note]
    assert len(notes) == (not report["torch"]["bf16_matmul_fast"])
    assert all("PyTorch multiplies" in note and "native kernels are not affected" in note for note in notes)


DOCTOR = [sys.executable, "-c", "from godwit.cli.main import main; main()", "doctor"]


def test_an_instruction_set_from_the_environment_is_shown() -> None:
    environment = {**os.environ, "GODWIT_INSTRUCTION_SET": "scalar"}
    result = subprocess.run(DOCTOR, env=environment, capture_output=True, text=True, check=True)
    assert "native module   uses scalar (GODWIT_INSTRUCTION_SET) of scalar" in result.stdout


def test_an_instruction_set_that_is_none_is_one_error() -> None:
    environment = {**os.environ, "GODWIT_INSTRUCTION_SET": "sse9"}
    result = subprocess.run(DOCTOR, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(
        "godwit: GODWIT_INSTRUCTION_SET: There is no instruction set named 'sse9'; this CPU offers: scalar"
    )
    assert len(result.stderr.splitlines()) == 1
