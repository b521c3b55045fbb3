from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from godwit.cli.main import app
from godwit.cli.serve import checked_hosts, shares, shown_name
from godwit.engine.engine import DEFAULT_SNAPSHOT_BYTES
from tests.cli.conftest import Models
from tests.engine.tiny import tiny_model

HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}


@contextmanager
def serving(*args: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of a server that runs."""
    code = "from godwit.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--threads", "1", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"at (http://\S+) ", line):
                    yield found[1], process
                    break
            else:
                raise AssertionError("it never served")
        finally:
            process.kill()


def test_a_server_from_its_start_to_its_end(models: Models, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-mine alice rpm=100 tpm=100000\n")
    arguments = (models("hello"), "--api-key-file", str(keys), "--name", "mine", "--memory", "0.05")
    with serving(*arguments, "--cache-dir", str(tmp_path / "cache"), "--context", "256") as (url, process):
        with httpx.Client(base_url=url, headers={"x-api-key": "a-key-of-mine"}, trust_env=False) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
            answer = client.post("/v1/chat/completions", json=HELLO | {"model": "mine"}).json()
            assert answer["choices"][0]["message"]["content"] == "Hello there."
            assert client.get("/v1/models", headers={"x-api-key": ""}).status_code == 401
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"POST /v1/chat/completions 200 .* key=alice prompt=\d+ cached=\d+ generated=3 ", log)
    assert re.search(r"shutting down \(SIGINT\): .* 0 answers in progress .*\n.* stopped\n", log)
    assert "Traceback" not in log and "a-key-of-mine" not in log


def test_sigterm_is_logged_and_ends_the_server(models: Models) -> None:
    arguments = ("--host", "0.0.0.0", "--allow-host", "llm.example", "--memory", "0.05")
    with serving(models("hello"), *arguments) as (url, process):
        url = url.replace("0.0.0.0", "127.0.0.1")
        for host, status in (("llm.example", 200), ("localhost", 200), ("evil.example", 403)):
            assert (
                httpx.get(f"{url}/v1/models", headers={"Host": host}, trust_env=False).status_code == status
            )
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, 143)
    assert "shutting down (SIGTERM)" in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("given", "kept"),
    [("llm.example.org", "llm.example.org"), ("*", "*"), ("::1", "[::1]"), ("[::1]", "[::1]")],
)
def test_hosts_as_clients_name_them(given: str, kept: str) -> None:
    assert checked_hosts([given]) == (kept,)


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, args)])


def test_what_is_wrong_is_said_at_once(models: Models, tmp_path: Path) -> None:
    for arguments, reason in (
        (("--api-key-file", tmp_path / "absent"), "cannot be read"),
        (("--host", "no.such.host.invalid"), "give another --host"),
        (("--host", "192.0.2.1"), "use another --host"),
        (("--cors-origin", "example.org"), "is not an origin"),
        (("--cors-origin", "https://example.org/path"), "is not an origin"),
        (("--host", "0.0.0.0"), "--allow-host"),
        (("--allow-host", "http://llm.example"), "is not a host name"),
        (("--context", 10**9), "at most 4096 tokens"),
        (("--memory", 0), "allow more memory"),
    ):
        result = invoke(models("hello"), "--port", 0, *arguments)
        assert result.exit_code != 0
        lines = [line for line in result.stderr.splitlines() if "are packed as bf16" not in line]
        assert len(lines) == 1 and reason in lines[0], result.stderr


def test_without_its_packages_serving_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("godwit.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = invoke()
    assert result.exit_code == 2 and "godwit-llm[serve]" in result.stderr


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("built-in", "godwit"),
        ("org/Model-1", "Model-1"),
        ("/a/b/m.godwit", "m"),
        ("dir/", "dir"),
        ("/", "godwit"),
    ],
)
def test_a_name_for_clients(name: str, shown: str) -> None:
    assert shown_name(name) == shown


def test_memory_is_shared_by_what_runs_and_what_is_remembered() -> None:
    gib = 1 << 30
    assert shares(tiny_model("hybrid"), 1.0) == (3 * gib // 4, gib // 4)
    assert shares(tiny_model("hybrid"), 8.0) == (7 * gib, gib)
    assert shares(tiny_model("attention"), 1.0) == (gib, DEFAULT_SNAPSHOT_BYTES)
    budget, snapshots = shares(tiny_model("hybrid"), None)
    assert budget is None or budget > 2 * snapshots
