"""Worker processes: what they are given, what ends them, and that they start again."""

from __future__ import annotations

import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import BusyError
from godwit.worker import Worker, WorkerLimits

SCRIPT = """
import os, sys, threading

def start(setup):
    if setup.get("broken"):
        raise RuntimeError
    def answer(value, *files):
        if value == "environment":
            return dict(os.environ)
        if value == "files":
            return [len(file) for file in files]
        if value == "stack":
            return threading.stack_size()
        if value == "count":
            setup["count"] += 1
            return setup["count"]
        return eval(value)
    return answer
"""
LIMITS = WorkerLimits(1 << 30)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def make(script: Path, limits: WorkerLimits = LIMITS, **setup: Any) -> Worker:
    setup = {"count": 0} | setup
    return Worker(script, setup, limits, purpose="tests workers", hint="check the test")


def test_the_environment_holds_no_secrets(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GODWIT_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "HOME"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    environment = make(script).ask("environment", 60)
    assert "secret" not in environment.values() and environment["TZ"] == "Asia/Tokyo"


def test_files_go_with_a_request(script: Path) -> None:
    assert make(script).ask("files", 60, [b"", b"\xff" * 100_000, b"\n"]) == [0, 100_000, 1]


@pytest.mark.parametrize(
    ("limits", "work"),
    [
        (LIMITS, "os._exit(0)"),
        (WorkerLimits(1 << 30, cpu_seconds=0.5), "[0 for _ in iter(int, 1)]"),
        (WorkerLimits(1 << 29), "os.abort()"),
    ],
)
def test_it_starts_again_after_it_has_ended(script: Path, limits: WorkerLimits, work: str) -> None:
    worker = make(script, limits)
    assert [worker.ask("count", 60) for _ in range(2)] == [1, 2]
    assert worker.ask(work, 600) is None and not worker.running
    assert worker.ask("count", 60) == 1


def test_a_deadline_ends_it(script: Path) -> None:
    worker = make(script)
    worker.start()
    assert worker.ask("threading.Event().wait()", 0.05) is None
    assert worker.ask("count", 60) == 1


def test_another_thread_can_end_it(script: Path) -> None:
    worker = make(script)
    worker.kill()  # nothing runs yet
    worker.start()
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(worker.ask("threading.Event().wait()", 600)))
    asking.start()
    while asking.is_alive():
        worker.kill()
        asking.join(0.01)
    assert answers == [None]


def test_exceptions_are_answers(script: Path) -> None:
    worker = make(script, WorkerLimits(1 << 29))
    assert worker.ask("1 / 0", 60) == {"error": "ZeroDivisionError: division by zero"}
    assert worker.ask("len(bytearray(1 << 30))", 60) == {"error": "it needs too much memory"}
    assert worker.ask("(lambda f: f(f))(lambda f: f(f))", 60) == {"error": "it is nested too deeply"}
    assert worker.ask("sys.exit('x' * 5000)", 60) == {"error": f"SystemExit: {'x' * 5000}"[:2000]}
    with pytest.raises(TypeError):
        worker.ask({1, 2}, 60)
    assert worker.ask("count", 60) == 1  # all in one process


def test_a_small_stack(script: Path) -> None:
    assert make(script).ask("stack", 60) == 0
    assert make(script, WorkerLimits(1 << 30, stack_bytes=512 << 10)).ask("stack", 60) == 512 << 10


def test_a_failed_start_is_said(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BusyError, match="process that tests workers ended at its start; check the test"):
        make(script, broken=True).ask("count", 60)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(BusyError, match="process that tests workers cannot be started"):
        make(script).start()


def test_a_copy_has_its_own_process(script: Path) -> None:
    worker = make(script)
    assert worker.ask("count", 60) == 1
    copy = pickle.loads(pickle.dumps(worker))
    assert copy.ask("count", 60) == 1 and worker.ask("count", 60) == 2
