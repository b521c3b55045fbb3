"""A server's life: clients that go, engines that fail, silence, the end."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from godwit.engine import Engine
from godwit.server.host import MAX_FAILURES, RETRY_SECONDS
from tests.server.conftest import Engines, Running, Servers, running

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return not stats.num_running and not stats.num_waiting and stats.free_rows == stats.num_rows


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"])
def test_a_client_that_leaves_a_stream_frees_its_memory(engines: Engines, path: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        CHAT: HELLO | {"n": 2},
        "/v1/completions": {"prompt": "\n", "max_tokens": 900},
        "/v1/messages": HELLO | {"model": "m", "max_tokens": 900},
        "/v1/responses": {"input": "Hello!"},
    }
    with running(engines("endless"), names=("m",)) as server, server.client() as client:
        with client.stream("POST", path, json=bodies[path] | {"stream": True}) as response:
            lines = response.iter_lines()
            while "la" not in next(lines):
                pass
            assert server.engine.stats().num_running
        wait(lambda: idle(server.engine))
        server.engine.check_integrity()


def test_a_client_that_leaves_while_it_waits_frees_its_memory(engines: Engines, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "godwit.server")
    with running(engines("endless", max_context=4096)) as server:
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0)) as client:
            body = b'{"messages": [{"role": "user", "content": "Hello!"}]}'
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait(lambda: server.engine.stats().num_running == 1)
        wait(lambda: idle(server.engine))
        wait(lambda: any(" 499 " in m and "finish=cancelled" in m for m in caplog.messages))


def test_a_silent_stream_says_that_it_is_there(engines: Engines) -> None:
    with running(engines("hello"), keep_alive=0.05, names=("m",)) as server, server.client() as client:
        seen: dict[str, str] = {}
        body: dict[str, dict[str, Any]] = {
            CHAT: HELLO,
            "/v1/messages": HELLO | {"model": "m", "max_tokens": 5},
        }
        for path in body:
            held = threading.Event()
            run, stop = server.engine.core.turn, held.wait
            server.engine.core.turn = lambda stop=stop, run=run: (stop(5), run())[1]  # type: ignore[method-assign,misc]
            with client.stream("POST", path, json=body[path] | {"stream": True}) as response:
                text = ""
                for line in response.iter_lines():
                    text += line + "\n"
                    if text.count(": keep-alive") >= 2 or text.count("event: ping") >= 3:
                        held.set()
            server.engine.core.turn = run  # type: ignore[method-assign]
            seen[path] = text
    assert "Hello" in seen[CHAT] and seen[CHAT].endswith("data: [DONE]\n\n")
    assert "Hello" in seen["/v1/messages"] and "message_stop" in seen["/v1/messages"]


def test_a_step_that_fails_is_told_and_the_next_request_is_served(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(engines("hello"), names=("m",)) as server, server.client() as client:

        def fail(*args: Any) -> Any:
            raise RuntimeError("a fault at /some/where/0xdeadbeef")

        messages = HELLO | {"model": "m", "max_tokens": 5}
        monkeypatch.setattr(server.engine.core.runner, "run", fail)
        whole = client.post(CHAT, json=HELLO)
        streamed = client.post(CHAT, json=HELLO | {"stream": True}).text
        told = client.post("/v1/messages", json=messages | {"stream": True}).text
        failed = client.post("/v1/responses", json={"input": "Hello!", "stream": True}).text
        monkeypatch.undo()
        assert whole.status_code == 500 and "/some" not in whole.text
        assert '"error":' in streamed and "[DONE]" not in streamed and "deadbeef" not in streamed
        assert "event: error\ndata: {" in told and '"api_error"' in told
        assert "event: response.failed\ndata: {" in failed
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert client.get("/ready").status_code == 200


def test_an_engine_that_ends_is_replaced(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit.server.host._WATCH_SECONDS", 0.02)
    with running(engines("hello")) as server, server.client() as client:
        other = engines("hello")
        server.service.host._make = lambda: other
        server.engine.close()
        wait(lambda: server.service.host.engine is other)
        assert client.post(CHAT, json=HELLO).json()["choices"][0]["message"]["content"] == "Hello there."
        assert "godwit_engine_restarts_total 1.0" in client.get("/metrics").text
        other.close()


def test_failing_steps_make_the_server_unready_until_one_succeeds(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(engines("hello")) as server, server.client() as client:

        def fail(*args: Any) -> Any:
            raise RuntimeError("a fault at /some/where")

        def fail_steps(count: int) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(server.engine.core.runner, "run", fail)
                assert {client.post(CHAT, json=HELLO).status_code for _ in range(count)} == {500}

        now = 0.0
        monkeypatch.setattr(server.service.host, "_clock", lambda: now)
        fail_steps(MAX_FAILURES - 1)
        assert client.get("/ready").status_code == 200
        fail_steps(1)
        answer = client.get("/ready")
        assert answer.status_code == 503 and client.get("/health").status_code == 200
        assert answer.json()["status"] == "not ready" and "3 steps" in answer.json()["reason"]
        assert "/some" not in answer.text
        assert client.post(CHAT, json=HELLO).status_code == 200  # requests are still tried
        assert client.get("/ready").json() == {"status": "ready"}
        fail_steps(MAX_FAILURES)
        assert client.get("/ready").status_code == 503
        now = RETRY_SECONDS  # without requests, no step could succeed: try again
        assert client.get("/ready").status_code == 200
        fail_steps(1)
        assert client.get("/ready").status_code == 503


def end(server: Running) -> None:
    server.server.should_exit = True


def test_the_end_waits_for_answers_under_way(engines: Engines) -> None:
    with running(engines("endless", max_context=256)) as server, server.client() as client:
        with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            end(server)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert any('"finish_reason":"length"' in line for line in rest)
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert not server.engine.health.alive


def test_the_end_does_not_wait_for_ever(engines: Engines) -> None:
    with (
        running(engines("endless", max_context=4096), drain_seconds=0.2) as server,
        server.client() as client,
    ):
        with client.stream("POST", CHAT, json=HELLO | {"stream": True, "max_tokens": 4000}) as response:
            lines = response.iter_lines()
            next(lines)
            end(server)
            rest = list(lines)
        assert any("shutting down" in line for line in rest)
        assert "data: [DONE]" not in rest
        server.thread.join(20)
        assert server.service.host.engine is None


def test_what_begins_during_the_end_is_refused(engines: Engines) -> None:
    with running(engines("hello")) as server, server.client() as client:
        server.service.draining = True
        unready = client.get("/ready")
        assert unready.status_code == 503 and unready.json()["reason"] == "the server is shutting down"
        assert client.get("/health").status_code == 200
        assert client.post(CHAT, json=HELLO).status_code == 503
        overloaded = client.post("/v1/messages", json=HELLO | {"model": "godwit", "max_tokens": 5})
        assert (overloaded.status_code, overloaded.json()["error"]["type"]) == (529, "overloaded_error")


def test_the_line_and_the_numbers_of_a_request(servers: Servers, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "godwit.server")
    server = servers("hello")
    with server.client() as client:
        response = client.post(CHAT, json=HELLO)
        client.post("/v1/models/%1b[31m%0a")
        client.get("/health")
        numbers = client.get("/metrics").text
    wait(lambda: len(caplog.messages) >= 2)
    line = next(message for message in caplog.messages if response.headers["x-request-id"] in message)
    usage = response.json()["usage"]
    assert f" POST {CHAT} 200 " in line
    assert f"prompt={usage['prompt_tokens']} cached=" in line
    assert f"generated={usage['completion_tokens']} ttft=0." in line
    assert re.search(r" drafted=\d+ accepted=\d+ finish=stop", line)  # a try of drafts may fall into it
    assert not any(
        "\x1b" in message or "\n" in message or "/health" in message for message in caplog.messages
    )
    assert f'godwit_requests_total{{route="{CHAT}",status="200"}}' in numbers
    assert "godwit_completion_tokens_total" in numbers and "godwit_engine_num_running 0.0" in numbers


def test_a_server_trusts_no_proxy_and_says_nothing_of_itself(servers: Servers) -> None:
    config = servers("hello").server.config
    assert not config.proxy_headers and not config.server_header
