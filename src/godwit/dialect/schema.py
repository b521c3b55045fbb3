"""JSON schemas of answers and tools: prepared for grammars, and checked against values.

The checks are our own because they run on untrusted schemas and values in the server: they take bounded time,
follow no reference out of the schema, and run no regular expression.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import islice
from typing import Any

from godwit.errors import UsageError

#: The schema of a function without parameters.
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
#: The formats of strings that are enforced.
FORMATS = frozenset(
    ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
#: Where a schema keeps what it refers to.
DEFINITIONS = ("$defs", "definitions")
MAX_DEPTH = 48
#: Values in a schema, of any type; a usual schema of 256 KiB has some 20,000.
MAX_VALUES = 32_768
MAX_STEPS = 20_000
#: Passes over a schema that look for definitions of partial objects, until no new ones are found.
MAX_ROUNDS = 8

_MAPS = ("properties", "patternProperties", *DEFINITIONS, "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items", "additionalItems", "contains", "additionalProperties", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties", "if", "then", "else", "not",
)  # fmt: skip
#: Keywords whose subschemas apply to the same value.
_SAME_VALUE = frozenset(("allOf", "anyOf", "oneOf", "if", "then", "else", "not", "dependentSchemas"))
_SAYS_OTHERWISE = _SAME_VALUE | {
    "$ref", "$dynamicRef", "additionalProperties", "unevaluatedProperties", "patternProperties",
}  # fmt: skip
_KINDS_OF_KEYWORDS = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_ANNOTATIONS = frozenset((
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly",
    "$defs", "definitions", "$schema", "$id", "$comment", "nullable",
))  # fmt: skip


def check_depth(value: object) -> None:
    """Refuse a value that is nested too deeply or has too many parts; without recursion.

    Raises:
        UsageError: it is or has.
    """
    level, depth, seen = [value], 0, 1
    while level := list(islice((child for parent in level for child in _children(parent)), MAX_VALUES)):
        depth += 1
        seen += len(level)
        if seen > MAX_VALUES:
            raise UsageError(f"the schema has more than {MAX_VALUES} values; simplify it")
        if depth > MAX_DEPTH:
            raise UsageError(f"the schema is nested more than {MAX_DEPTH} levels deep")


def _children(value: object) -> Any:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def prepared(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema as it is enforced.

    Objects that list ``properties`` allow no others unless the schema says so. If several schemas apply to
    one object, as the members of ``allOf`` do, each knows only some of its properties, so none is closed.
    Formats that are not enforced are dropped.

    Raises:
        UsageError: it is nested too deeply.
    """
    check_depth(schema)
    shared: set[str] = set()  # definitions of partial objects
    for _ in range(MAX_ROUNDS):
        known = len(shared)
        result = _prepare(schema, False, shared)
        if len(shared) == known:
            return dict(result)
    shared |= {f"#/{key}/{name}" for key in DEFINITIONS for name in schema.get(key) or ()}
    return dict(_prepare(schema, False, shared))


def _prepare(schema: Any, part: bool, shared: set[str]) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    sources = [key for key in schema if key in _SAME_VALUE or key in ("$ref", "properties")]
    members = schema.get("allOf")
    several = len(sources) > 1 or (isinstance(members, list) and len(members) > 1)
    part_below = part or several or "not" in schema
    if part_below and isinstance(reference := schema.get("$ref"), str):
        shared.add(reference)
    result = dict(schema)
    if isinstance(result.get("format"), str) and result["format"] not in FORMATS:
        del result["format"]
    for key, value in result.items():
        below = part_below and key in _SAME_VALUE
        if key in _MAPS and isinstance(value, Mapping):
            result[key] = {
                name: _prepare(one, below or f"#/{key}/{name}" in shared, shared)
                for name, one in value.items()
            }
        elif key in _LISTS and isinstance(value, list):
            result[key] = [_prepare(one, below, shared) for one in value]
        elif key in _SINGLE:
            result[key] = _prepare(value, below, shared)
    if isinstance(result.get("properties"), Mapping) and not part and _SAYS_OTHERWISE.isdisjoint(result):
        result["additionalProperties"] = False
    return result


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """A schema with a reference at its top resolved, within ``root`` only."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, Mapping) or not isinstance(reference := schema.get("$ref"), str):
            return schema
        found = _target(reference, root)
        rest = {key: value for key, value in schema.items() if key != "$ref" and key not in _ANNOTATIONS}
        schema = {"allOf": [found, rest]} if rest else found
    return {}


def _target(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for step in reference.split("/")[1:] if reference.startswith("#") else ["\0"]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def members(schema: Any, root: Mapping[str, Any], keys: Collection[str]) -> list[Mapping[str, Any]]:
    """A schema and those below its ``keys``, which apply to the same value; each once."""
    found: list[Mapping[str, Any]] = []
    seen: set[int] = set()
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        one = resolved(one, root)
        if isinstance(one, Mapping):
            found.append(one)
            waiting += [below for key in keys for below in reversed(_list(one, key))]
    return found


def kinds(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """The JSON types that a schema allows, in its order; empty if it does not say."""
    try:
        return _kinds(schema, root, _Budget()) or []
    except _Spent:
        return []


def _kinds(schema: Any, root: Mapping[str, Any], budget: _Budget) -> list[str] | None:
    with budget:
        schema = resolved(schema, root)
        if not isinstance(schema, Mapping):
            return None
        found = [own] if (own := _own_kinds(schema)) is not None else []
        found += [_kinds(member, root, budget) or [] for member in _list(schema, "allOf")]
        for key in ("anyOf", "oneOf"):
            options = [_kinds(option, root, budget) or [] for option in _list(schema, key)]
            found.append(list(dict.fromkeys(kind for option in options for kind in option)))
        said = [one for one in found if one]
        if not said:
            return None
        return [kind for kind in said[0] if all(_among(kind, other) for other in said[1:])] or said[0]


def _own_kinds(schema: Mapping[str, Any]) -> list[str] | None:
    named = schema.get("type")
    if found := [k for k in (named if isinstance(named, list) else [named]) if isinstance(k, str)]:
        return found
    if "const" in schema or isinstance(schema.get("enum"), list):
        options = [schema["const"]] if "const" in schema else schema["enum"]
        return list(dict.fromkeys(kind_of(option) for option in options))
    return next(
        ([kind] for kind, keywords in _KINDS_OF_KEYWORDS.items() if any(key in schema for key in keywords)),
        None,
    )


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _among(kind: str, options: Collection[str]) -> bool:
    return kind in options or (kind == "integer" and "number" in options)


def kind_of(value: object) -> str:
    """The JSON type of a value, "integer" for whole numbers."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if value == int(value) else "number"
    return "string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array"


