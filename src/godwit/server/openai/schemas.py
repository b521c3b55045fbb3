"""Schemas of OpenAI's chat completions, and the fields that other routes share with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from godwit.server.errors import bad_request
from godwit.server.fields import (
    MAX_TOKENS,
    Arguments,
    BodyPart,
    Content,
    FunctionSpec,
    Ignored,
    Items,
    Mode,
    Name,
    Penalty,
    Probability,
    RequestBody,
    Salt,
    Seed,
    Stops,
    Temperature,
    TokenId,
    TokenLimit,
    ToolChoice,
    TopK,
    check_question,
    stable_system,
)
from godwit.server.openai.neutral import NeutralFields
from godwit.server.prompts import Conversation, Message
from godwit.server.structured import Form
from godwit.server.thinking import ThinkingFields
from godwit.text.chat_template import Effort

MAX_CHOICES = 16
MAX_BIASES = 1024
MAX_STOP_IDS = 1024

NumChoices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
NumLogprobs = Annotated[int, Field(ge=0, le=20)]


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} biases are allowed; there are {len(biases)}")
    return biases


Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    BeforeValidator(_few),  # pydantic checks the length of a dict only after its entries
]


class CalledFunction(BodyPart):
    """The function of a tool call."""

    name: str
    arguments: Arguments = "{}"


class CalledTool(BodyPart):
    """A tool call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def call(self) -> dict[str, Any]:
        """In the format of chat templates."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return ({} if self.id is None else {"id": self.id}) | {"type": self.type, "function": function}


class ChatMessage(BodyPart):
    """A message.

    Attributes:
        reasoning_content: the thinking of an earlier answer; some clients send it back as ``reasoning``.
        prefix, partial: two names of one flag: the answer continues this message, the last one.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    tool_calls: Items[CalledTool] | None = Field(default=None, max_length=256)
    tool_call_id: str | None = None
    name: str | None = None
    prefix: bool = False
    partial: bool = False

    @model_validator(mode="before")
    @classmethod
    def _thoughts_apart(cls, message: Any) -> Any:
        """Move thinking out of the content, where some clients send it back."""
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list) or message.get("role") != "assistant":
            return message
        thoughts = [part["thinking"] for part in content if _is_thinking(part)]
        rest = [part for part in content if not _is_thinking(part)]
        moved = {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
        return {**moved, **message, "content": rest}

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.role not in ("assistant", "tool"):
            raise ValueError(f"a message of the role {self.role} needs content")
        return self

    def message(self) -> Message:
        """In the format of chat templates."""
        role = "system" if self.role == "developer" else self.role
        content = self.content or ""
        message: Message = {"role": role, "content": stable_system(content) if role == "system" else content}
        thoughts = self.reasoning_content or self.reasoning
        if self.role == "assistant" and isinstance(thoughts, str) and thoughts:
            message["reasoning_content"] = thoughts
        if self.role == "assistant" and self.tool_calls:
            message["tool_calls"] = [call.call() for call in self.tool_calls]
        if self.role == "tool":
            message |= {"tool_call_id": self.tool_call_id or "", "name": self.name or ""}
        return message


def _is_thinking(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "thinking" and isinstance(part.get("thinking"), str)


class Tool(BodyPart):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(BodyPart):
    """A function by its name."""

    name: Name


class NamedTool(BodyPart):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedFunctions(BodyPart):
    """The tools that may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Items[NamedTool] = Field(min_length=1, max_length=256)


class AllowedTools(BodyPart):
    """A subset of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


class JsonSchema(BodyPart):
    """The JSON schema of an answer."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(BodyPart):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(
        default=None, alias="schema", description="The schema itself, as llama.cpp's clients send it."
    )

    def form(self, field: str) -> Form | None:
        """The required form of the answer."""
        schema = self.schema_ if self.json_schema is None else self.json_schema.schema_
        if self.type == "text":
            if schema is not None:
                raise bad_request(f"`{field}` has a schema; set its type to json_schema", field)
            return None
        if schema is not None:
            return Form(field, "schema", schema)
        if self.type == "json_object":
            return Form(field, "object")
        raise bad_request(f"`{field}` of type json_schema needs `json_schema`", field)


class StructuredOutputs(BodyPart):
    """The form of an answer: an extension of the API, under vLLM's name."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar and json_object")
        return self

    def form(self, field: str) -> Form:
        """The required form of the answer."""
        if self.json_ is not None:
            return Form(field, "schema", self.json_)
        if self.regex is not None:
            return Form(field, "regex", self.regex)
        if self.grammar is not None:
            return Form(field, "grammar", self.grammar)
        return Form(field, "object") if self.choice is None else Form(field, "choice", self.choice)


class StreamOptions(BodyPart):
    """What a stream has besides the answer."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class SharedFields(NeutralFields):
    """The fields of both kinds of completions; top_k to min_tokens are extensions."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: NumChoices = 1
    max_tokens: TokenLimit | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool = Field(default=False, description="The model's stop tokens do not end the answer.")
    stop_token_ids: Annotated[Items[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    cache_salt: Salt = ""
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _options_of_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream` to be true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def form(self) -> Form | None:
        """The required form of the answers."""
        asked = self.structured_outputs
        return None if asked is None else asked.form("structured_outputs")

    def choosing(self) -> dict[str, Any]:
        """Arguments of SamplingParams."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "seed", "max_tokens", "min_tokens", "ignore_eos",
                 "stop_token_ids")  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        bias = None if self.logit_bias is None else {int(id): value for id, value in self.logit_bias.items()}
        return given | {"logit_bias": bias, "stop": self.stop}


class Continuing(RequestBody):
    """Whether the answer continues the last message."""

    add_generation_prompt: bool | None = Field(
        default=None, description="False only with continue_final_message, which is its opposite."
    )
    continue_final_message: bool = Field(
        default=False, description="The answer continues the last message, which must be the assistant's."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("`continue_final_message` and `add_generation_prompt` cannot both be true")
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise ValueError("`add_generation_prompt: false` needs `continue_final_message: true`")
        return self

    def conversation_of(
        self, messages: list[ChatMessage], tools: list[dict[str, Any]], variables: dict[str, Any]
    ) -> Conversation:
        """The input of the chat template.

        Raises:
            ApiError: the last message cannot be continued, or has no readable part.
        """
        last = messages[-1]
        if last.role == "user":
            check_question(last.content or "", f"messages.{len(messages) - 1}.content")
        flags = [place for place, message in enumerate(messages) if message.prefix or message.partial]
        if any(place != len(messages) - 1 for place in flags):
            raise bad_request("only the last message can be continued", f"messages.{flags[0]}")
        conversation = Conversation([message.message() for message in messages], tools, variables)
        return conversation.continuing() if self.continue_final_message or flags else conversation


class ChatRequest(SharedFields, Continuing, ThinkingFields):
    """A body for /v1/chat/completions."""

    messages: Items[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool = False
    top_logprobs: NumLogprobs | None = None
    tools: Items[Tool] = Field(default=[], max_length=256)
    tool_choice: Mode | NamedTool | AllowedTools = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = Field(
        default=None, description="How much to think; none turns thinking off where the template can."
    )
    chat_template_kwargs: dict[str, Any] = Field(default={}, max_length=16)
    modalities: Items[Literal["text"]] | None = None
    add_special_tokens: Literal[False] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="Accepted and ignored."
    )
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None

    def choice(self) -> ToolChoice:
        """Which tools may or must be called."""
        asked = self.tool_choice
        if isinstance(asked, NamedTool):
            return ToolChoice("required", asked.function.name)
        if isinstance(asked, AllowedTools):
            functions = asked.allowed_tools
            return ToolChoice(functions.mode, None, [tool.function.name for tool in functions.tools])
        return ToolChoice(asked)

    def form(self) -> Form | None:
        wanted = self.response_format.form("response_format") if self.response_format else None
        other = super().form()
        if wanted is not None and other is not None:
            raise bad_request("`response_format` and `structured_outputs` cannot be combined")
        return wanted or other

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body: Any) -> Any:
        if isinstance(body, dict) and "chat_template" in body:
            raise ValueError("`chat_template` is not accepted: the model's own is used; remove it")
        if isinstance(body, dict) and body.keys() & {"functions", "function_call"}:
            raise ValueError("`functions` and `function_call` are deprecated; use `tools` and `tool_choice`")
        return body

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("requires `logprobs` to be true")
        return value
