"""What clients of OpenAI's API may send to /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from godwit.chat_template import Effort
from godwit.server.errors import bad_request
from godwit.server.fields import (
    Arguments,
    Choice,
    Content,
    FunctionSpec,
    Ignored,
    MaxTokens,
    Mode,
    Name,
    Part,
    Probability,
    Temperature,
    check_question,
    steady,
)
from godwit.server.forms import Form
from godwit.server.prompts import Conversation, Message
from godwit.server.protocol import JsonSchema, NumLogprobs, StreamOptions
from godwit.server.thinking import ThinkingFields


class InputMessage(Part):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCall(Part):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments = "{}"


class FunctionOutput(Part):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content = ""


class ReasoningText(Part):
    """A part of what was thought."""

    type: Literal["reasoning_text", "summary_text"] = "reasoning_text"
    text: str = ""


class ReasoningItem(Part):
    """What an earlier answer had thought; some clients keep only a summary of it."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: list[ReasoningText] | None = None


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class ResponseTool(FunctionSpec):
    """A function that the model may call; tools that the server would have to run are not there."""

    type: Literal["function"]


class NamedTool(Part):
    """The one function that is to be called."""

    type: Literal["function"]
    name: Name


class AllowedTools(Part):
    """Those of the tools that may be called now, and whether one has to be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=256)


class TextFormat(Part):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class TextConfig(Part):
    """How the text of an answer is to be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Part):
    """How much the model is to think; none turns it off where the template can."""

    effort: Effort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None
    context: Ignored = None


class ResponsesRequest(ThinkingFields):
    """A body for /v1/responses. Nothing is stored, so each request brings the whole conversation."""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    tools: list[ResponseTool] = Field(default=[], max_length=256)
    tool_choice: Mode | NamedTool | AllowedTools = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    top_logprobs: NumLogprobs | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] = Field(
        default=[], max_length=16
    )
    metadata: dict[str, Any] | None = None
    store: Ignored = None
    user: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    client_metadata: Ignored = None

    @model_validator(mode="after")
    def _logprobs_are_included(self) -> ResponsesRequest:
        if self.top_logprobs and self.logprobs() is None:
            raise ValueError("`top_logprobs` needs `include` to have message.output_text.logprobs")
        return self

    @field_validator("tools", mode="before")
    @classmethod
    def _only_functions(cls, tools: Any) -> Any:
        for tool in tools if isinstance(tools, list) else ():
            if isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function":
                raise ValueError("only tools of type function are served: those that the client runs")
        return tools

    def logprobs(self) -> int | None:
        """How many tokens to tell the probabilities of beside those of the text; None: of none at all."""
        wanted = "message.output_text.logprobs" in self.include
        return (self.top_logprobs or 0) if wanted else None

    def choice(self) -> Choice:
        """Which tools may or have to be called."""
        asked = self.tool_choice
        if isinstance(asked, NamedTool):
            return Choice("required", asked.name)
        if isinstance(asked, AllowedTools):
            return Choice(asked.mode, None, [tool.name for tool in asked.tools])
        return Choice(asked)

    def conversation(self, tools: list[dict[str, Any]], variables: dict[str, Any]) -> Conversation:
        """The conversation in the shape of chat templates.

        Raises:
            ApiError: its last message has nothing that could be read.
        """
        messages = self.messages()
        if messages[-1]["role"] == "user":
            check_question(messages[-1]["content"], f"input.{len(self.input) - 1}.content")
        return Conversation(messages, tools, variables)

    def messages(self) -> list[Message]:
        """The messages in the shape of chat templates."""
        result: list[Message] = []
        if self.instructions:
            result.append({"role": "system", "content": steady(self.instructions)})
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            _append(result, item)
        return result

    def form(self) -> Form | None:
        """What the answer has to be held to.

        Raises:
            ApiError: it is not said.
        """
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return Form("text", "object")
        if not wanted.schema_:
            raise bad_request("`text.format` of type json_schema needs a `schema`", "text")
        return Form("text", "schema", JsonSchema(schema=wanted.schema_).schema_)


def _append(messages: list[Message], item: Item) -> None:
    """Add an item; what one answer had thought, said and called becomes one message again."""
    if isinstance(item, FunctionOutput):
        messages.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
        return
    if isinstance(item, InputMessage) and item.role != "assistant":
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": item.content})
        return
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or (isinstance(item, ReasoningItem) and (last["content"] or last.get("tool_calls"))):
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    if isinstance(item, ReasoningItem):
        thoughts = "\n".join(part.text for part in item.content or item.summary or ())
        if thoughts:
            last["reasoning_content"] = thoughts
    elif isinstance(item, FunctionCall):
        function = {"name": item.name, "arguments": item.arguments}
        last.setdefault("tool_calls", []).append(
            {"id": item.call_id, "type": "function", "function": function}
        )
    else:
        last["content"] = "\n".join(filter(None, [last["content"], item.content]))
