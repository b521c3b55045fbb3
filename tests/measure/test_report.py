from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from godwit.measure import report


def test_a_row_says_where_its_figures_come_from(tmp_path: Path) -> None:
    row = report.result_row("python x.py", speed=3.5)
    assert row["speed"] == 3.5
    assert row["command"] == "python x.py"
    assert row["machine"]["cores"] >= 1
    assert row["packages"]["torch"]
    report.write_json(tmp_path / "deep" / "row.json", row)
    assert json.loads((tmp_path / "deep" / "row.json").read_text()) == row
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["row.json"]


def test_the_commit_is_marked_where_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() == "unknown"

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@y", *words], check=True, capture_output=True
        )

    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    clean = report.commit()
    assert len(clean) == 40
    (tmp_path / "file").write_text("b")
    assert report.commit() == clean + "-dirty"
