"""`godwit calibrate`, and what `godwit quantize` makes of its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from godwit.checkpoint.writer import save_tensors
from godwit.cli import quantize
from godwit.cli.main import app
from godwit.shrink.importance import read_importance
from tests.cli.conftest import Models


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A text of some length. " * 20)
    return path


def test_from_a_text_to_a_packed_file(models: Models, text: Path, tmp_path: Path) -> None:
    model, out = models("hello"), tmp_path / "importance.safetensors"
    result = invoke("calibrate", model, text, out, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["tokens"] == 20 * 23 and report["matrices"] == len(read_importance(out))
    assert report["experts"] == 20 and report["path"] == str(out)
    assert invoke("quantize", model, tmp_path / "m.godwit", "--importance", out).exit_code == 0
    assert invoke("verify", tmp_path / "m.godwit").exit_code == 0
    shown = invoke("calibrate", model, text, tmp_path / "second", "--tokens", "30")
    assert shown.exit_code == 0 and "30 tokens read" in shown.stdout
    assert "20 of 20 experts saw fewer than 32 tokens" in shown.stdout


def test_importances_of_another_model(models: Models, tmp_path: Path) -> None:
    save_tensors(tmp_path / "other", {"layers.9.ffn.w2.weight": torch.ones(8)}, {})
    result = invoke("quantize", models("hello"), tmp_path / "m", "--importance", tmp_path / "other")
    assert (result.exit_code, result.stdout) == (2, "") and "not a matrix of this model" in result.stderr
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_what_is_refused(models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = models("hello"), tmp_path / "out"
    (tmp_path / "taken").write_text("precious")
    (tmp_path / "empty").touch()
    for words, code, sentence in (
        ((model, text, tmp_path / "taken"), 3, "exists already"),
        ((model, tmp_path / "absent", out), 2, "No such file"),
        ((model, tmp_path, out), 2, "Is a directory"),
        ((model, tmp_path / "empty", out), 2, "at least two"),
        ((tmp_path / "taken", text, out), 3, "instead of the file"),
        ((model, text, "/"), 3, "not a file name"),
    ):
        result = invoke("calibrate", *words)
        assert (result.exit_code, result.stdout) == (code, "") and sentence in result.stderr
        assert result.stderr.count("\n") == 1
    monkeypatch.setattr(quantize, "memory", lambda: {"total": 1000, "available": 1000})
    result = invoke("calibrate", model, text, out)
    assert result.exit_code == 5 and "godwit calibrate loads the original" in result.stderr
    assert (tmp_path / "taken").read_text() == "precious" and not out.exists()
