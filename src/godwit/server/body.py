"""The body of a request: read and checked within limits before anything is done with it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.requests import ClientDisconnect, Request

from godwit.dialect.strict_json import finite, refuse_constant
from godwit.server.errors import ApiError, bad_request
from godwit.server.settings import Limits

#: A text, which ends with the body where its quotes are not closed.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
#: Objects in which null is a value: schemas, arguments of calls, and what is only handed back.
_OPAQUE = frozenset({"parameters", "input_schema", "schema", "json", "arguments", "input", "metadata"})
#: Parsing and checking a longer body would keep the event loop from others for too long.
LONG = 1 << 16


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, which says that it is JSON.

    Raises:
        ApiError: it is too large or too slow, or something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a web page may send without asking is none of the types allowed
        raise ApiError(415, "send the request as JSON, with `Content-Type: application/json`")
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _read(request, limits.body_bytes)
    except TimeoutError:
        raise ApiError(408, "the body of the request took too long to arrive") from None
    except ClientDisconnect:
        raise ApiError(400, "the client is gone") from None


async def _read(request: Request, limit: int) -> bytes:
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
        raise ApiError(413, f"the body of a request may have {limit} bytes", headers={"Connection": "close"})
    return b"".join(parts)


def parse_object(data: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object in ``data``, without fields that are null, and with U+FFFD for halves of characters.

    Raises:
        ApiError: it is none, has numbers that are not finite, is nested too deeply or has too many values.
    """
    _check_size(data, limits)
    depth = limits.depth
    try:
        value = json.loads(data.decode(), parse_constant=refuse_constant, parse_float=finite)
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8") from None
    except RecursionError:
        raise bad_request(f"the body is nested more than {depth} levels deep") from None
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        place = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise bad_request(f"the body is not valid JSON: {reason[:100]}{place}") from None
    if not isinstance(value, dict):
        raise bad_request("the body has to be a JSON object")
    _check_depth(value, depth)
    whole: dict[str, Any] = whole_characters(value) if _SURROGATE.search(data) else value
    drop_nulls(whole)
    return whole


def _check_size(data: bytes, limits: Limits) -> None:
    """Refuse what would take long to parse, before it is parsed."""
    containers, values = _count(data)
    if containers > limits.containers or values > limits.values:
        containers, values = _count(_TEXT.sub(b"", data))
    if containers > limits.containers:
        raise bad_request(f"the body has more than {limits.containers} objects and lists")
    if values > limits.values:
        raise bad_request(f"the body has more than {limits.values} values")


def _count(data: bytes) -> tuple[int, int]:
    """(objects and lists, values at most) of JSON; what looks like them in texts counts too."""
    containers = data.count(b"{") + data.count(b"[")
    return containers, 1 + containers + data.count(b",")


def drop_nulls(value: dict[str, Any] | list[Any]) -> None:
    """Remove the fields that are null, at any depth: they are as good as absent.

    Schemas, arguments and metadata keep theirs, and so do lists, in which places count.
    """
    if isinstance(value, dict):
        for key in [key for key, item in value.items() if item is None]:
            del value[key]
        inner = [item for key, item in value.items() if not (key in _OPAQUE and isinstance(item, dict))]
    else:
        inner = value
    for item in inner:
        if isinstance(item, dict | list):
            drop_nulls(item)


def _check_depth(value: Any, depth: int) -> None:
    level = [value]
    for _ in range(depth):
        inner: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            inner += [child for child in children if isinstance(child, dict | list)]
        if not inner:
            return
        level = inner
    raise bad_request(f"the body is nested more than {depth} levels deep")


def whole_characters(value: Any) -> Any:
    """``value`` with surrogate pairs joined, and lone ones, which are no characters, replaced."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {whole_characters(key): whole_characters(item) for key, item in value.items()}
    return value
