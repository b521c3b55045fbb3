"""Who sent a request, and whether they still wait for the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

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
