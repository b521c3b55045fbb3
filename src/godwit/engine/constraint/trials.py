"""Grammars are tried in other processes first, so that a costly one is refused in bounded time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from godwit.errors import BusyError, UsageError
from godwit.worker import Worker, WorkerLimits

#: The smallest stack of any thread that compiles the grammar later; what would overflow it ends the worker.
STACK_BYTES = 512 << 10


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
        memory_bytes: for each process.
        seconds: limit for one trial; then its process is ended and later replaced.
        num_workers: number of processes, and so of trials at a time.
    """

    def __init__(self, setup: Mapping[str, Any], memory_bytes: int, seconds: float, num_workers: int) -> None:
        self.seconds = seconds
        # the last one used comes first, so that others are started only where they are needed
        self._free: queue.Queue[Worker] = queue.LifoQueue()
        for _ in range(num_workers):
            worker = Worker(
                Path(__file__).with_name("worker.py"),
                setup,
                WorkerLimits(memory_bytes, stack_bytes=STACK_BYTES),
                purpose="compiles grammars",
                hint="check its memory limit",
            )
            self._free.put(worker)

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
            worker.start()
            with abandon.calling(worker.kill):
                answer: dict[str, str] | None = worker.ask(request, self.seconds)
        finally:
            self._free.put(worker)
        if answer is None and abandon.given_up:
            raise BusyError("the request was given up")
        if answer is None:
            raise UsageError(
                f"the grammar takes more than {self.seconds:g} seconds or too much memory; simplify it"
            )
        return answer
