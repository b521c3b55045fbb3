"""Events of a step come to the event loop together."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from godwit.server.mailbox import Mailbox
from tests.server.conftest import Engines, running


def test_what_another_thread_delivers_comes_in_order_and_wakes_the_loop_once() -> None:
    async def receive() -> tuple[list[int], int]:
        mailbox, queue = Mailbox(), asyncio.Queue[int]()
        mailbox.open()
        loop, woken = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def count(*args: Any, **kwargs: Any) -> asyncio.Handle:
            nonlocal woken
            woken += 1
            return wake(*args, **kwargs)

        loop.call_soon_threadsafe = count  # type: ignore[method-assign,assignment]

        def send() -> None:
            for number in range(50):
                mailbox.put(queue, number)
            mailbox.deliver()
            mailbox.deliver()

        thread = threading.Thread(target=send)
        thread.start()
        found = [await queue.get() for _ in range(50)]
        await asyncio.to_thread(thread.join)
        return found, woken

    found, woken = asyncio.run(receive())
    assert found == list(range(50))
    assert woken <= 5  # the two deliveries, and what waiting for threads takes


def test_nobody_is_there_before_the_first_request_nor_after_the_end() -> None:
    mailbox, queue = Mailbox(), asyncio.Queue[int]()
    mailbox.put(queue, 1)
    mailbox.deliver()

    async def open_it() -> None:
        mailbox.open()

    asyncio.run(open_it())
    mailbox.deliver()  # the loop is closed
    assert queue.empty()


def test_an_engine_that_fails_tells_those_who_wait(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit.server.host._WATCH_SECONDS", 60)
    with running(engines("endless", max_context=4096)) as server, server.client() as client:

        def fail() -> None:
            raise SystemExit("the thread ends")

        body = {"messages": [{"role": "user", "content": "Hello!"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            monkeypatch.setattr(server.engine.core, "turn", fail)
            assert any('"error":' in line for line in lines)
        unready = client.get("/ready")
        assert unready.status_code == 503 and "not running" in unready.json()["reason"]
