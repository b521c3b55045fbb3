"""The tools of the Responses API: functions, custom tools that take one text, and namespaces of both.

Models only know functions, so all tools are shown to the model as functions, and its calls are turned back
into calls of the client's tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from godwit.dialect.strict_json import parse_json
from godwit.server.errors import bad_request
from godwit.server.fields import BodyPart, FunctionSpec, Items, Name

#: The argument of a custom tool.
INPUT = "input"
#: Hosted tools, which only their vendor's server can run; some names end with a date.
_HOSTED = re.compile(
    r"(web_search|web_search_preview|file_search|code_interpreter|image_generation|computer|computer_use"
    r"|computer_use_preview|mcp|local_shell|shell|apply_patch|tool_search|programmatic_tool_calling)"
    r"(_\d{4}_?\d{2}_?\d{2})?"
)


class FunctionTool(FunctionSpec):
    """A function that the model may call."""

    type: Literal["function"]


class CustomFormat(BodyPart):
    """The format of a custom tool's text: the model sees it, but it is not enforced."""

    type: Literal["text", "grammar"] = "text"
    syntax: str = ""
    definition: str = ""


class CustomTool(BodyPart):
    """A tool that takes one text."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: CustomFormat | None = None


class NamespaceTool(BodyPart):
    """A group of tools; their calls name the group."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Items[Annotated[FunctionTool | CustomTool, Field(discriminator="type")]] = Field(max_length=256)


class HostedTool(BodyPart):
    """A tool that only its vendor's server can run: it is left out."""

    type: Annotated[str, Field(pattern=rf"^{_HOSTED.pattern}$")]


def _kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return kind if kind in ("function", "custom", "namespace") else "hosted"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[HostedTool, Tag("hosted")],
    Discriminator(_kind),
]


class OfferedTool(FunctionSpec):
    """A tool as the model sees it.

    Attributes:
        kind, own_name, namespace: of the client's tool.
    """

    kind: Literal["function", "custom"]
    own_name: str
    namespace: str | None = None


def joined(namespace: str | None, name: str) -> str:
    """The name that the model sees for a tool of a namespace."""
    if not namespace:
        return name
    return namespace + name if namespace.endswith("__") else f"{namespace}__{name}"


def offered(tools: Sequence[AnyTool]) -> list[OfferedTool]:
    """All tools that the model may call.

    Raises:
        ApiError: two have the same name.
    """
    found: dict[str, OfferedTool] = {}
    for tool in _offered(tools):
        if tool.name in found:
            raise bad_request(f"`tools` has two tools named {tool.name}; rename one", "tools")
        found[tool.name] = tool
    return list(found.values())


def _offered(tools: Sequence[AnyTool]) -> Iterator[OfferedTool]:
    for tool in tools:
        if isinstance(tool, NamespaceTool):
            for index, inner in enumerate(tool.tools):
                yield _offer(inner, tool.name, tool.description if index == 0 else None)
        elif not isinstance(tool, HostedTool):
            yield _offer(tool)


def _offer(
    tool: FunctionTool | CustomTool, namespace: str | None = None, group: str | None = None
) -> OfferedTool:
    text = tool.description
    parameters = _one_text(tool) if isinstance(tool, CustomTool) else tool.parameters
    if isinstance(tool, CustomTool) and tool.format is not None and tool.format.type == "grammar":
        text = (
            f"{text or ''}\n\n`{INPUT}` follows this {tool.format.syntax} grammar:\n{tool.format.definition}"
        )
    return OfferedTool.model_construct(
        name=joined(namespace, tool.name),
        description="\n\n".join(filter(None, (group, text))) or None,
        parameters=parameters,
        strict=None if isinstance(tool, CustomTool) else tool.strict,
        kind=tool.type,
        own_name=tool.name,
        namespace=namespace,
    )


def _one_text(tool: CustomTool) -> dict[str, Any]:
    wanted: dict[str, Any] = {"type": "string"}
    if tool.format is not None and tool.format.syntax == "regex":
        wanted["pattern"] = f"^(?:{tool.format.definition})$"
    return {
        "type": "object",
        "properties": {INPUT: wanted},
        "required": [INPUT],
        "additionalProperties": False,
    }


def is_known(kind: str) -> bool:
    """Whether this type of tools exists, including those that are left out."""
    return kind in ("function", "custom", "namespace") or _HOSTED.fullmatch(kind) is not None


def left_out(tools: Sequence[AnyTool]) -> list[str]:
    """The types of tools that are left out."""
    return sorted({tool.type for tool in tools if isinstance(tool, HostedTool)})


def echoed(tools: Sequence[AnyTool]) -> list[dict[str, Any]]:
    """The tools as responses repeat them."""
    return [_echo(tool) for tool in tools if not isinstance(tool, HostedTool)]


def _echo(tool: FunctionTool | CustomTool | NamespaceTool) -> dict[str, Any]:
    if isinstance(tool, NamespaceTool):
        inner = [_echo(one) for one in tool.tools]
        return {"type": "namespace", "name": tool.name, "description": tool.description or "", "tools": inner}
    if isinstance(tool, CustomTool):
        return tool.model_dump(exclude_none=True)
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }


class CallText:
    """The part of a call's arguments that the client gets, as they come.

    For a function, the JSON as the model wrote it; for a custom tool, its text.
    """

    _OPENS = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
    #: The content of a JSON string, without an incomplete escape or half of a surrogate pair.
    _BODY = re.compile(
        r'(?:[^"\\]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}'
        r"|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|\\[\"\\/bfnrt])*"
    )

    def __init__(self, *, custom: bool) -> None:
        self._custom = custom
        self._raw = ""
        self._place = -1  # the end of the text that was returned

    def push(self, arguments: str) -> str:
        """Text that is certain with more of the arguments."""
        if not self._custom:
            return arguments
        self._raw += arguments
        if self._place < 0:
            if (opened := self._OPENS.match(self._raw)) is None:
                return ""
            self._place = opened.end()
        body = self._BODY.match(self._raw, self._place)
        self._place += len(part := body[0] if body else "")
        text: str = json.loads(f'"{part}"', strict=False)
        return text

    def flush(self) -> str:
        """The rest at the end. Where no text could be read, the arguments as they are."""
        if not self._custom or self._place >= 0:
            return ""
        try:
            value = parse_json(self._raw)
        except ValueError:
            return self._raw
        text = value.get(INPUT) if isinstance(value, Mapping) else None
        return text if isinstance(text, str) else self._raw
