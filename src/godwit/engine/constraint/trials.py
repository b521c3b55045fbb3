"""Grammars are tried in other processes first, so that a costly one is refused in bounded time."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from godwit.child import Child
from godwit.errors import BusyError, UsageError

#: Time for a process to start, even on a slow machine.
START_SECONDS = 60.0


class Abandon:
    """Lets one thread end a trial that another one waits for, since its result is not wanted any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: Callable[[], object] | None = None
        self.given_up = False

    def give_up(self) -> None:
        """End the trial under way; no other one begins."""
        with self._lock:
            self.given_up = True
            if self._end is not None:
                self._end()

    @contextmanager
    def calling(self, end: Callable[[], object]) -> Iterator[None]:
        """Within this, :meth:`give_up` calls ``end``.

        Raises:
            BusyError: it was given up before.
        """
        with self._lock:
            if self.given_up:
                raise BusyError("the request was given up")
            self._end = end
        try:
            yield
        finally:
            with self._lock:
                self._end = None


class Trials:
    """Processes that try grammars. Thread-safe; each call waits for its answer.

    Args:
        setup: see :mod:`godwit.engine.constraint.worker`.
        seconds: limit for one trial; then its process is ended and later replaced.
        num_workers: number of processes, and so of trials at a time.
    """

    def __init__(self, setup: Mapping[str, Any], seconds: float, num_workers: int) -> None:
        self.seconds = seconds
        # the last one used comes first, so that others are started only if needed
        self._free: queue.Queue[GrammarWorker] = queue.LifoQueue()
        for _ in range(num_workers):
            self._free.put(GrammarWorker(setup))

    def ask(self, request: Mapping[str, Any], abandon: Abandon | None = None) -> dict[str, str]:
        """The answer of a process.

        Raises:
            UsageError: it took too much time or memory.
            BusyError: all processes are busy, or none can be started, or the request was abandoned.
        """
        abandon = abandon or Abandon()
        try:
            worker = self._free.get(timeout=2 * self.seconds)
        except queue.Empty:
            raise BusyError("too many grammars are being compiled; send the request again later") from None
        try:
            answer = worker.ask(request, self.seconds, abandon)
        finally:
            self._free.put(worker)
        if answer is None and abandon.given_up:
            raise BusyError("the request was given up")
        if answer is None:
            raise UsageError(
                f"the grammar takes more than {self.seconds:g} seconds or too much memory; simplify it"
            )
        return answer


class GrammarWorker:
    """One process, started when needed, and again after a limit has ended it."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._setup = setup
        self.child = Child(Path(__file__).with_name("worker.py"))

    def ask(self, request: Mapping[str, Any], seconds: float, abandon: Abandon) -> dict[str, str] | None:
        if not self.child.running:
            self._start()
        with abandon.calling(self._kill):
            return self._exchange(request, seconds)

    def _kill(self) -> None:
        if (process := self.child.process) is not None:
            process.kill()

    def _start(self) -> None:
        try:
            self.child.start()
        except OSError as error:
            raise BusyError(f"the process that compiles grammars cannot be started: {error}") from None
        if self._exchange({**self._setup, "sys_path": sys.path}, START_SECONDS) is None:
            raise UsageError("the process that compiles grammars ended at its start; check its memory limit")

    def _exchange(self, value: Mapping[str, Any], seconds: float) -> dict[str, str] | None:
        """The answer, or None if the process has ended or was ended."""
        process = self.child.process
        if process is None:
            return None
        answer = None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            requests, answers = self.child.pipes()
            requests.write(json.dumps(value).encode() + b"\n")
            requests.flush()
            answer = json.loads(answers.readline())
        except (OSError, ValueError):
            return None
        finally:
            timer.cancel()
            if answer is None:
                self.child.drop()
        return dict(answer)
