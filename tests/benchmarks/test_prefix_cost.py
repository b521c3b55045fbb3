from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import prefix_cost


def test_the_index_is_filled_and_each_size_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "row.json"
    sizes = ["--snapshots", "4,12", "--prompts", "3", "--system", "40", "--prompt", "20", "--answer", "10"]
    monkeypatch.setattr(sys, "argv", ["prefix_cost.py", *sizes, "--output", str(output)])
    assert prefix_cost.main() == 0
    rows = json.loads(output.read_text())["sizes"]
    assert [row["snapshots"] for row in rows] == [4, 12]
    assert all(row["evicted_snapshots"] >= 6 and row["milliseconds"] > 0 for row in rows)
    assert "| 12 |" in capsys.readouterr().out
