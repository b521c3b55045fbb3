"""Fields that several APIs share: what texts and tools look like, and what becomes of other kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
MAX_NAME = 128
_NAME = rf"^[A-Za-z0-9_.:/-]{{1,{MAX_NAME}}}$"


class Request(BaseModel):
    """A body: fields that are not listed are refused, since they would not be honoured."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(BaseModel):
    """An object within a body: what is not listed changes nothing, as in answers that are sent back."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


def joined_text(content: Any) -> Any:
    """The text of a message's content, which may be a list of parts; ValueError for other parts than text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in TEXT_PARTS:
            raise ValueError(
                "only parts of type text are taken: this model reads neither images, sounds nor files, and "
                "nothing is fetched from addresses"
            )
        if not isinstance(text := part.get(TEXT_PARTS[kind]), str):
            raise ValueError(f"a part of type {kind} needs its text")
        texts.append(text)
    return "\n".join(texts)


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
#: A text, or a list of parts that are texts.
Content = Annotated[
    str,
    BeforeValidator(joined_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}),
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
        raise ValueError("it has to be at least 1; -1 is no limit")
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
    list[StopText],
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
        """In OpenAI's shape, without what was not said."""
        said = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {
            "type": "function",
            "function": {key: value for key, value in said.items() if value is not None},
        }
