"""Processes for what is not trusted: what they are told, and that they are ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from godwit.worker import Child, run_once

SCRIPT = "import json, os, sys\nsys.stdin.read(1)\nprint(json.dumps(dict(os.environ)), flush=True)\n"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    for name in ("GODWIT_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "HOME"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    return path


def check(environment: dict[str, str]) -> None:
    assert "secret" not in environment.values()
    assert environment["TZ"] == "Asia/Tokyo"


def test_the_environment_holds_no_secrets(script: Path) -> None:
    child = Child(script)
    child.start()
    requests, answers = child.pipes()
    requests.write(b"x")
    requests.flush()
    check(json.loads(answers.readline()))
    child.drop()
    assert not child.running


def test_once(script: Path) -> None:
    output = run_once(script, b"x", 60)
    assert output is not None
    check(json.loads(output))
    script.write_text("raise SystemExit(1)")
    assert run_once(script, b"", 60) is None
    script.write_text("while True: pass")
    assert run_once(script, b"", 0.2) is None
