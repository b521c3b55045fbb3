from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from godwit.cli import bench as verb
from godwit.cli.main import app
from godwit.errors import UsageError
from godwit.measure import bench
from godwit.measure.ceilings import Noise, measure_ceilings
from godwit.measure.parity import KernelCheck
from godwit.shrink.synth import synthesize
from tests.cli.conftest import Models
from tests.engine.tiny import CONFIGS
from tests.measure.test_bench import interrupted_at

FEW = ("-p", "8,20", "-n", "2", "-d", "0,16", "-b", "1,2", "--repeats", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def _short_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_ceilings", partial(measure_ceilings, 1 << 20, 0.0))


def invoke(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def test_a_table_of_all_cases(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "warnings", lambda self: ["it was loud"])
    result = invoke(models("hello"), *FEW, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.rstrip().endswith("%")]
    assert [row[0] for row in rows if len(row) == 6] == ["8", "20"]
    assert [row[:2] for row in rows if len(row) == 9] == [["0", "1"], ["16", "1"], ["0", "2"], ["16", "2"]]
    assert max(map(len, result.stdout.splitlines()[3:15])) <= 80
    assert "GB/s" in result.stdout and "the reference itself was measured" in result.stdout
    assert "round 2 of 2: decode at depth 16, batch 2\n" in result.stderr
    assert "warning: it was loud\n" in result.stderr


def test_one_json_object_and_the_same_in_a_file(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "new" / "row.json"
    result = invoke(models("hello"), *FEW, "--json", "--output", out)
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)
    assert row == json.loads(out.read_text())
    assert row["model"]["name"] == models("hello") and row["model"]["layers"] == 4
    assert row["machine"]["cores"] >= 1 and row["commit"] and row["date"] and row["command"]
    assert (row["threads"], row["repeats"], row["chunk"]) == (1, 2, 4096)
    assert len(row["prefill"]) == 2 and len(row["decode"]) == 4 and row["profile"] == []


def test_ctrl_c_keeps_the_rounds_that_are_finished(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("-p", "8", "-n", "2", "-d", "0", "--repeats", "3", "--chunk", "16")
    for args, call in ((words, 6), ((*words, "--json", "--output", tmp_path / "row.json"), 4), (words, 2)):
        with monkeypatch.context() as patch:
            interrupted_at(patch, call)
            result = invoke(models("hello"), *args)
        assert result.exit_code == 130
        if call == 6:
            assert "medians of 2 rounds finished before Ctrl-C; " in result.stdout
            assert result.stderr.endswith(
                "\ngodwit: interrupted; the results are from 2 rounds finished before Ctrl-C\n"
            )
        elif call == 4:
            row = json.loads(result.stdout)
            assert row["interrupted"] and row["repeats"] == 1
            assert row == json.loads((tmp_path / "row.json").read_text())
        else:
            assert result.stdout == "" and result.stderr.endswith("\ngodwit: interrupted\n")


def test_where_the_file_cannot_be(models: Models, tmp_path: Path) -> None:
    result = invoke(models("hello"), *FEW, "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "") and "a directory; give a file" in result.stderr
    (tmp_path / "file").touch()
    words = ("-p", "4", "-n", "0", "--repeats", "1", "--json", "--output", tmp_path / "file" / "row.json")
    result = invoke(models("hello"), *words)
    assert result.exit_code == 2 and "could not be written" in result.stderr
    assert json.loads(result.stdout)["prefill"]  # what was measured is not lost


def test_what_fits_the_context_is_measured_unasked(models: Models) -> None:
    model = models("hello", max_position=600)
    row = json.loads(invoke(model, "-n", "2", "--repeats", "1", "--json").stdout)
    assert [found["tokens"] for found in row["prefill"]] == [512]
    assert [found["depth"] for found in row["decode"]] == [0]
    short = json.loads(invoke(models("hello", max_position=64), "-n", "2", "--repeats", "1", "--json").stdout)
    assert [found["tokens"] for found in short["prefill"]] == [64]


def test_no_speed_while_the_kernels_are_red(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "check_kernels", lambda *args: [KernelCheck("q4", 0.9, 0.1, True)])
    result = invoke(models("hello"), *FEW)
    assert result.exit_code == 8 and result.stdout == ""
    assert "godwit: no speeds are reported: with q4 weights" in result.stderr


def test_packing_before_measuring(models: Models) -> None:
    result = invoke(models("hello"), *FEW, "--quantize", "q8", "--profile", "--json")
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)
    assert {check["format"] for check in row["parity"]} == {"bf16", "q8"}
    assert len(row["profile"]) == 6
    text = invoke(models("hello"), *FEW, "--quantize", "q8", "--profile").stdout
    assert "share" in text and "between the ops" in text


@pytest.mark.parametrize("text", ["", "x", "1,,2", "-1", "1.5", "1, 2", "99999999999"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="-d takes whole numbers of at least 0, separated by commas"):
        verb.counts(text, "-d", 0)


def test_lists_of_numbers() -> None:
    assert verb.counts("512,4096", "-p", 0) == (512, 4096)
    assert verb.counts("0", "-p", 0) == (0,)
    with pytest.raises(UsageError, match="-b takes whole numbers of at least 1"):
        verb.counts("0", "-b", 1)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-b", "0"], "-b takes whole numbers of at least 1"),
        (["-p", "0", "-n", "0"], "there is nothing to measure"),
        (["-p", "100000"], "100000 tokens is longer than the model's context of 4096"),
        (["-d", "4096", "-n", "1"], "4097 tokens"),
    ],
)
def test_bad_arguments_end_in_one_sentence(models: Models, args: list[str], words: str) -> None:
    result = invoke(models("hello"), *args)
    assert result.exit_code == 2 and result.stdout == ""
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_model_that_is_not_there() -> None:
    result = invoke("/nowhere/at/all")
    assert result.exit_code != 0 and "/nowhere/at/all" in result.stderr


def test_a_packed_file_needs_no_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "model.godwit"
    synthesize(CONFIGS["hybrid"], file, format="q4")
    result = invoke(file, *FEW, "--json")
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)
    assert row["model"]["name"] == str(file) and {"q4", "q8", "bf16"} <= set(row["formats"])
    assert invoke(file, "--quantize", "q4").exit_code == 2
