"""Grammars are tried out in other processes first, so that a costly one is refused in bounded time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from godwit.errors import UsageError

#: A process is given this long to start, on whatever machine.
START_SECONDS = 60.0


class Trials:
    """Processes that compile grammars on trial. For several threads, each of which waits for its answer.

    Args:
        setup: see :mod:`godwit.engine.constraint_worker`.
        seconds: for one trial; then the process is ended and another one started.
        num_workers: processes, so many trials at a time.
    """

    def __init__(self, setup: Mapping[str, Any], seconds: float, num_workers: int) -> None:
        self.seconds = seconds
        # the last one used comes first, so that others are started only where they are needed
        self._free: queue.Queue[_Worker] = queue.LifoQueue()
        for _ in range(num_workers):
            self._free.put(_Worker(setup))

    def ask(self, request: Mapping[str, str]) -> dict[str, str]:
        """The answer of a process.

        Raises:
            UsageError: it took too much time or memory, or all processes are busy.
        """
        try:
            worker = self._free.get(timeout=2 * self.seconds)
        except queue.Empty:
            raise UsageError("too many grammars are being compiled; send the request again later") from None
        try:
            answer = worker.ask(request, self.seconds)
        finally:
            self._free.put(worker)
        if answer is None:
            raise UsageError(
                f"the form takes more than {self.seconds:g} seconds or too much memory; simplify it"
            )
        return answer


class _Worker:
    """One process, started when it is needed, and again after a limit has ended it."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._stop: Callable[[], object] = lambda: None

    def ask(self, request: Mapping[str, str], seconds: float) -> dict[str, str] | None:
        # After a fork the pipe belongs to the parent: two processes must not talk over it.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._start()
        return self._exchange(request, seconds)

    def _start(self) -> None:
        self._stop()
        script = Path(__file__).with_name("constraint_worker.py")
        pipe, silence = subprocess.PIPE, subprocess.DEVNULL
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(script)], stdin=pipe, stdout=pipe, stderr=silence
            )
        except OSError as error:
            raise UsageError(f"the process that compiles grammars cannot be started: {error}") from None
        self._process, self._owner = process, os.getpid()
        self._stop = weakref.finalize(self, _end, process, self._owner)
        if self._exchange({**self._setup, "sys_path": sys.path}, START_SECONDS) is None:
            raise UsageError("the process that compiles grammars ended at its start; check its memory limit")

    def _exchange(self, value: Mapping[str, Any], seconds: float) -> dict[str, str] | None:
        """The answer, or None where the process has ended or had to be."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        answer = None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return None
        finally:
            timer.cancel()
            # Interrupted half-way (also by Ctrl-C), the pipe would hand this answer to the next request.
            if answer is None:
                self._stop()
                self._process = None
        return dict(answer)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        process.returncode = 0  # a fork has no say over its parent's processes
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was still buffered has no reader any more
                continue
