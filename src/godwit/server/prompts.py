"""Prompts: from conversations to token ids, and the positions at which a later prompt may diverge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from anyio.to_thread import run_sync
from starlette.requests import Request

from godwit.dialect.dialect import Dialect
from godwit.dialect.mistral_calls import with_short_ids
from godwit.dialect.tags import END_THINK, THINK
from godwit.engine.chat_prompt import ChatRenderer, Prompt, opens_thinking, rewrites_thinking
from godwit.errors import GodwitError
from godwit.server.connections.clients import in_turn
from godwit.server.connections.fair_queue import FairQueue
from godwit.server.errors import ApiError, bad_request, too_long
from godwit.server.limits import Limits
from godwit.text.tokenizer import Tokenizer

Message = dict[str, Any]
PROMPT_WORKERS, PROMPTS_WAITING = 2, 256
_Result = TypeVar("_Result")
_THINKS = (
    "this model thinks before it answers, so a message can be continued only with thinking turned off (where "
    "the template can do that) or together with the thinking that came before it"
)
#: Variables that only the server may set, parameters of the template renderer, and Jinja's own names.
RESERVED = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "documents", "chat_template"),
        *("self", "super", "loop", "caller", "varargs", "kwargs"),
        *("range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"),
    }
)


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template.

    Attributes:
        messages: in OpenAI's format, with plain text as content.
        tools: in OpenAI's format.
        variables: further variables of the template.
        prefill: the beginning of the answer.
        thoughts: the thinking before it.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""
    thoughts: str = ""

    @property
    def begun(self) -> bool:
        """Whether the answer continues a given beginning."""
        return bool(self.prefill or self.thoughts)

    def continuing(self) -> Conversation:
        """The same conversation, with its last message as the beginning of the answer.

        Raises:
            ApiError: the last message cannot be continued.
        """
        last = self.messages[-1]
        if last["role"] != "assistant" or last.get("tool_calls"):
            raise bad_request(
                "only an assistant message without tool calls can be continued, and only the last one",
                "messages",
            )
        begun = {"prefill": last["content"], "thoughts": last.get("reasoning_content", "")}
        return replace(self, messages=self.messages[:-1], **begun)


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse invalid variables, and those that would replace the template's own.

    Raises:
        ApiError: there is one.
    """
    for name, value in variables.items():
        reserved = name in RESERVED or name.endswith("_token") or not name.isidentifier()
        if reserved or not isinstance(value, str | int | float | bool):
            raise bad_request(
                f"chat_template_kwargs cannot set {name[:40]!r} to that", "chat_template_kwargs"
            )


