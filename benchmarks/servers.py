"""Start, monitor and stop servers in separate processes."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plain_http import request

START_SECONDS, IDLE_SECONDS = 180.0, 60.0
PAGE = 4096


@dataclass
class ServerProcess:
    """A running server."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def processes(self) -> list[int]:
        """Its process and that process's children."""
        found, waiting = [], [self.process.pid]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                waiting += map(int, children.read_text().split())
        return found

    def memory(self) -> int:
        """Resident bytes of its main process."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * PAGE

    def cpu_seconds(self) -> float:
        total = 0
        for pid in self.processes():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / 100

    def settle(self) -> None:
        """Wait until it is idle.

        Raises:
            RuntimeError: it does not become idle in time.
        """
        end = time.monotonic() + IDLE_SECONDS
        while time.monotonic() < end:
            before = self.cpu_seconds()
            time.sleep(0.5)
            if self.cpu_seconds() - before < 0.04:
                return
        raise RuntimeError(f"{self.name} does not become idle")


@contextmanager
def serving(name: str, command: Sequence[str], log: Path, url: str | None = None) -> Iterator[ServerProcess]:
    """Start a server and wait until it is ready; stop it at the end of the block.

    Args:
        name: its name in messages.
        command: the command that starts it.
        log: the file for its output.
        url: its URL; None: read it from the log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_SECONDS
        server = ServerProcess(name, url or "", process, log)
        while not asyncio.run(_serves(server)):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _serves(server: ServerProcess) -> bool:
    if not server.url:
        found = re.search(r" at (http://\S+) ", server.log.read_text())
        server.url = found[1] if found else ""
    if not server.url:
        return False
    try:
        async with request(server.url, "/v1/models", method="GET") as reply:
            return reply.status == 200
    except (OSError, EOFError):
        return False


def godwit_command(*more: str) -> list[str]:
    """The command that starts `godwit serve` from this checkout."""
    code = "import sys; sys.argv[0] = 'godwit'; from godwit.cli.main import main; main()"
    return [sys.executable, "-c", code, "serve", "--port", "0", *more]
