from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import curves

SVG = "{http://www.w3.org/2000/svg}"


def record(step: int, **fields: Any) -> dict[str, Any]:
    loss = 4 * math.exp(-step / 100) + 1 + 0.1 * (step % 3)
    return {"step": step, "loss": loss, "mtp_loss": 0.0, "tokens_per_second": 500.0, "seconds": 2.0, **fields}


def write(path: Path, records: list[dict[str, Any]], more: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + more)
    return path


def test_repeated_and_cut_off_lines(tmp_path: Path) -> None:
    held = [record(1), record(2, loss=9.0), record(2, loss=3.0), record(3, tokens_per_second=1000.0)]
    found = curves.read_log(write(tmp_path / "log.jsonl", held, '[]\n{"step": 4, "lo'))
    assert [r["step"] for r in found] == [1, 2, 3] and found[1]["loss"] == 3.0
    assert [r["millions"] for r in found] == [0.001, 0.002, 0.004]


def test_the_average_of_a_constant_is_the_constant() -> None:
    points = [(float(i), 2.5) for i in range(300)]
    assert all(y == pytest.approx(2.5) for _, y in curves.smooth(points))


def test_smoothing_follows_and_calms() -> None:
    points = [(r["step"] * 1.0, r["loss"]) for r in map(record, range(1000))]
    calm = curves.smooth(points)
    jump = max(abs(b - a) for (_, a), (_, b) in pairwise(calm))
    assert jump < 0.1 and calm[-1][1] == pytest.approx(1.1, abs=0.03)


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 2.1), (0.0, 36.0), (2.4, 9.0), (1e-3, 2e-3), (-5.0, 120000.0)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = curves.ticks(low, high)
    assert 3 <= len(found) <= 7 and low <= found[0] + 1e-9 and found[-1] <= high + 1e-9
    assert all(len(f"{value:g}") <= 7 for value in found)


@pytest.mark.parametrize("count", [1, 2, 3000])
@pytest.mark.parametrize("evaluated", [False, True])
def test_the_picture_is_well_formed(tmp_path: Path, count: int, evaluated: bool) -> None:
    held = [record(step, mtp_loss=2.0 if step > 10 else 0.0) for step in range(1, count + 1)]
    if evaluated:
        for r in held[:: max(1, count // 5)]:
            r["evaluation"] = {"heldout_text": 2.0, "a_<b>": 2.001}
    drawn = curves.draw(curves.read_log(write(tmp_path / "log", held)), title="R & D")
    root = ElementTree.fromstring(drawn)
    words = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert "R & D" in words and any(word.startswith("next token ") for word in words)
    assert any(word.startswith("token after next") for word in words) == (count > 10)
    assert any(word.startswith("a <b> 2.00") for word in words) == evaluated
    assert len(drawn) < 60_000
    for line in root.iter(f"{SVG}polyline"):
        places = [[float(x) for x in place.split(",")] for place in line.attrib["points"].split()]
        assert len(places) <= curves.MAX_POINTS
        assert all(0 <= x <= curves.WIDTH and curves.TOP <= y <= curves.BOTTOM for x, y in places)


def test_labels_keep_their_distance() -> None:
    series = [curves.Series(str(i), [(0.0, 1.0), (1.0, 1.0 + i / 1000)]) for i in range(4)]
    labels = ElementTree.fromstring(f"<g>{''.join(curves.Plot('', series, 0, 100, 1.0)._labels())}</g>")
    places = sorted(float(label.attrib["y"]) for label in labels)
    assert all(b - a >= curves.LABEL_GAP - 0.1 for a, b in pairwise(places))


def test_the_command(tmp_path: Path) -> None:
    log, out = write(tmp_path / "log.jsonl", [record(1), record(2)]), tmp_path / "curve.svg"

    def command(path: Path) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, curves.__file__, str(path), "--out", str(out)]
        return subprocess.run(line, capture_output=True, text=True)

    assert command(log).stdout == f"{out}\n" and out.read_text().startswith("<svg")
    assert "no such log" in command(tmp_path / "absent").stderr
    log.write_text("")
    assert "no steps yet" in command(log).stderr
