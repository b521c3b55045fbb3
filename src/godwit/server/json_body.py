"""Parsing JSON from clients within limits."""

from __future__ import annotations

import json
import re
from typing import Any

from godwit.dialect.strict_json import finite, refuse_constant
from godwit.server.errors import bad_request
from godwit.server.limits import Limits

#: A string; one whose quotes are not closed extends to the end.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
#: Objects in which null is a value: schemas, arguments of calls, and what is only returned to the client.
_OPAQUE = frozenset({"parameters", "input_schema", "schema", "json", "arguments", "input", "metadata"})


def parse_object(data: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object in ``data``, without null fields, and with U+FFFD for lone surrogates.

    Raises:
        ApiError: it is not a JSON object, has NaN or infinity, is nested too deeply or has too many values.
    """
    _check_counts(data, limits)
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
        raise bad_request("the body must be a JSON object")
    _check_depth(value, depth)
    whole: dict[str, Any] = replace_surrogates(value) if _SURROGATE.search(data) else value
    drop_nulls(whole)
    return whole


def _check_counts(data: bytes, limits: Limits) -> None:
    """Refuse a body that would take long to parse, before it is parsed."""
    containers, values = count_values(data)
    if containers > limits.containers or values > limits.values:
        containers, values = count_values(_STRING.sub(b"", data))
    if containers > limits.containers:
        raise bad_request(f"the body has more than {limits.containers} objects and lists")
    if values > limits.values:
        raise bad_request(f"the body has more than {limits.values} values")


def count_values(data: bytes) -> tuple[int, int]:
    """(objects and lists, upper bound of values), including what looks like them in strings."""
    containers = data.count(b"{") + data.count(b"[")
    return containers, 1 + containers + data.count(b",")


def drop_nulls(value: dict[str, Any] | list[Any]) -> None:
    """Remove null fields at any depth: null means the same as leaving the field out.

    Schemas, arguments and metadata keep theirs, and so do lists, in which positions count.
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


def replace_surrogates(value: Any) -> Any:
    """``value`` with surrogate pairs joined, and lone surrogates replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_surrogates(item) for key, item in value.items()}
    return value
