"""A limited child process: work that may hang, crash or use up all memory runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from godwit.errors import BusyError
from godwit.worker_child import read_frame, write_frame

#: The time a process has to start, on any machine.
START_SECONDS = 60.0
#: Variables that a process may need to start and to tell the time; others, such as keys, are not passed on.
_PASSED_ON = (
    "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TZ",
    "LANG", "LC_ALL", "LC_CTYPE", "LC_TIME",
)  # fmt: skip


@dataclass(frozen=True)
class WorkerLimits:
    """What a worker may use after its start.

    Attributes:
        memory_bytes: address space.
        cpu_seconds: processor time in all; None: no limit.
        stack_bytes: of the thread that answers; None: the default.
    """

    memory_bytes: int
    cpu_seconds: float | None = None
    stack_bytes: int | None = None


class Worker:
    """A child process that answers requests. It starts when needed, and again after a limit has ended it.

    It can be asked from several threads, one after the other. After a fork, the copy starts its own process.

    Args:
        script: a file that defines ``start(setup)``; see :mod:`godwit.worker_child`.
        setup: for the script, plain JSON.
        limits: what the process may use.
        purpose: what it does, for errors: "renders chat templates".
        hint: what to check if it ends at its start.
    """

    def __init__(
        self, script: Path, setup: Mapping[str, Any], limits: WorkerLimits, *, purpose: str, hint: str
    ) -> None:
        self._script, self._setup, self._limits = script, dict(setup), limits
        self._purpose, self._hint = purpose, hint
        self._lock = threading.Lock()
        self._owner = 0
        self._stop: Callable[[], object] = lambda: None
        self.process: subprocess.Popen[bytes] | None = None

    def __reduce__(self) -> tuple[Callable[..., Worker], tuple[Any, ...]]:
        make = partial(Worker, purpose=self._purpose, hint=self._hint)
        return make, (self._script, self._setup, self._limits)

    @property
    def running(self) -> bool:
        """Whether it can be asked. After a fork the pipes are the parent's: two must not use them."""
        return self.process is not None and self._owner == os.getpid() and self.process.poll() is None

    def start(self) -> None:
        """Start the process unless it runs.

        Raises:
            BusyError: it cannot be started, or ended at its start.
        """
        if self.running:
            return
        self.drop()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("worker_child.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            )
        except OSError as error:
            raise BusyError(f"the process that {self._purpose} cannot be started: {error}") from None
        self.process, self._owner = process, os.getpid()
        self._stop = weakref.finalize(self, _end, process, self._owner)
        begin = {"sys_path": sys.path, "script": str(self._script), "setup": self._setup}
        if self._exchange(begin | asdict(self._limits), (), START_SECONDS) is None:
            raise BusyError(f"the process that {self._purpose} ended at its start; {self._hint}")

    def ask(self, value: Any, seconds: float, files: Iterable[bytes] = ()) -> Any:
        """The answer to a request: ``{"error": ...}`` if the script raised an exception.

        Args:
            value: plain JSON.
            seconds: after that time the process is killed.
            files: raw bytes that go with the request.

        Returns:
            None if the process has exceeded a limit, crashed or was killed.

        Raises:
            BusyError: as :meth:`start`.
            TypeError, ValueError, RecursionError: ``value`` is not plain JSON.
        """
        files = list(files)
        with self._lock:
            self.start()
            return self._exchange({"value": value, "num_files": len(files)}, files, seconds)

    def _exchange(self, request: Mapping[str, Any], files: Iterable[bytes], seconds: float) -> Any:
        body, process, answer = json.dumps(request).encode(), self.process, None
        if process is None or process.stdin is None or process.stdout is None:
            return None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            for frame in (body, *files):
                write_frame(process.stdin, frame)
            answer = json.loads(read_frame(process.stdout))
        except (EOFError, OSError, ValueError):
            return None
        finally:
            timer.cancel()
            if answer is None:  # the next request must not get the answer to this one
                self.drop()
        return answer

    def kill(self) -> None:
        """End a request in progress, from any thread: its answer is None."""
        if (process := self.process) is not None:
            process.kill()

    def drop(self) -> None:
        """End the process."""
        self._stop()
        self.process = None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        process.returncode = 0  # the process belongs to the parent of this fork
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # buffered data has no reader any more
                continue
