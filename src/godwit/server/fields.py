"""Schema types that several APIs share: texts, tools, and the limits of numbers and strings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from godwit.dialect.schema import NO_PARAMETERS
from godwit.server.errors import bad_request
from godwit.server.json_body import count_values
from godwit.server.limits import Limits

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
#: Types of content parts that this server cannot read.
MEDIA_PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
    **dict.fromkeys(("file", "input_file", "document", "container_upload", "search_result"), "file"),
}
_LEFT_OUT = re.compile(r"(\[(image|audio|video|file) left out: this model reads only text\]\n?)+")
ONLY_TEXT = "this model reads only text: no images, audio or files, and nothing is fetched from URLs"
MAX_NAME = 128
_Item = TypeVar("_Item")
_Function = TypeVar("_Function", bound="FunctionSpec")
#: A list whose validation stops at the first invalid item.
Items = Annotated[list[_Item], Field(fail_fast=True)]
_NAME = rf"^[A-Za-z0-9_.:/-]{{1,{MAX_NAME}}}$"


class RequestBody(BaseModel):
    """A body. Unknown fields are refused: ignoring them would change what was asked for."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, body: Any) -> Any:
        """Keep only the first unknown field: one is enough to refuse the body."""
        unknown = [name for name in body if name not in cls.model_fields] if isinstance(body, dict) else []
        more = set(unknown[1:])
        return {name: value for name, value in body.items() if name not in more} if more else body


class BodyPart(BaseModel):
    """An object within a body. Unknown fields are ignored: clients send back what answers had."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


@dataclass
class BodyContext:
    """The context of a validation.

    Attributes:
        limits: the server's.
        refuse_media: refuse images, audio and files even where the rest of a message is text.
        left_out: the kinds that were left out, collected during validation.
    """

    limits: Limits = field(default_factory=Limits)
    refuse_media: bool = False
    left_out: set[str] = field(default_factory=set)


def joined_text(content: Any, info: ValidationInfo) -> Any:
    """The text of a message's content, which may be a list of parts.

    Raises:
        ValueError: a part has an unknown type or no text.
    """
    return "\n".join(text_of(part, info) for part in content) if isinstance(content, list) else content


def text_of(part: Any, info: ValidationInfo) -> str:
    """The text of one part; for media, a line that says it was left out.

    Raises:
        ValueError: the part has an unknown type or no text, or the server refuses media.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in TEXT_PARTS:
        if not isinstance(text := part.get(TEXT_PARTS[kind]), str):
            raise ValueError(f"a part of type {kind} needs its text")
        return text
    if not isinstance(kind, str) or kind not in MEDIA_PARTS:
        raise ValueError(f"only parts of type text are supported; {ONLY_TEXT}")
    inner = _inner_text(part)
    return joined_text(inner, info) if inner else _leave_out(MEDIA_PARTS[kind], info)


def _inner_text(part: Mapping[str, Any]) -> list[Any]:
    """The text that a document or search result contains, as parts."""
    source = part.get("source")
    if isinstance(source, Mapping) and source.get("type") == "text":
        return [{"type": "text", "text": source.get("data")}]
    found = source.get("content") if isinstance(source, Mapping) else part.get("content")
    if isinstance(found, str):
        return [{"type": "text", "text": found}]
    return found if isinstance(found, list) else []


def _leave_out(kind: str, info: ValidationInfo) -> str:
    context = info.context if isinstance(info.context, BodyContext) else BodyContext()
    if context.refuse_media:
        raise ValueError(ONLY_TEXT)
    context.left_out.add(kind)
    return f"[{kind} left out: this model reads only text]"


def check_question(text: str, place: str) -> None:
    """Refuse a last message without any readable part: the model would have to invent the question.

    Raises:
        ApiError: all its parts were left out.
    """
    if _LEFT_OUT.fullmatch(text):
        raise bad_request(ONLY_TEXT, place)


_HEADER = re.compile(r"\Ax-anthropic-billing-header:[^\n]*")
_CHANGING = re.compile(r"(\bcch=)[^;\s]*|(\bcc_version=\d+\.\d+\.\d+\.)[^;\s]*")


