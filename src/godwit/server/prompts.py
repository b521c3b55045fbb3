"""From conversations to token ids, and to the places in them where a later request may go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from godwit.dialect.tags import END_THINK, THINK
from godwit.engine import opens_thinking
from godwit.errors import TemplateError
from godwit.server.errors import bad_request, too_long
from godwit.tokenizer import Tokenizer

Message = dict[str, Any]
#: How many beginnings of a conversation are rendered where its tokens do not tell its messages apart.
MAX_RENDERED = 8
#: Between the end of the last message and that of the prompt are only the words that open the answer.
NEAR_END = 16
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
class Prompt:
    """What the model is to continue.

    Attributes:
        ids: the whole text.
        boundaries: positions at which a later prompt may differ from this one.
        thinking: the answer begins within ``<think>``.
    """

    ids: tuple[int, ...]
    boundaries: tuple[int, ...] = ()
    thinking: bool = False


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
        template = tokenizer.chat_template
        self._rewrites = template is not None and THINK in template.source

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
        ids, end = self._before_answer(conversation)
        if conversation.prefill and not conversation.thoughts and opens_thinking(end):
            conversation = _without_thinking(conversation)
            ids, end = self._before_answer(conversation)
            if opens_thinking(end):
                raise bad_request(_THINKS)
        if not self._rewrites or end.rstrip().endswith(END_THINK):  # there is no place for thoughts
            conversation = replace(conversation, thoughts="")
        opened = opens_thinking(end)
        thinking = (opened or bool(conversation.thoughts)) and not conversation.prefill
        boundaries = self._boundaries(conversation, ids)
        return Prompt((*ids, *self._beginning(conversation, opened)), boundaries, thinking)

    def _before_answer(self, conversation: Conversation) -> tuple[list[int], str]:
        """(ids of the prompt up to where the answer begins, the text at their end)."""
        ids = self._encode(conversation, conversation.messages, add_generation_prompt=True)
        return ids, self.tokenizer.decode(ids[-16:], skip_special=False)

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

    def _encode(self, conversation: Conversation, messages: Sequence[Message], **more: Any) -> list[int]:
        tools = list(conversation.tools) or None
        return self.tokenizer.encode_chat(messages, tools=tools, **more, **conversation.variables)

    def _boundaries(self, conversation: Conversation, ids: list[int]) -> tuple[int, ...]:
        """The ends of the messages, and where the prompt of the next turn will leave this one.

        The template ends each message with a stop token in most models; a literal one in a message is no
        token. Where there are none, beginnings of the conversation are rendered and compared. Templates that
        know thinking leave that of earlier turns out, so their next prompt is rendered too.
        """
        messages = conversation.messages
        ends = {place + 1 for place, id in enumerate(ids) if id in self.tokenizer.stop_ids}
        beginnings: list[Sequence[Message]] = []
        if self._rewrites or not ends:
            turn = [{"role": "assistant", "content": "."}, {"role": "user", "content": "."}]
            beginnings.append([*messages, *turn])
        if not ends:
            sizes = range(1, len(messages))
            chosen = [*islice(sizes, MAX_RENDERED // 2), *sizes[-(MAX_RENDERED // 2) :]]
            beginnings += [messages[:size] for size in sorted(set(chosen))]
        for beginning in beginnings:
            try:
                other = self._encode(conversation, beginning, add_generation_prompt=False)
            except TemplateError:  # some templates want their messages in a certain order
                continue
            ends.add(_common(ids, other))
        found = sorted(end for end in ends if 0 < end < len(ids))
        # The state at the end of the prompt is kept anyway. Only what the next turn leaves out is between.
        near = [] if conversation.begun else [end for end in found if len(ids) - end < NEAR_END]
        useful = near[-1:] if self._rewrites else []
        return (*found[: len(found) - len(near)], *useful)


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


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two texts have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
