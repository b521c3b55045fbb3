"""Schemas of Anthropic's Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, model_validator

from godwit.server.errors import bad_request
from godwit.server.fields import (
    MAX_TOKENS,
    BodyPart,
    Content,
    Ignored,
    Input,
    Items,
    MaxTokens,
    Name,
    Probability,
    RequestBody,
    StopText,
    TopK,
    as_json,
    check_question,
    function_tool,
    stable_system,
    text_of,
)
from godwit.server.prompts import Conversation, Message
from godwit.server.structured import Form
from godwit.server.thinking import ThinkingWish
from godwit.text.chat_template import Effort


class TextBlock(BodyPart):
    """Text."""

    type: Literal["text"]
    text: str


class MediaBlock(BodyPart):
    """An image or file: its text if it has any, else a line that says it was left out."""

    type: Literal["image", "document", "file", "container_upload", "search_result"]
    text: str = ""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, block: Any, info: ValidationInfo) -> Any:
        return {"type": block["type"], "text": text_of(block, info)} if isinstance(block, dict) else block


class ThinkingBlock(BodyPart):
    """The thinking of an earlier answer."""

    type: Literal["thinking"]
    thinking: str = ""


class HiddenBlock(BodyPart):
    """Encrypted thinking, which is left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(BodyPart):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Input = Field(default_factory=dict, description="An object; other values are accepted too.")


class ToolResultBlock(BodyPart):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Content = ""
    is_error: bool | None = None


Block = Annotated[
    TextBlock | MediaBlock | ThinkingBlock | HiddenBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]


class AnthropicMessage(BodyPart):
    """A message: a text, or blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | Items[Block]

    @model_validator(mode="after")
    def _belongs(self) -> AnthropicMessage:
        kinds = {
            "user": ("text", "tool_result", *get_args(MediaBlock.model_fields["type"].annotation)),
            "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
        }
        allowed = kinds.get(self.role, ("text",))
        for block in self.blocks():
            if block.type not in allowed:
                raise ValueError(
                    f"a block of type {block.type} is not allowed in a message of the {self.role}"
                )
        return self

    def blocks(self) -> list[Block]:
        """The content as blocks."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    def messages(self) -> list[Message]:
        """In the format of chat templates; results of tools come before the user's text."""
        blocks = self.blocks()
        text = "\n".join(block.text for block in blocks if isinstance(block, TextBlock | MediaBlock))
        if self.role != "assistant":
            results = [_result(block) for block in blocks if isinstance(block, ToolResultBlock)]
            return results if results and not text else [*results, {"role": self.role, "content": text}]
        message: Message = {"role": "assistant", "content": text}
        if thoughts := "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
            message["reasoning_content"] = thoughts
        if calls := [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]:
            message["tool_calls"] = calls
        return [message]


def _result(block: ToolResultBlock) -> Message:
    content = f"Error: {block.content}" if block.is_error else block.content
    return {"role": "tool", "content": content, "tool_call_id": block.tool_use_id}


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": as_json(block.input)}
    return {"id": block.id, "type": "function", "function": function}


class MessageTool(BodyPart):
    """A tool that the client runs."""

    type: Literal["custom"] = "custom"
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def tool(self) -> dict[str, Any]:
        """In OpenAI's format."""
        return function_tool(self.name, self.description, self.input_schema)


class MessageToolChoice(BodyPart):
    """Whether tools may, must or must not be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _names_a_tool(self) -> MessageToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("`name` is required with the type tool, and not allowed otherwise")
        return self


class ThinkingConfig(BodyPart):
    """Whether the model thinks first, and a limit of its thinking in tokens."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None


class OutputFormat(BodyPart):
    """The JSON schema of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BodyPart):
    """How much to think, and the form of the answer."""

    effort: Effort | None = None
    format: OutputFormat | None = None


class ContextEdit(BodyPart):
    """An edit of the context; only one that keeps everything is supported."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(BodyPart):
    """Edits of the context before it is read."""

    edits: Items[ContextEdit] = Field(default=[])


class CountRequest(RequestBody):
    """A body for /v1/messages/count_tokens."""

    model: str
    messages: Items[AnthropicMessage] = Field(min_length=1, max_length=4096)
    system: Content | None = None
    tools: Items[MessageTool] = Field(default=[], max_length=256)
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(
        default=None, description="The earlier name of `output_config.format`."
    )
    context_management: ContextManagement | None = None
    cache_control: Ignored = None

    def wish(self) -> ThinkingWish:
        """How much to think."""
        effort = self.output_config.effort if self.output_config else None
        if self.thinking is None:
            return ThinkingWish(effort=effort)
        on = self.thinking.type != "disabled"
        return ThinkingWish(on=on, effort=effort, budget=self.thinking.budget_tokens if on else None)

    def conversation(self, tools: list[dict[str, Any]], variables: dict[str, Any]) -> Conversation:
        """The input of the chat template.

        Raises:
            ApiError: the last message cannot be continued, or has no readable part.
        """
        messages = self.all_messages()
        if self.messages[-1].role == "user" and messages[-1]["role"] == "user":
            check_question(messages[-1]["content"], f"messages.{len(self.messages) - 1}.content")
        conversation = Conversation(messages, tools, variables)
        return conversation.continuing() if self._is_begun() else conversation

    def all_messages(self) -> list[Message]:
        """The messages in the format of chat templates."""
        system = [{"role": "system", "content": stable_system(self.system)}] if self.system else []
        return [*system, *(message for part in self.messages for message in part.messages())]

    def _is_begun(self) -> bool:
        """Whether the answer continues the last message.

        Raises:
            ApiError: it should, but cannot.
        """
        last = self.messages[-1]
        if last.role != "assistant":
            return False
        if any(block.type not in ("text", "thinking", "redacted_thinking") for block in last.blocks()):
            raise bad_request(
                "a last message of the assistant can be continued only if it is text", "messages"
            )
        text = "\n".join(block.text for block in last.blocks() if isinstance(block, TextBlock))
        if not text or text != text.rstrip():
            raise bad_request(
                "the last message of the assistant must not be empty or end with whitespace", "messages"
            )
        return True


class MessagesRequest(CountRequest):
    """A body for /v1/messages."""

    max_tokens: MaxTokens
    stream: bool = False
    stop_sequences: Annotated[Items[StopText], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    metadata: Ignored = None
    service_tier: Ignored = None

    def form(self) -> Form | None:
        """The required form of the answer."""
        wanted = self.output_config.format if self.output_config else None
        if wanted is not None and self.output_format not in (None, wanted):
            raise bad_request(
                "`output_format` and `output_config.format` differ; send one of them", "output_format"
            )
        field, form = ("output_config", wanted) if wanted else ("output_format", self.output_format)
        return None if form is None else Form(field, "schema", form.schema_)
