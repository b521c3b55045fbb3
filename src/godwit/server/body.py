"""The body of a request: received within limits, parsed, and checked against its schema."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from godwit.server.connections.clients import in_turn
from godwit.server.connections.fair_queue import FairQueue
from godwit.server.errors import ApiError, bad_request
from godwit.server.fields import BodyContext, RequestBody
from godwit.server.json_body import parse_object
from godwit.server.limits import Limits
from godwit.server.settings import Settings

#: Longer bodies are parsed in a thread, one at a time, so that they hold up neither the event loop nor, all
#: together, the interpreter.
LONG = 1 << 16
BODY_WORKERS, BODIES_WAITING = 1, 128
_log = logging.getLogger("godwit.server")
#: What pydantic puts into the location of an error besides names and numbers.
_TAG = re.compile(r"str|int|.*\[.*|constrained-.*|function-.*|[A-Z].*")
_Body = TypeVar("_Body", bound=RequestBody)


class BodyReader:
    """Reads the bodies of requests.

    Args:
        settings: with the limits and the names of the model.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queue = FairQueue(BODY_WORKERS, BODIES_WAITING)

    async def read_body(self, request: Request, kind: type[_Body]) -> _Body:
        """The body of a request as ``kind``, for this server's model.

        Raises:
            ApiError: it is too large or too slow, not valid, or names another model.
        """
        limits = self._settings.limits
        data = await receive(request, limits)
        context = BodyContext(limits=limits, refuse_media=self._settings.refuse_media)

        def check() -> _Body:
            return checked(kind, data, context)

        body = check() if len(data) < LONG else await in_turn(request, self._queue, check)
        if context.left_out:
            kinds = ", ".join(sorted(context.left_out))
            _log.info("%s: not text, left out of the prompt: %s", request.state.record.id, kinds)
        self.check_model(body.model)
        return body

    def check_model(self, name: str | None) -> None:
        """Refuse to answer in another model's name.

        Raises:
            ApiError: ``name`` is not one of this model's names.
        """
        if name is not None and not self._settings.knows(name):
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; this server has {self._settings.name!r}",
                param="model",
                code="model_not_found",
            )


async def receive(request: Request, limits: Limits) -> bytes:
    """The bytes of a body that is declared as JSON.

    Raises:
        ApiError: it is too large or too slow, or of another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page may send other types without asking
        raise ApiError(415, "send the request as JSON, with `Content-Type: application/json`")
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _receive(request, limits.body_bytes)
    except TimeoutError:
        raise ApiError(408, "the body of the request took too long to arrive") from None
    except ClientDisconnect:
        raise ApiError(400, "the client is gone") from None


async def _receive(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    parts: list[bytes] = []
    if size <= limit:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                break
            parts.append(part)
    if size > limit:
        raise ApiError(
            413, f"the body of a request is limited to {limit} bytes", headers={"Connection": "close"}
        )
    return b"".join(parts)


def checked(kind: type[_Body], data: bytes, context: BodyContext) -> _Body:
    """A body, parsed and validated.

    Raises:
        ApiError: it is not valid.
    """
    try:
        return kind.model_validate(parse_object(data, context.limits), context=context)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> ApiError:
    """What is wrong with a body, in one sentence that does not quote it.

    Where a field may be one of several things, the error that lies deepest is the most telling.
    """
    first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    place = ".".join(str(part) for part in first["loc"] if not _TAG.fullmatch(str(part)))[:200]
    if first["type"] == "extra_forbidden":
        return bad_request(f"`{place}`: unknown field; remove it", place)
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return bad_request(f"`{place}`: {message}" if place else message, place or None)
