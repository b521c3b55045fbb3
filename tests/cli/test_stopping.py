"""Ctrl-C, SIGTERM, readers that leave and disks that are full, in the middle of a verb."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from godwit.cli import quantize
from godwit.cli.main import app
from godwit.cli.stopping import Terminated, tidy_stop
from godwit.models.loader import save_model
from tests.engine.tiny import tiny_model

MAIN = "from godwit.cli.main import main; main()"
NUMBERS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "m"
    save_model(tiny_model("hybrid"), directory)
    return directory


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def stopped_halfway(number: signal.Signals) -> Callable[[str], Any]:
    @contextmanager
    def working(what: str) -> Iterator[Callable[[int, int], None]]:
        def progress(done: int, total: int) -> None:
            if 2 * done > total:
                os.kill(os.getpid(), number)

        yield progress

    return working


@pytest.mark.parametrize("number", list(NUMBERS))
@pytest.mark.parametrize("verb", ["quantize", "synth"])
def test_a_stopped_writer_says_how_to_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(each) for each in NUMBERS]
    out = tmp_path / "m.godwit"
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "working", stopped_halfway(number))
        result = invoke(verb, model, out)
    assert (result.exit_code, result.stdout) == (NUMBERS[number], "")
    rest = f"run the same command again to continue from {out}.partial"
    assert f"{out} is not finished; {rest}" in result.stderr
    assert not out.exists() and "Traceback" not in result.stderr
    again = invoke(verb, model, out)
    assert again.exit_code == 0 and "tensors were already written" in again.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.godwit"]
    assert [signal.getsignal(each) for each in NUMBERS] == handlers


def test_sigterm_is_told_from_ctrl_c() -> None:
    with pytest.raises(Terminated, match="so and so"), tidy_stop("so and so"):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="so and so") as stop, tidy_stop("so and so"):
        raise KeyboardInterrupt
    assert not isinstance(stop.value, Terminated)


def test_a_reader_that_leaves_before_the_tables(model: Path) -> None:
    command = [sys.executable, "-c", MAIN, "inspect", str(model / "config.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("words", [["doctor", "--json"], ["--help"]])
def test_output_that_cannot_be_written(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("godwit: cannot write the output (No space left on device)")


def test_output_that_is_closed() -> None:
    script = f'"{sys.executable}" -c "{MAIN}" doctor >&-'
    done = subprocess.run(["sh", "-c", script], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
