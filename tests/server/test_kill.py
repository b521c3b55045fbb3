"""A server that is killed at any moment: the next one serves, and what it remembers is right."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from godwit.engine.cache.disk_file import read_segment
from godwit.engine.cache.disk_folder import open_folder
from tests.engine.tiny import write_random_model

CHAT = "/v1/chat/completions"
#: Long enough for its beginning to be worth a file of its own.
ANCHOR = "Once upon a time there was a bird. " * 12


@dataclass
class Served:
    """A server in a process of its own."""

    client: httpx.Client
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, text: str, **fields: Any) -> tuple[str, int]:
        """The answer to a text and how many of its tokens were reused."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24, **fields}
        answer = self.client.post(CHAT, json=body).raise_for_status().json()
        cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["message"]["content"], cached

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "random")


Start = Callable[..., Served]


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts servers with the same cache directory."""
    started: list[Served] = []

    def begin(*more: str) -> Served:
        log = tmp_path / f"log-{len(started)}"
        code = "from godwit.cli.main import main; main()"
        options = ("--port", "0", "--threads", "1", "--memory", "0.05", "--context", "1024", "--self-check")
        command = [sys.executable, "-c", code, "serve", str(model), *options]
        with log.open("wb") as output:
            process = subprocess.Popen([*command, "--cache-dir", str(tmp_path / "cache")], stderr=output)
        client = httpx.Client(base_url=address(process, log), trust_env=False, timeout=120)
        started.append(Served(client, process, log))
        return started[-1]

    yield begin
    for served in started:
        served.client.close()
        served.kill()


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where a server serves, once it does."""
    while process.poll() is None:
        if found := re.search(r" at (http://\S+) ", log.read_text()):
            return found[1]
        time.sleep(0.02)
    raise AssertionError(log.read_text())


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("cache/*/*.kv"))


@contextmanager
def busy(served: Served, seed: int) -> Iterator[threading.Event]:
    """Three clients that ask for one answer after the other; the event: something was answered."""
    answered, over = threading.Event(), threading.Event()

    def go_on(number: int) -> None:
        rng = random.Random(100 * seed + number)
        while not over.is_set():
            try:
                served.ask(f"{rng.random()} " * rng.randint(1, 40))
                answered.set()
            except httpx.HTTPError:
                return

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_after_a_kill_at_any_moment_the_next_server_serves_and_reuses(start: Start, tmp_path: Path) -> None:
    rng = random.Random(7)
    served = start()
    right, _ = served.ask(ANCHOR)
    wait(lambda: bool(files(tmp_path)))
    for seed in range(3):
        with busy(served, seed) as answered:
            assert answered.wait(60)
            time.sleep(rng.uniform(0, 0.4))  # the moment is left to chance
            served.kill()
        for path in files(tmp_path):  # whole ones only: they get their names when they are written
            read_segment(path, open_folder(path.parent.parent, path.parent.name))
        served = start()
        answer, cached = served.ask(ANCHOR)
        assert answer == right and cached > len(ANCHOR) // 2
    log = served.log.read_text()
    assert "damaged" not in log and "Traceback" not in log


def test_damaged_files_are_dropped_and_the_answers_stay_right(start: Start, tmp_path: Path) -> None:
    served = start()
    texts = [f"{number} {ANCHOR}" for number in range(3)]
    right = [served.ask(text)[0] for text in texts]
    wait(lambda: len(files(tmp_path)) >= 6)
    served.process.terminate()  # ends in good order: all that waits is written
    served.process.wait()
    rng = random.Random(3)
    for number, path in enumerate(files(tmp_path)):
        content = path.read_bytes()
        place = rng.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        path.write_bytes((content[:place], flipped, content)[number % 3])
    served = start()
    again = [served.ask(text)[0] for text in texts]
    assert again == right
    log = served.log.read_text()
    assert log.count("dropping a damaged cache file") >= 2 and "Traceback" not in log
    assert [served.ask(text)[0] for text in texts] == right


def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)
