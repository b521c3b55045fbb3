"""Clients: who sent a request, their turns, and whether they still wait for the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from godwit.server.connections.fair_queue import FairQueue
from godwit.server.errors import ApiError

_Result = TypeVar("_Result")


def client_of(request: Request) -> str:
    """Identifies a client for fair queueing: by its key, or without keys by its address."""
    key: str = request.state.salt
    return key or (request.client.host if request.client else "")


async def disconnected(request: Request) -> None:
    """Wait until the client has left. The body of the request must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of ``work``, which is cancelled when the client leaves.

    Raises:
        ApiError: the client left.
    """
    task, leaves = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, leaves}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client is gone")
    finally:
        for one in (task, leaves):
            one.cancel()


async def in_turn(request: Request, queue: FairQueue, work: Callable[[], _Result]) -> _Result:
    """The result of blocking work, run when it is the turn of the client, as long as it is connected.

    Raises:
        ApiError: too many jobs are waiting (503), the work failed, or the client left.
    """
    return await while_connected(request, queue.run(client_of(request), work))
