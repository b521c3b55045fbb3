"""Schemas of OpenAI's Responses API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from godwit.server.errors import bad_request
from godwit.server.fields import (
    Arguments,
    BodyPart,
    Content,
    Ignored,
    Items,
    Mode,
    Name,
    Penalty,
    Probability,
    Temperature,
    TokenLimit,
    ToolChoice,
    check_question,
    stable_system,
)
from godwit.server.openai.response_tools import (
    INPUT,
    AnyTool,
    HostedTool,
    OfferedTool,
    is_known,
    joined,
    offered,
)
from godwit.server.openai.schemas import JsonSchema, NumLogprobs, StreamOptions
from godwit.server.prompts import Conversation, Message
from godwit.server.structured import Form
from godwit.server.thinking import ThinkingFields
from godwit.text.chat_template import Effort


class InputMessage(BodyPart):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCall(BodyPart):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments = "{}"
    namespace: str | None = None


class CustomCall(BodyPart):
    """A call of a custom tool in an earlier answer."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str
    namespace: str | None = None


class ItemReference(BodyPart):
    """A reference to an item of an earlier response."""

    type: Literal["item_reference"] = "item_reference"
    id: str


class FunctionOutput(BodyPart):
    """The result of a call."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Content = ""


class ReasoningText(BodyPart):
    """BodyPart of the thinking."""

    type: Literal["reasoning_text", "summary_text"] = "reasoning_text"
    text: str = ""


class ReasoningItem(BodyPart):
    """The thinking of an earlier answer; some clients keep only a summary."""

    type: Literal["reasoning"]
    content: Items[ReasoningText] | None = None
    summary: Items[ReasoningText] | None = None


def _kind(item: Any) -> str:
    if isinstance(item, dict) and "type" not in item and "role" not in item and "id" in item:
        return "item_reference"
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[CustomCall, Tag("custom_tool_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[FunctionOutput, Tag("custom_tool_call_output")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class ResponseNamedTool(BodyPart):
    """The one tool that must be called."""

    type: Literal["function", "custom"]
    name: Name
    namespace: str | None = None

    def allows(self, tool: OfferedTool) -> bool:
        """Whether this means ``tool``."""
        return tool.name == joined(self.namespace, self.name)


class NamedGroup(BodyPart):
    """All tools of a namespace."""

    type: Literal["namespace"]
    name: Name

    def allows(self, tool: OfferedTool) -> bool:
        """Whether this means ``tool``."""
        return tool.namespace == self.name


class ResponseAllowedTools(BodyPart):
    """The tools that may be called, and whether one must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[ResponseNamedTool | NamedGroup | HostedTool] = Field(min_length=1, max_length=256)

    def names(self, tools: Sequence[OfferedTool]) -> list[str]:
        """The names of those among ``tools``, and of those that are missing."""
        given = [one for one in self.tools if not isinstance(one, HostedTool)]
        missing = [one.name for one in given if not any(map(one.allows, tools))]
        return [*missing, *(tool.name for tool in tools if any(one.allows(tool) for one in given))]


class TextFormat(BodyPart):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None

    def echo(self) -> dict[str, Any]:
        """As responses repeat it."""
        if self.type != "json_schema":
            return {"type": self.type}
        schema = {"name": self.name, "description": self.description, "schema": self.schema_}
        return {"type": self.type, **schema, "strict": bool(self.strict)}