def fits(value: Any, schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether a value certainly fits a schema; with patterns and rare keywords it is never certain."""
    try:
        return _fits(value, schema, root, _Budget())
    except _Spent:
        return False


def _fits(value: Any, schema: Any, root: Mapping[str, Any], budget: _Budget) -> bool:
    with budget:
        if isinstance(schema, bool):
            return schema
        schema = resolved(schema, root)
        if not isinstance(schema, Mapping):
            return False
        return all(
            _CHECKS[key](value, schema, root, budget) if key in _CHECKS else _says_nothing(key, schema)
            for key in schema
        )


def _says_nothing(key: str, schema: Mapping[str, Any]) -> bool:
    return key in _ANNOTATIONS or (key == "format" and schema[key] not in FORMATS)


def _fits_kind(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], budget: _Budget) -> bool:
    return _among(kind_of(value), _own_kinds({"type": schema["type"]}) or [])


def _fits_enum(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], budget: _Budget) -> bool:
    return any(same(value, option) for option in _list(schema, "enum"))


def _fits_some(key: str) -> Check:
    def check(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], budget: _Budget) -> bool:
        fitting = sum(_fits(value, option, root, budget) for option in _list(schema, key))
        return (
            fitting == len(schema[key]) if key == "allOf" else fitting == 1 if key == "oneOf" else fitting > 0
        )

    return check


def _fits_object(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], budget: _Budget) -> bool:
    if not isinstance(value, Mapping):
        return True
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    rest = schema.get("additionalProperties", True)
    return all(name in value for name in _list(schema, "required")) and all(
        _fits(one, properties.get(name, rest), root, budget) for name, one in value.items()
    )


def _fits_array(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], budget: _Budget) -> bool:
    if not isinstance(value, list):
        return True
    first = _list(schema, "prefixItems")
    rest = schema.get("items", True)
    return all(
        _fits(one, first[place] if place < len(first) else rest, root, budget)
        for place, one in enumerate(value)
    )


def _fits_size(kind: type, low: str, high: str) -> Check:
    def check(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], budget: _Budget) -> bool:
        if not isinstance(value, kind):
            return True
        size = len(value)  # type: ignore[arg-type]
        bounds = schema.get(low, 0), schema.get(high, size)
        return all(isinstance(bound, int) for bound in bounds) and bounds[0] <= size <= bounds[1]

    return check


def _fits_bounds(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], budget: _Budget) -> bool:
    if kind_of(value) not in ("integer", "number"):
        return True
    bounds = {key: schema[key] for key in _KINDS_OF_KEYWORDS["number"] if key in schema}
    if not all(kind_of(bound) in ("integer", "number") for bound in bounds.values()):
        return False
    step = bounds.get("multipleOf")
    return (
        bounds.get("minimum", value) <= value <= bounds.get("maximum", value)
        and ("exclusiveMinimum" not in bounds or bounds["exclusiveMinimum"] < value)
        and ("exclusiveMaximum" not in bounds or value < bounds["exclusiveMaximum"])
        and (step is None or (step > 0 and isinstance(value, int) and value % step == 0))
    )


def same(one: object, other: object) -> bool:
    """Whether two JSON values are equal; ``True`` is not 1."""
    return kind_of(one) == kind_of(other) and one == other


class _Spent(Exception):
    """A check takes too many steps."""


class _Budget:
    """Limits the steps of a check and their depth; each step is a ``with`` block."""

    def __init__(self) -> None:
        self._steps = self._depth = 0

    def __enter__(self) -> None:
        self._steps += 1
        self._depth += 1
        if self._steps > MAX_STEPS or self._depth > 3 * MAX_DEPTH:
            raise _Spent

    def __exit__(self, *_: object) -> None:
        self._depth -= 1


Check = Callable[[Any, Mapping[str, Any], Mapping[str, Any], _Budget], bool]
_CHECKS: dict[str, Check] = {
    "type": _fits_kind,
    "enum": _fits_enum,
    "const": lambda value, schema, root, budget: same(value, schema["const"]),
    **{key: _fits_some(key) for key in ("allOf", "anyOf", "oneOf")},
    **dict.fromkeys(("properties", "required", "additionalProperties"), _fits_object),
    **dict.fromkeys(("items", "prefixItems"), _fits_array),
    **dict.fromkeys(("minLength", "maxLength"), _fits_size(str, "minLength", "maxLength")),
    **dict.fromkeys(("minItems", "maxItems"), _fits_size(list, "minItems", "maxItems")),
    **dict.fromkeys(_KINDS_OF_KEYWORDS["number"], _fits_bounds),
}
