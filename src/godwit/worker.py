"""A Python process of ours that works for another: what may hang or eat all memory runs there."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO

#: Variables that a process may need to start and to write the time; no other, such as a key, is passed on.
_PASSED_ON = (
    "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TZ",
    "LANG", "LC_ALL", "LC_CTYPE", "LC_TIME",
)  # fmt: skip


def environment() -> dict[str, str]:
    """The environment of a child: strangers' programs in it have no use for the user's secrets."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def command(script: Path) -> list[str]:
    """How a script of ours is started, apart from the user's own Python packages."""
    return [sys.executable, "-I", str(script)]


def run_once(script: Path, data: bytes, seconds: float) -> bytes | None:
    """What a script writes to stdout, given ``data`` on stdin; None where it failed or took too long.

    Raises:
        OSError: it cannot be started.
    """
    try:
        done = subprocess.run(
            command(script), input=data, capture_output=True, timeout=seconds, env=environment(), check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None


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
        process = subprocess.Popen(
            command(self._script), stdin=pipe, stdout=pipe, stderr=silence, env=environment()
        )
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