class TextConfig(BodyPart):
    """The form of an answer's text."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="Accepted and ignored."
    )


class ReasoningConfig(BodyPart):
    """How much to think; none turns thinking off where the template can."""

    effort: Effort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None
    context: Ignored = None


#: Optional parts of a response. Those of hosted tools are never there.
Include = Literal[
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
    "file_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]
#: Changes no answer, and is repeated in the response.
Echoed = (
    Annotated[str, Field(max_length=4096, description="Repeated in the response, otherwise ignored.")] | None
)


class ResponsesRequest(ThinkingFields):
    """A body for /v1/responses. Responses are not stored, so each request has the whole conversation."""

    input: str | Annotated[Items[Item], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_output_tokens: TokenLimit | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    tools: Items[AnyTool] = Field(default=[], max_length=256)
    tool_choice: Mode | ResponseNamedTool | ResponseAllowedTools = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Accepted and ignored: it limits calls of hosted tools."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="Accepted and ignored: what does not fit is always refused."
    )
    background: Literal[False] | None = None
    top_logprobs: NumLogprobs | None = None
    include: Items[Include] = Field(default=[], max_length=16)
    metadata: dict[str, Any] | None = None
    store: bool | None = Field(
        default=None, description="False: later requests cannot reference items of the response."
    )
    user: Echoed = None
    service_tier: Ignored = None
    safety_identifier: Echoed = None
    prompt_cache_key: Echoed = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    client_metadata: Ignored = None

    @model_validator(mode="after")
    def _logprobs_are_included(self) -> ResponsesRequest:
        if self.top_logprobs and self.logprobs() is None:
            raise ValueError("`top_logprobs` requires message.output_text.logprobs in `include`")
        return self

    @field_validator("tools", mode="before")
    @classmethod
    def _known_types(cls, tools: Any) -> Any:
        """An unknown type gets one clear error instead of a list of patterns."""
        for tool in tools if isinstance(tools, list) else ():
            kind = tool.get("type") if isinstance(tool, dict) else None
            if isinstance(kind, str) and not is_known(kind):
                raise ValueError(
                    f"unknown tool type {kind[:40]!r}; the model can call tools of type function, custom and "
                    "namespace"
                )
        return tools

    def logprobs(self) -> int | None:
        """Alternatives per token whose log probabilities are wanted; None: no log probabilities."""
        wanted = "message.output_text.logprobs" in self.include
        return (self.top_logprobs or 0) if wanted else None

    def choice(self) -> ToolChoice:
        """Which tools may or must be called."""
        asked = self.tool_choice
        if isinstance(asked, ResponseNamedTool):
            return ToolChoice("required", joined(asked.namespace, asked.name))
        if isinstance(asked, ResponseAllowedTools):
            return ToolChoice(asked.mode, None, asked.names(offered(self.tools)))
        return ToolChoice(asked)

    def conversation(self, tools: list[dict[str, Any]], variables: dict[str, Any]) -> Conversation:
        """The input of the chat template.

        Raises:
            ApiError: the last message has no readable part.
        """
        messages = self.messages()
        if messages[-1]["role"] == "user":
            check_question(messages[-1]["content"], f"input.{len(self.input) - 1}.content")
        return Conversation(messages, tools, variables)

    def messages(self) -> list[Message]:
        """The messages in the format of chat templates."""
        result: list[Message] = []
        if self.instructions:
            result.append({"role": "system", "content": stable_system(self.instructions)})
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            _append(result, item)
        for message in result:
            if isinstance(message["content"], list):
                message["content"] = "\n".join(message["content"])
        return result

    def form(self) -> Form | None:
        """The required form of the answer.

        Raises:
            ApiError: its schema is missing.
        """
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object" and not wanted.schema_:
            return Form("text", "object")
        if not wanted.schema_:
            raise bad_request("`text.format` of type json_schema needs a `schema`", "text")
        return Form("text", "schema", JsonSchema(schema=wanted.schema_).schema_)


def _append(messages: list[Message], item: Item) -> None:
    """Add an item. Thinking, text and calls of one answer become one message again.

    The text is kept in parts, which are joined at the end.
    """
    if isinstance(item, ItemReference):
        raise bad_request(f"the reference to the item {item.id[:80]!r} was not resolved", "input")
    if isinstance(item, FunctionOutput):
        messages.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
        return
    if isinstance(item, InputMessage) and item.role != "assistant":
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": item.content})
        return
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    has_output = last is not None and (bool(last["content"]) or "tool_calls" in last)
    if last is None or (isinstance(item, ReasoningItem) and has_output):
        last = {"role": "assistant", "content": []}
        messages.append(last)
    if isinstance(item, ReasoningItem):
        thoughts = "\n".join(part.text for part in item.content or item.summary or ())
        if thoughts:
            last["reasoning_content"] = thoughts
    elif isinstance(item, FunctionCall | CustomCall):
        given = item.arguments if isinstance(item, FunctionCall) else json.dumps({INPUT: item.input})
        function = {"name": joined(item.namespace, item.name), "arguments": given}
        last.setdefault("tool_calls", []).append(
            {"id": item.call_id, "type": "function", "function": function}
        )
    elif item.content:
        last["content"].append(item.content)
