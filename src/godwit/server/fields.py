"""Fields that several APIs share: what texts and tools look like, and what becomes of other kinds."""

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

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
#: Parts that this server cannot read, and what they are.
MEDIA_PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
    **dict.fromkeys(("file", "input_file", "document", "container_upload", "search_result"), "file"),
}
_LEFT_OUT = re.compile(r"(\[(image|audio|video|file) left out: this model reads only text\]\n?)+")
ONLY_TEXT = (
    "this model reads only text: it takes neither images, sounds nor files, and nothing is fetched from "
    "addresses"
)
MAX_NAME = 128
_Item = TypeVar("_Item")
#: A list of which no more is looked at than up to the first item that is wrong.
Items = Annotated[list[_Item], Field(fail_fast=True)]
_NAME = rf"^[A-Za-z0-9_.:/-]{{1,{MAX_NAME}}}$"


class Request(BaseModel):
    """A body: fields that are not listed are refused, since they would not be honoured."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, body: Any) -> Any:
        """Of fields that are not listed, the first is enough to be refused for."""
        unknown = [name for name in body if name not in cls.model_fields] if isinstance(body, dict) else []
        more = set(unknown[1:])
        return {name: value for name, value in body.items() if name not in more} if more else body


class Part(BaseModel):
    """An object within a body: what is not listed changes nothing, as in answers that are sent back."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


@dataclass
class Reading:
    """The context in which a body is checked.

    Attributes:
        refuse_media: images, sounds and files are refused even where the rest of a message is text.
        left_out: kinds of what was left out, filled while the body is checked.
    """

    refuse_media: bool = False
    left_out: set[str] = field(default_factory=set)


def joined_text(content: Any, info: ValidationInfo) -> Any:
    """The text of a message's content, which may be a list of parts.

    Raises:
        ValueError: a part is of no known type, or has no text.
    """
    return "\n".join(text_of(part, info) for part in content) if isinstance(content, list) else content


def text_of(part: Any, info: ValidationInfo) -> str:
    """The text of one part; for what is no text, a line that says so.

    Raises:
        ValueError: the part is of no known type, has no text, or is refused by the server's settings.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in TEXT_PARTS:
        if not isinstance(text := part.get(TEXT_PARTS[kind]), str):
            raise ValueError(f"a part of type {kind} needs its text")
        return text
    if not isinstance(kind, str) or kind not in MEDIA_PARTS:
        raise ValueError(f"only parts of type text are taken; {ONLY_TEXT}")
    inner = _inner_text(part)
    return joined_text(inner, info) if inner else _leave_out(MEDIA_PARTS[kind], info)


def _inner_text(part: Mapping[str, Any]) -> list[Any]:
    """The text of a document or search result that holds it itself, as parts."""
    source = part.get("source")
    if isinstance(source, Mapping) and source.get("type") == "text":
        return [{"type": "text", "text": source.get("data")}]
    found = source.get("content") if isinstance(source, Mapping) else part.get("content")
    if isinstance(found, str):
        return [{"type": "text", "text": found}]
    return found if isinstance(found, list) else []


def _leave_out(kind: str, info: ValidationInfo) -> str:
    reading = info.context if isinstance(info.context, Reading) else Reading()
    if reading.refuse_media:
        raise ValueError(ONLY_TEXT)
    reading.left_out.add(kind)
    return f"[{kind} left out: this model reads only text]"


def check_question(text: str, place: str) -> None:
    """Refuse a question of which nothing could be read, which an answer could only make up.

    Raises:
        ApiError: all parts of the last message were left out.
    """
    if _LEFT_OUT.fullmatch(text):
        raise bad_request(ONLY_TEXT, place)


_HEADER = re.compile(r"\Ax-anthropic-billing-header:[^\n]*")
_CHANGING = re.compile(r"(\bcch=)[^;\s]*|(\bcc_version=\d+\.\d+\.\d+\.)[^;\s]*")


def steady(system: str) -> str:
    """System text with constants for the values that Claude Code changes in its first line.

    They differ between requests or conversations, and with them no prompt would begin like another.
    """
    return _HEADER.sub(lambda line: _CHANGING.sub(lambda m: f"{m[1] or m[2]}0", line[0]), system)


def as_json(value: Any) -> str:
    """A JSON text, or a value as one: some clients send arguments as an object."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
#: A text, or a list of parts; of parts that are no text, a line that says so is left.
Content = Annotated[
    str,
    BeforeValidator(joined_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}),
]
#: Of a call in an earlier answer, as a JSON text. What is no JSON object is taken too: the model wrote it.
Arguments = Annotated[
    str,
    BeforeValidator(as_json),
    WithJsonSchema({"description": "A JSON text, or an object.", "default": "{}"}),
]
Name = Annotated[str, Field(pattern=_NAME)]
#: Taken, and of no consequence here.
Ignored = Annotated[Any, Field(description="Taken and ignored: it changes no answer.")]
Probability = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
MAX_TOKENS = 1 << 24
MaxTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


def _limit(value: int) -> int:
    if value == 0:
        raise ValueError("it has to be at least 1, or -1 for no limit")
    return value


#: A limit of tokens as OpenAI's clients send it; -1: none but the context's.
TokenLimit = Annotated[
    int,
    Field(ge=-1, le=MAX_TOKENS),
    AfterValidator(_limit),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_TOKENS}, {"const": -1}]}),
]
#: How many of the likeliest tokens to choose from; 0 and -1: all.
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


class Choice(NamedTuple):
    """Whether tools may or have to be called.

    Attributes:
        mode: "none": the model is not told of them; "required": it has to call one.
        tool: the one to be called.
        allowed: the names of those that there are for now; None: all.
    """

    mode: Mode
    tool: str | None = None
    allowed: Sequence[str] | None = None


class FunctionSpec(Part):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(default=None, description="Hold the arguments of calls to the schema.")

    def tool(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return function_tool(self.name, self.description, self.parameters)


def function_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A function in OpenAI's shape, without what was not said; without parameters it takes none."""
    said = {"name": name, "description": description, "parameters": parameters or NO_PARAMETERS}
    return {"type": "function", "function": {key: value for key, value in said.items() if value is not None}}
