"""A program in a terminal, for tests of what only happens there."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time

CHILD = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from godwit.cli.main import main
main()
"""


class Console:
    """A program in a terminal of its own, typed to and read from."""

    def __init__(self, *args: str, **environment: str) -> None:
        ours, theirs = pty.openpty()
        self.fd = ours
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", **environment},
        )
        os.close(theirs)
        self.seen = ""
        self.all = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, text: str, seconds: float = 120) -> str:
        """Wait until `text` appears; what came before it since the last call."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} does not appear in {self.seen!r}"
            self._read()
        before, self.seen = self.seen.split(text, 1)
        return before

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until `text` appears: one in the moment before readline listens is not noticed."""
        for _ in range(60):
            self.type("\x03")
            end = time.monotonic() + 5
            while (
                text not in self.seen
                and select.select([self.fd], [], [], max(0.0, end - time.monotonic()))[0]
            ):
                self._read()
            if text in self.seen:
                break
        self.expect(text)

    def _read(self) -> None:
        try:
            new = os.read(self.fd, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            new = ""
        assert new, f"the program ended after {self.seen!r}"
        self.seen += new
        self.all += new

    def close(self) -> int:
        code = self.process.wait(60)
        os.close(self.fd)
        return code
