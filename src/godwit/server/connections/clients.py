"""Who sent a request, and whether they still wait for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from godwit.server.errors import ApiError

_Result = TypeVar("_Result")


def client_of(request: Request) -> str:
    """What tells clients apart where they take turns: their keys, and without keys their addresses."""
    key: str = request.state.salt
    return key or (request.client.host if request.client else "")


async def gone(request: Request) -> None:
    """Wait until the client has left, once the body of the request was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_there(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of ``work``, which is cancelled when the client leaves.

    Raises:
        ApiError: the client is gone.
    """
    task, leaves = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({task, leaves}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client is gone")
    finally:
        for one in (task, leaves):
            one.cancel()
