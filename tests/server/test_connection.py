"""Connections that stall, flood or break the rules, over raw sockets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from godwit.server.connections.places import Places
from godwit.server.connections.protocol import SLICE_BYTES, LimitedProtocol, Parser
from godwit.server.limits import Limits
from tests.server.conftest import Engines, Running, running
from tests.server.test_life import wait

CHAT = "/v1/chat/completions"
KEY = "first-key-12345"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HELLO = json.dumps({"messages": [{"role": "user", "content": "Hello!"}]}).encode()


def head(*more: str, method: str = "POST", path: str = CHAT) -> bytes:
    """Of a request with a body of JSON."""
    lines = (f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more)
    return "\r\n".join((*lines, "", "")).encode()


@contextmanager
def connected(server: Running, receive_bytes: int = 0) -> Iterator[socket.socket]:
    """A connection to a server."""
    with socket.socket() as client:
        client.settimeout(20)
        if receive_bytes:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.connect(("127.0.0.1", httpx.URL(server.url).port or 0))
        yield client


def head_of_response(client: socket.socket) -> tuple[int, dict[str, str]]:
    """Status and headers."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(1)
    first, *lines = data.decode().split("\r\n")[:-2]
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines)


def response(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a response that has a length."""
    status, headers = head_of_response(client)
    body = b""
    while len(body) < int(headers.get("content-length", 0)):
        body += client.recv(int(headers["content-length"]) - len(body))
    return status, headers, body


def is_ended(client: socket.socket) -> bool:
    """Wait until the server has ended a connection."""
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def places(server: Running) -> Places:
    protocol = server.server.config.http
    assert isinstance(protocol, type) and issubclass(protocol, LimitedProtocol)
    return protocol.places


@pytest.fixture(scope="module")
def small(engines: Engines) -> Iterator[Running]:
    """A server with a key and small limits."""
    limits = Limits(body_bytes=20_000, head_seconds=0.3, idle_seconds=0.6, write_seconds=0.3)
    with running(engines("hello"), keys=(KEY,), limits=limits) as server:
        yield server


@pytest.fixture(scope="module")
def few(engines: Engines) -> Iterator[Running]:
    """A server with default timeouts and few connections."""
    with running(engines("endless", max_context=4096), limits=Limits(connections=3)) as server:
        yield server


def test_what_comes_after_a_refusal_is_not_parsed(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    monkeypatch.setattr(Parser, "_count", lambda self, data: parsed.append(data))
    with connected(small) as client:
        client.sendall(head("Transfer-Encoding: chunked"))
        status, headers, _ = response(client)
        assert status == 401 and headers["connection"] == "close"
        with pytest.raises(ConnectionError):
            for _ in range(100_000):  # until the server has had enough
                client.sendall(b"1\r\na\r\n")
        assert is_ended(client)
    assert parsed == []


def test_one_letter_after_an_answer_holds_no_place(small: Running) -> None:
    with connected(small) as client, connected(small) as other:
        for each in (client, other):
            each.sendall(GET)
            assert response(each)[0] == 200
            each.sendall(b"G")
        assert is_ended(client) and is_ended(other)
    wait(lambda: len(places(small)) == 0)


def test_silent_connections_give_their_places_to_others(few: Running) -> None:
    with connected(few) as first, connected(few) as second, connected(few) as third:
        for silent in (first, second, third):
            silent.sendall(GET)
            assert response(silent)[0] == 200
            silent.sendall(b"G")
        wait(lambda: len(places(few)) == 3)
        with few.client() as client:
            assert client.get("/health").status_code == 200
        assert is_ended(first)


def test_a_full_server_says_so(few: Running) -> None:
    body = json.dumps(json.loads(HELLO) | {"stream": True, "max_tokens": 4000}).encode()
    with connected(few) as one, connected(few) as two, connected(few) as three:
        for busy in (one, two, three):
            busy.sendall(head(f"Content-Length: {len(body)}") + body)
            assert busy.recv(12) == b"HTTP/1.1 200"
        with few.client() as client:
            refused = client.get("/v1/models")
            overloaded = client.post("/v1/messages", json={})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
    assert overloaded.status_code == 529 and overloaded.json()["error"]["type"] == "overloaded_error"
    for told in (refused, overloaded):
        assert told.headers["retry-after"] and told.headers["x-request-id"]
        assert told.headers["connection"] == "close"
    wait(lambda: len(places(few)) == 0)


def test_who_never_reads_is_disconnected(small: Running) -> None:
    with connected(small, receive_bytes=4096) as client:
        client.sendall(head(method="GET", path="/") * 300)  # far more than the systems' buffers hold
        wait(lambda: len(places(small)) == 0)


def test_a_large_head_is_refused_also_in_one_piece(small: Running) -> None:
    for size, status in ((15_000, 200), (17_000, 431), (100_000, 431)):
        with connected(small) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * size + b"\r\n\r\n")
            told, headers, _ = response(client)
            assert told == status and headers["x-request-id"]
            assert status == 200 or is_ended(client)


@pytest.mark.parametrize(
    "lines",
    [
        b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        b"POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5",
        b"POST /v1/x HTTP/1.0\r\nTransfer-Encoding: chunked",
        b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6",
        b"POST /v1/x HTTP/1.1\r\nHost: a\r\nHost: b",
        b"POST /v1/x HTTP/1.1",
        b"POST /v1/x HTTP/1.1\r\nHost : a",
        b"\x16\x03\x01\x02\x00",
    ],
)
def test_contradicting_or_broken_heads_are_refused(small: Running, lines: bytes) -> None:
    with connected(small) as client:
        client.sendall(lines + b"\r\n\r\n0\r\n\r\n" + GET)
        status, headers, body = response(client)
        assert status == 400 and json.loads(body)["error"]["message"]
        assert headers["connection"] == "close" and headers["x-request-id"]
        assert is_ended(client)


def test_chunks_count_more_than_their_bytes(small: Running) -> None:
    for count, status in ((200, 400), (400, 413)):
        with connected(small) as client:
            client.sendall(head(f"x-api-key: {KEY}", "Transfer-Encoding: chunked"))
            client.sendall(b"1\r\n{\r\n" * count + b"0\r\n\r\n")
            told, headers, body = response(client)
            assert told == status and headers["x-request-id"] and json.loads(body)["error"]


def test_many_chunks_are_taken_slice_by_slice(few: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no one connection keeps the event loop for long."""
    sizes: list[int] = []
    receive = Parser.receive_data

    def counted(self: Parser, data: bytes) -> None:
        sizes.append(len(data))
        receive(self, data)

    monkeypatch.setattr(Parser, "receive_data", counted)
    text = json.dumps({"prompt": "a" * 5000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % letter for letter in text) + b"0\r\n\r\n"
    with connected(few) as client:
        client.sendall(head("Transfer-Encoding: chunked", path="/tokenize") + chunks)
        status, _, body = response(client)
        assert status == 200 and json.loads(body)["count"] > 0
        client.sendall(GET)
        assert response(client)[0] == 200
    assert max(sizes) <= SLICE_BYTES and len(sizes) > 3


def test_requests_may_follow_each_other_at_once(few: Running) -> None:
    body = b'{"prompt": "' + b"a" * 100_000 + b'"}'
    large = head(f"Content-Length: {len(body)}", path="/tokenize") + body
    with connected(few) as client:
        client.sendall(GET + large + GET + head(method="HEAD", path="/health") + GET[:10])
        assert [response(client)[0] for _ in range(3)] == [200, 400, 200]
        status, headers = head_of_response(client)
        assert status == 200 and headers["content-length"] != "0"
        client.sendall(GET[10:] + head(method="OPTIONS"))
        assert [response(client)[0] for _ in range(2)] == [200, 405]


def test_a_client_that_asks_first_is_told_to_go_on(small: Running) -> None:
    asking = ("Expect: 100-continue", f"Content-Length: {len(HELLO)}")
    with connected(small) as client:
        client.sendall(head(f"x-api-key: {KEY}", *asking))
        assert head_of_response(client)[0] == 100
        client.sendall(HELLO)
        assert response(client)[0] == 200
    with connected(small) as client:
        client.sendall(head(*asking))
        status, headers, _ = response(client)
        assert status == 401 and headers["connection"] == "close" and is_ended(client)


@pytest.mark.parametrize("more", [("Content-Type: text/plain",), ("Content-Length: 10000000",)])
def test_a_response_before_its_body_ends_the_connection(few: Running, more: tuple[str, ...]) -> None:
    lines = (f"POST {CHAT} HTTP/1.1", "Host: localhost", *more)
    lines += () if "Length" in more[0] else ("Content-Length: 100",)
    lines += () if "Type" in more[0] else ("Content-Type: application/json",)
    with connected(few) as client:
        client.sendall("\r\n".join((*lines, "", "")).encode())
        status, headers, _ = response(client)
        assert status in (413, 415) and headers["connection"] == "close"
        client.sendall(b"x" * 1000)
        assert is_ended(client)


def test_a_half_closed_connection_is_over(few: Running) -> None:
    for sent in (b"", b"G", head("Content-Length: 100") + b"{", GET):
        with connected(few) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert is_ended(client)
    wait(lambda: len(places(few)) == 0)


def test_an_idle_connection_is_used_again_and_then_let_go(small: Running) -> None:
    with connected(small) as client:
        for _ in range(3):
            client.sendall(GET)
            assert response(client)[0] == 200
        assert is_ended(client)


def test_a_server_says_that_it_ends(engines: Engines, caplog: Any) -> None:
    caplog.set_level("INFO", "godwit.server")
    with running(engines("hello"), drain_seconds=3.0) as server, connected(server) as client:
        client.sendall(GET)
        assert response(client)[0] == 200
        server.server.should_exit = True
        server.thread.join(20)
        assert is_ended(client)
    told = (
        "shutting down (its program): no new requests; 0 answers in progress have 3 s; 1 connections are open"
    )
    assert told in caplog.messages and "stopped" in caplog.messages
