"""The clients of the load benchmark: what they count, and what they send to a real server."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from benchmarks import serve_load
from benchmarks.attacks import ATTACKS, Attack
from benchmarks.load_client import Client, Mix, Tally, error_in, is_end, is_token
from benchmarks.plain_http import request
from tests.server.conftest import Engines, running

PIECES = [b'data: {"choices": [{"delta": {"con', b'tent": "a"}}]}\n\nda', b"ta: [DONE]\n\n"]


async def chunked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for piece in PIECES:
        writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


def test_events_may_be_cut_anywhere() -> None:
    async def read() -> list[Any]:
        async with await asyncio.start_server(chunked, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with request(f"http://127.0.0.1:{port}", "/", b"{}") as reply:
                return [event async for event in reply.events()]

    assert asyncio.run(read()) == [{"choices": [{"delta": {"content": "a"}}]}, "[DONE]"]


def test_events_of_all_apis_are_understood() -> None:
    assert is_token({"choices": [{"delta": {"content": "a"}}]}) and is_token({"choices": [{"text": "a"}]})
    assert is_token({"type": "content_block_delta"}) and is_token({"type": "response.output_text.delta"})
    assert not is_token({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    assert is_end("[DONE]") and is_end({"type": "message_stop"}) and is_end({"type": "response.completed"})
    assert not is_end({"type": "message_delta"})
    assert error_in({"error": {"message": "x"}}) and error_in({"type": "response.failed"})
    assert error_in({"choices": [], "error": None}) is None


def test_times_and_tables() -> None:
    assert serve_load.quantiles([0.001 * n for n in range(1, 101)])["p50"] == pytest.approx(51)
    assert serve_load.quantiles([]) == {"p50": None, "p95": None, "p99": None}
    found = [serve_load.figures(Tally(first=[0.1], gaps=[0.01], tokens=n), 2) for n in (10, 30, 20)]
    joined = serve_load.joined(found)
    assert joined["tokens_per_second"]["median"] == 10 and joined["ttft_ms"]["p95"] == 100
    table = serve_load.peer_table(
        [{"server": "a", "clients": 64, **joined}, {"server": "b", "clients": 1, **joined}]
    )
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| b", "| a"]


def test_a_server_bears_all_of_it(engines: Engines) -> None:
    tally = Tally()
    with running(engines("hello", max_context=4096)) as server:

        async def load() -> None:
            mix = Mix(prompt_words=(1, 5), tokens=(1, 8))
            await asyncio.gather(*(several(Client(server.url, mix, seed, tally), 12) for seed in range(4)))
            statuses = await asyncio.gather(*(attack.run(server.url, random.Random(1)) for attack in QUICK))
            for attack, status in zip(QUICK, statuses, strict=True):
                assert status in attack.statuses, attack.name

        asyncio.run(load())
        server.engine.check_integrity()
    assert tally.errors == [] and tally.finished > 20 and tally.left and tally.tokens > 40


#: The costly ones take the seconds that they are given.
SLOW = {"costly schema", "slow body", "chunks of one byte", "a letter at a time", "chunks after a refusal"}
SLOW |= {"one letter on 50 connections", "300 pages unread"}
QUICK: list[Attack] = [attack for attack in ATTACKS if attack.name not in SLOW]


async def several(client: Client, count: int) -> None:
    for _ in range(count):
        await client.one()


def test_requests_are_the_same_each_time() -> None:
    made = [Client("", Mix(), 5, Tally())._request() for _ in range(2)]
    assert json.dumps(made[0]) == json.dumps(made[1])
