from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from godwit.cli import train
from godwit.cli.main import app
from godwit.models.loader import load_model
from godwit.train.trainer import Trainer
from tests.train.micro import log_of, number_modes, write_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
# The command as a user runs it, with the plain kernels.
COMMAND = "import sys; from godwit.cli import main, train; train.can_compile = lambda: False; main.main()"


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(train, "can_compile", lambda: False)
    with number_modes():
        yield


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def invoke(*args: str | int | Path) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, args)])


def test_a_run_from_start_to_model(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(recipe_file, "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"{out / 'model'}\n")
    lines = result.stderr.splitlines()
    assert lines[0].startswith("Training 0.1 M parameters") and "8 steps of 256 tokens" in lines[0]
    assert lines[1] == "Matrix products run in float32, as the recipe says."
    shown = [line for line in lines if line.startswith("step ") and "/8 " in line]
    assert len(shown) == 8
    for word in ("loss", "mtp", "tokens/s", "GFLOP/s", "balance", "left"):
        assert word in shown[-1]
    assert "mtp" not in shown[0] and shown[-1].endswith("left 0s")
    assert any(line.startswith("step 4: held-out bits per byte: held ") for line in lines)
    assert load_model(out / "model").dtype == torch.bfloat16
    assert (out / "model" / "tokenizer.json").is_file()
    assert invoke(recipe_file, "--out", out).exit_code == 0  # all is done: it only exports again
    assert len(log_of(out)) == 8


@pytest.mark.parametrize(
    ("fast", "name"), [(True, "bfloat16, which is fast"), (False, "float32, as bfloat16 is slow")]
)
def test_the_cpu_chooses_the_arithmetic_where_the_recipe_does_not(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, name: str
) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("autocast = false", ""))
    monkeypatch.setattr("godwit.train.trainer.multiplies_bf16_fast", lambda: fast)
    result = invoke(recipe_file, "--out", tmp_path / "out", "--steps", 1)
    assert result.exit_code == 0 and f"Matrix products run in {name}" in result.stderr


def test_some_steps_and_the_rest(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = invoke(recipe_file, "--out", out, "--steps", 3)
    assert f"Ended after step 3 of 8. To continue: godwit train {recipe_file} --out {out}" in first.stderr
    assert first.stdout == f"{out / 'model'}\n" and len(log_of(out)) == 3
    assert invoke(recipe_file, "--out", out, "--steps", 2).exit_code == 0
    assert len(log_of(out)) == 5
    assert invoke(recipe_file, "--out", out, "--no-resume", "--steps", 1).exit_code == 0
    assert [record["step"] for record in log_of(out)] == [1]


def test_without_out_it_is_the_recipes_name(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("micro.toml", "--steps", 1)
    assert result.stdout == f"{Path('runs/micro/model')}\n" and (tmp_path / "runs/micro/state.pt").is_file()


def test_ctrl_c_saves_and_says_how_to_go_on(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe_file.write_text(recipe_file.read_text().replace("steps = 8", "steps = 100000"))
    command = [sys.executable, "-c", COMMAND, "train", str(recipe_file), "--out", str(out)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        while not process.stderr.readline().startswith("step 4/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.stdout.read() == "" and process.wait() == 130
    assert "Finishing this step, then saving" in rest and "Traceback" not in rest
    steps = len(log_of(out))
    assert f"Saved after step {steps} of 100000. To continue: godwit train {recipe_file} --out {out}" in rest
    assert torch.load(out / "state.pt", weights_only=True)["step"] == steps
    assert not (out / "model").exists()


def test_a_second_ctrl_c_ends_it_at_once(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def step(self: Trainer) -> dict[str, Any]:
        calls.append(self.step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Trainer, "_timed_step", step)
    before = signal.getsignal(signal.SIGINT)
    result = invoke(recipe_file, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "Stopped; steps since" in result.stderr and len(calls) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_what_ctrl_c_breaks_is_not_an_error(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Trainer) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the compiler was killed")

    monkeypatch.setattr(Trainer, "_timed_step", step)
    result = invoke(recipe_file, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "Saved after step 0" in result.stderr and "killed" not in result.stderr


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("steps = 8", "stepz = 8", 2),
        ('data = "data"', 'data = "absent"', 2),
        ("hidden_size = 32", 'hidden_size = "x"', 3),
        ("vocab_size = 64", "vocab_size = 8", 2),
    ],
)
def test_mistakes_are_one_sentence(recipe_file: Path, tmp_path: Path, old: str, new: str, code: int) -> None:
    text = recipe_file.read_text()
    assert old in text
    recipe_file.write_text(text.replace(old, new, 1))
    result = invoke(recipe_file, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (code, "") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_recipe(tmp_path: Path) -> None:
    assert invoke(tmp_path / "absent.toml").exit_code == 2


def test_a_state_of_another_model(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke(recipe_file, "--out", out, "--steps", 1).exit_code == 0
    recipe_file.write_text(recipe_file.read_text().replace("hidden_size = 32", "hidden_size = 48"))
    result = invoke(recipe_file, "--out", out)
    assert result.exit_code == 2 and "belongs to another model" in result.stderr


def test_a_terminal_is_rewritten(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train.run(recipe_file, out=tmp_path / "out", steps=2)
    text = terminal.getvalue()
    assert "\rstep 1/8" in text and "\x1b[K\rstep 2/8" in text and text.endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (89.4, "89s"), (90, "2m"), (3599, "1h00m"), (7500, "2h05m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert train.duration_text(seconds) == text


def test_the_compiler_that_torch_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert not train.can_compile()
    monkeypatch.setenv("CXX", sys.executable)
    assert train.can_compile()


def test_the_log_is_json(recipe_file: Path, tmp_path: Path) -> None:
    invoke(recipe_file, "--out", tmp_path / "out", "--steps", 1)
    (line,) = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert {"step", "loss", "tokens", "tokens_per_second", "gflops", "seconds"} <= json.loads(line).keys()