class PromptMaker:
    """Makes prompts with a model's tokenizer and chat template. Thread-safe.

    Args:
        tokenizer: the model's.
        context: the model's context in tokens.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer = tokenizer
        self.longest = max(len(tokenizer.id_to_token(id) or "") for id in range(tokenizer.vocab_size))
        self.max_chars = context * self.longest
        self.context = context
        self._rewrites = rewrites_thinking(tokenizer)

    def check_size(self, *texts: str) -> None:
        """Refuse texts that are too long whatever their tokens, before any work is done.

        Raises:
            ApiError: they are too long.
        """
        self._check_chars(sum(map(len, texts)))

    def _check_chars(self, size: int) -> None:
        if size > self.max_chars:
            raise too_long(self.context, -(-size // self.longest))  # a lower bound of its tokens

    def text(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> Prompt:
        """A plain text. Control tokens are recognized only with ``parse_special``."""
        ids = self.tokenizer.encode(text, allow_special=parse_special, add_special_tokens=add_special_tokens)
        return Prompt(tuple(ids))

    def chat(self, conversation: Conversation) -> Prompt:
        """The prompt of a conversation, up to where the answer begins.

        Raises:
            TemplateError: the template refuses it.
            ApiError: it is too long, or its prefill cannot follow the prompt.
        """
        self._check_chars(num_chars(conversation))
        renderer, ids, end = self._before_answer(conversation)
        if conversation.prefill and not conversation.thoughts and opens_thinking(end):
            conversation = _without_thinking(conversation)
            renderer, ids, end = self._before_answer(conversation)
            if opens_thinking(end):
                raise bad_request(_THINKS)
        if not self._rewrites or end.rstrip().endswith(END_THINK):  # the template leaves no room for thoughts
            conversation = replace(conversation, thoughts="")
        opened = opens_thinking(end)
        thinking = (opened or bool(conversation.thoughts)) and not conversation.prefill
        boundaries = renderer.boundaries(conversation.messages, ids, begun=conversation.begun)
        return Prompt((*ids, *self._beginning(conversation, opened)), boundaries, thinking)

    def _before_answer(self, conversation: Conversation) -> tuple[ChatRenderer, list[int], str]:
        """(what renders the prompt, its ids up to where the answer begins, the text at their end)."""
        renderer = ChatRenderer(self.tokenizer, conversation.tools, conversation.variables)
        ids = renderer.encode(conversation.messages)
        return renderer, ids, renderer.end_of(ids)

    def _beginning(self, conversation: Conversation, opened: bool) -> list[int]:
        """The given part of the answer; only the tags around the thoughts are control tokens."""
        ids: list[int] = []
        if conversation.thoughts:
            ids += [] if opened else self._words(f"{THINK}\n", allow_special=True)
            ids += self._words(conversation.thoughts)
            ids += self._words(f"\n{END_THINK}\n\n", allow_special=True) if conversation.prefill else []
        return ids + (self._words(conversation.prefill) if conversation.prefill else [])

    def _words(self, text: str, *, allow_special: bool = False) -> list[int]:
        return self.tokenizer.encode(text, allow_special=allow_special, add_special_tokens=False)


class PromptQueue:
    """Makes the prompts of requests in threads; the clients take turns.

    Args:
        maker: makes them.
        limits: of messages and tools.
        dialect: of the model's tool calls.
    """

    def __init__(self, maker: PromptMaker, limits: Limits, dialect: Dialect | None) -> None:
        self.maker = maker
        self._limits = limits
        self._short_ids = dialect is not None and dialect.short_ids
        self._queue = FairQueue(PROMPT_WORKERS, PROMPTS_WAITING)

    async def run(self, request: Request, work: Callable[[], _Result]) -> _Result:
        """Run work on prompts.

        Raises:
            ApiError: it failed, too many requests are waiting, or the client left.
        """
        return await in_turn(request, self._queue, work)

    async def make_prompt(self, request: Request, conversation: Conversation) -> Prompt:
        """The prompt of a conversation.

        Raises:
            ApiError: it is too long or refused by the template, too many are waiting, or the client left.
        """
        limits = self._limits
        if len(conversation.messages) > limits.messages or len(conversation.tools) > limits.tools:
            raise bad_request(f"a request may have {limits.messages} messages and {limits.tools} tools")
        if self.maker.tokenizer.chat_template is None:
            raise bad_request("this model has no chat template; send plain prompts to /v1/completions")
        check_variables(conversation.variables)
        if self._short_ids:
            conversation = replace(conversation, messages=with_short_ids(conversation.messages))
        return await self.run(request, lambda: self.maker.chat(conversation))

    async def warm(self) -> None:
        """Start the template process, so that the first request need not wait for it."""
        if self.maker.tokenizer.chat_template is not None:
            with contextlib.suppress(GodwitError, ApiError):
                await run_sync(self.maker.chat, Conversation([{"role": "user", "content": "."}]))


def num_chars(conversation: Conversation) -> int:
    """The number of characters in all texts that a template could write: of messages, tools, variables."""
    size, left = 0, [*vars(conversation).values()]
    while left:
        value = left.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Mapping):
            left += value
            left += value.values()
        elif isinstance(value, Sequence):
            left += value
    return size


def _without_thinking(conversation: Conversation) -> Conversation:
    """The conversation with thinking turned off, for an answer that has begun.

    Raises:
        ApiError: the request asks for thinking.
    """
    if conversation.variables.get("enable_thinking"):
        raise bad_request(_THINKS)
    return replace(conversation, variables={**conversation.variables, "enable_thinking": False})
