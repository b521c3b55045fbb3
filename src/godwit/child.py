"""A Python process of ours that works for another: what may hang or eat all memory runs there."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO


class Child:
    """A script in a process of its own, talked to over its pipes; it can be ended and started again."""

    def __init__(self, script: Path) -> None:
        self._script = script
        self._owner = 0
        self._stop: Callable[[], object] = lambda: None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it can be asked. After a fork the pipe is the parent's: two must not talk over it."""
        return self.process is not None and self._owner == os.getpid() and self.process.poll() is None

    def start(self) -> None:
        """Start it anew. Raises OSError."""
        self.drop()
        pipe, silence = subprocess.PIPE, subprocess.DEVNULL
        command = [sys.executable, "-I", str(self._script)]
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=silence)
        self.process, self._owner = process, os.getpid()
        self._stop = weakref.finalize(self, _end, process, self._owner)

    def pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """Where requests go and where answers come from. Raises OSError where there is no process."""
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise OSError("there is no process")
        return self.process.stdin, self.process.stdout

    def drop(self) -> None:
        """End it. Needed too where an exchange was cut off: its answer would be taken for the next one's."""
        self._stop()
        self.process = None


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
