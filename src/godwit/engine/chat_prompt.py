"""Prompts of conversations, and the positions in them at which a later prompt may continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from godwit.dialect.tags import THINK
from godwit.errors import TemplateError
from godwit.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
#: Prefixes of a conversation that are rendered where stop tokens do not mark the ends of its messages.
MAX_RENDERED = 8
#: Between the end of the last message and the end of the prompt stand only the words that open the answer.
NEAR_END = 16


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
class ChatRenderer:
    """Renders conversations with the chat template of a model.

    Attributes:
        tokenizer: the model's.
        tools: in the shape of OpenAI's API.
        variables: further variables of the template.
    """

    tokenizer: Tokenizer
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, messages: Sequence[Message], *, last: bool = False) -> Prompt:
        """The prompt for the next answer; ``last``: no other will follow, so it needs no boundaries.

        Raises:
            TemplateError: there is no template, or it refuses the messages.
        """
        ids = self.encode(messages)
        boundaries = () if last else self.boundaries(messages, ids)
        return Prompt(tuple(ids), boundaries, opens_thinking(self.end_of(ids)))

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation.

        Raises:
            TemplateError: as for :meth:`prompt`.
        """
        return self.tokenizer.encode_chat(
            messages,
            tools=list(self.tools) or None,
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )

    def end_of(self, ids: Sequence[int]) -> str:
        """The last words of a prompt, for :func:`opens_thinking`."""
        return self.tokenizer.decode(ids[-16:], skip_special=False)

    def boundaries(
        self, messages: Sequence[Message], ids: Sequence[int], *, begun: bool = False
    ) -> tuple[int, ...]:
        """The ends of the messages, and where the prompt of the next turn will differ from this one.

        Most templates end each message with a stop token; one that a user typed is plain text. Without stop
        tokens, prefixes of the conversation are rendered and compared. Templates that know thinking drop that
        of earlier turns, so the next turn's prompt is rendered too.

        Args:
            messages: the conversation.
            ids: its prompt, up to where the answer begins.
            begun: the beginning of the answer is given.
        """
        ends = {place + 1 for place, id in enumerate(ids) if id in self.tokenizer.stop_ids}
        prefixes: list[Sequence[Message]] = []
        if rewrites_thinking(self.tokenizer) or not ends:
            turn = [{"role": "assistant", "content": "."}, {"role": "user", "content": "."}]
            prefixes.append([*messages, *turn])
        if not ends:
            sizes = range(1, len(messages))
            chosen = [*islice(sizes, MAX_RENDERED // 2), *sizes[-(MAX_RENDERED // 2) :]]
            prefixes += [messages[:size] for size in sorted(set(chosen))]
        for prefix in prefixes:
            try:
                other = self.encode(prefix, add_generation_prompt=False)
            except TemplateError:  # some templates insist on an order of roles
                continue
            ends.add(_num_common(ids, other))
        found = sorted(end for end in ends if 0 < end < len(ids))
        # The state at the end of the prompt is kept anyway; of the words before it only those matter that the
        # next turn drops.
        near = [] if begun else [end for end in found if len(ids) - end < NEAR_END]
        useful = near[-1:] if rewrites_thinking(self.tokenizer) else []
        return (*found[: len(found) - len(near)], *useful)


def rewrites_thinking(tokenizer: Tokenizer) -> bool:
    """Whether the chat template knows thinking, so that it may render earlier turns differently."""
    template = tokenizer.chat_template
    return template is not None and THINK in template.source


def takes_one_call(template: str) -> bool:
    """Whether a message may have only one tool call, as with the templates of Llama 3."""
    return "only supports single tool-calls" in template


def opens_thinking(prompt_end: str) -> bool:
    """Whether a prompt that ends like this has opened the thinking of the answer."""
    return prompt_end.rstrip().endswith(THINK)


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
