"""From conversations to token ids, and to the places in them where a later request may go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from godwit.engine.chat_prompt import ChatRenderer, Prompt, opens_thinking, rewrites_thinking
from godwit.engine.constraint_grammar import END_THINK, THINK
from godwit.server.errors import bad_request, too_long
from godwit.tokenizer import Tokenizer

Message = dict[str, Any]
_THINKS = (
    "this model thinks before it answers, so a message can be continued only with thinking turned off (where "
    "the template can do that) or together with the thinking that came before it"
)
#: Variables that are the server's to set, parameters of what renders templates, and Jinja's own names.
RESERVED = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "documents", "chat_template"),
        *("self", "super", "loop", "caller", "varargs", "kwargs"),
        *("range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"),
    }
)


@dataclass(frozen=True)
class Conversation:
    """What a chat template makes a prompt of.

    Attributes:
        messages: in the shape of OpenAI's API, their contents plain texts.
        tools: likewise.
        variables: what else the template is told.
        prefill: how the answer begins.
        thoughts: what was thought before it.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""
    thoughts: str = ""

    @property
    def begun(self) -> bool:
        """Whether the beginning of the answer is given."""
        return bool(self.prefill or self.thoughts)

    def continuing(self) -> Conversation:
        """The same conversation, with its last message as the beginning of the answer.

        Raises:
            ApiError: that is not a message of the assistant that can be continued.
        """
        last = self.messages[-1]
        if last["role"] != "assistant" or last.get("tool_calls"):
            raise bad_request(
                "only a last message of the assistant can be continued, and only one without tool calls",
                "messages",
            )
        begun = {"prefill": last["content"], "thoughts": last.get("reasoning_content", "")}
        return replace(self, messages=self.messages[:-1], **begun)


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse what cannot be a variable, and variables that would take the place of the template's own.

    Raises:
        ApiError: there is one.
    """
    for name, value in variables.items():
        reserved = name in RESERVED or name.endswith("_token") or not name.isidentifier()
        if reserved or not isinstance(value, str | int | float | bool):
            raise bad_request(
                f"chat_template_kwargs cannot set {name[:40]!r} like this", "chat_template_kwargs"
            )


class PromptMaker:
    """Makes prompts with the tokenizer of a model. For several threads.

    Args:
        tokenizer: the model's.
        context: tokens that the model reads.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer = tokenizer
        self.longest = max(len(tokenizer.id_to_token(id) or "") for id in range(tokenizer.vocab_size))
        self.max_chars = context * self.longest
        self.context = context
        self._rewrites = rewrites_thinking(tokenizer)

    def check_size(self, *texts: str) -> None:
        """Refuse texts that cannot but be too long, before any work is done with them.

        Raises:
            ApiError: they are.
        """
        self._check_chars(sum(map(len, texts)))

    def _check_chars(self, size: int) -> None:
        if size > self.max_chars:
            raise too_long(self.context, -(-size // self.longest))  # of tokens at least so many

    def text(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> Prompt:
        """A plain text, in which control tokens are read only with ``parse_special``."""
        ids = self.tokenizer.encode(text, allow_special=parse_special, add_special_tokens=add_special_tokens)
        return Prompt(tuple(ids))

    def chat(self, conversation: Conversation) -> Prompt:
        """A conversation whose next message is the model's.

        Raises:
            TemplateError: the template does not take it.
            ApiError: it cannot but be too long, or its prefill cannot be put behind the prompt.
        """
        self._check_chars(num_chars(conversation))
        renderer, ids, end = self._before_answer(conversation)
        if conversation.prefill and not conversation.thoughts and opens_thinking(end):
            conversation = _without_thinking(conversation)
            renderer, ids, end = self._before_answer(conversation)
            if opens_thinking(end):
                raise bad_request(_THINKS)
        if not self._rewrites or end.rstrip().endswith(END_THINK):  # there is no place for thoughts
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
        """The part of the answer that is given; only the tags around the thoughts are control tokens."""
        ids: list[int] = []
        if conversation.thoughts:
            ids += [] if opened else self._words(f"{THINK}\n", allow_special=True)
            ids += self._words(conversation.thoughts)
            ids += self._words(f"\n{END_THINK}\n\n", allow_special=True) if conversation.prefill else []
        return ids + (self._words(conversation.prefill) if conversation.prefill else [])

    def _words(self, text: str, *, allow_special: bool = False) -> list[int]:
        return self.tokenizer.encode(text, allow_special=allow_special, add_special_tokens=False)


def num_chars(conversation: Conversation) -> int:
    """How many characters all texts have that a template could write, be they of messages or of tools."""
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
    """The conversation with the thinking before the answer turned off, for an answer that has begun.

    Raises:
        ApiError: thinking was asked for.
    """
    if conversation.variables.get("enable_thinking"):
        raise bad_request(_THINKS)
    return replace(conversation, variables={**conversation.variables, "enable_thinking": False})