def stable_system(system: str) -> str:
    """A system prompt without the values that Claude Code changes in its first line with every request.

    With them, no prompt would share a prefix with an earlier one.
    """
    return _HEADER.sub(lambda line: _CHANGING.sub(lambda m: f"{m[1] or m[2]}0", line[0]), system)


def as_json(value: Any) -> str:
    """``value`` as JSON, unless it is a string already: some clients send arguments as an object."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _few_values(arguments: Any, info: ValidationInfo) -> Any:
    """JSON text in a body is parsed later, even JSON within its strings, so it has the limit of bodies."""
    context = info.context if isinstance(info.context, BodyContext) else BodyContext()
    limit = context.limits.values
    if isinstance(arguments, str) and count_values(arguments.encode("utf-8", "replace"))[1] > limit:
        raise ValueError(f"the arguments of a call have more than {limit} values")
    return arguments


_PART_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"const": kind}, name: {"type": "string"}},
            "required": ["type", name],
        }
        for kind, name in TEXT_PARTS.items()
    ]
    + [{"type": "object", "properties": {"type": {"enum": [*MEDIA_PARTS]}}, "required": ["type"]}]
}
#: A string, or a list of parts; a line of text takes the place of media.
Content = Annotated[
    str,
    BeforeValidator(joined_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}),
]
#: Arguments of a call in an earlier answer, as JSON text. Invalid JSON is accepted: a model wrote it.
Arguments = Annotated[
    str,
    BeforeValidator(as_json),
    AfterValidator(_few_values),
    WithJsonSchema({"description": "JSON text, or an object.", "default": "{}"}),
]
#: Arguments as an object; other values are accepted too, since a model wrote them.
Input = Annotated[Any, AfterValidator(_few_values)]
Name = Annotated[str, Field(pattern=_NAME)]
#: Accepted without effect.
Ignored = Annotated[Any, Field(description="Accepted and ignored: it changes no answer.")]
Probability = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
MAX_TOKENS = 1 << 24
MaxTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


def _limit(value: int) -> int:
    if value == 0:
        raise ValueError("must be at least 1, or -1 for no limit")
    return value


#: A number of tokens as OpenAI's clients send it; -1: as many as the context allows.
TokenLimit = Annotated[
    int,
    Field(ge=-1, le=MAX_TOKENS),
    AfterValidator(_limit),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_TOKENS}, {"const": -1}]}),
]
#: Sample from the k likeliest tokens; 0 and -1: from all.
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1), AfterValidator(lambda value: max(value, 0))]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
MAX_STOPS = 16
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": 1024}
Stops = Annotated[
    Items[StopText],
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    WithJsonSchema(
        {"anyOf": [_STOP_SCHEMA, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP_SCHEMA}]}
    ),
]
Salt = Annotated[str, Field(max_length=256)]


Mode = Literal["none", "auto", "required"]


class ToolChoice(NamedTuple):
    """Which tools may or must be called.

    Attributes:
        mode: "none": the model does not see the tools; "required": it must call one.
        tool: the one that must be called; None: any.
        allowed: names of those that may be called; None: all.
    """

    mode: Mode = "auto"
    tool: str | None = None
    allowed: Sequence[str] | None = None

    def among(self, tools: Sequence[_Function]) -> list[_Function]:
        """Those of the tools that may be called.

        Raises:
            ApiError: a tool is allowed that does not exist.
        """
        if self.allowed is None:
            return list(tools)
        if missing := set(self.allowed) - {tool.name for tool in tools}:
            raise bad_request(f"`tool_choice` allows {min(missing)}, which is not in `tools`", "tool_choice")
        return [tool for tool in tools if tool.name in self.allowed]


class FunctionSpec(BodyPart):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(default=None, description="Hold the arguments of calls to the schema.")

    def tool(self) -> dict[str, Any]:
        """In OpenAI's format."""
        return function_tool(self.name, self.description, self.parameters)


def function_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A function in OpenAI's format, without missing fields; without parameters it takes none."""
    given = {"name": name, "description": description, "parameters": parameters or NO_PARAMETERS}
    return {"type": "function", "function": {key: value for key, value in given.items() if value is not None}}
