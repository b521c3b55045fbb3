"""The chunks of streamed completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from godwit.dialect.parser import CallArguments, CallStart, Delta, Text, Thinking
from godwit.server.answers import AnswerState, Update
from godwit.server.errors import ApiError, openai_body
from godwit.server.openai.choices import (
    Echo,
    TextLogprobs,
    call_id,
    chat_logprobs,
    last_token,
    timings,
    usage_of,
)
from godwit.server.sse import Payload, StreamFormat
from godwit.text.tokenizer import Tokenizer


class ChunkStream(StreamFormat):
    """The chunks of a streamed completion.

    Args:
        head: the fields of all chunks.
        tokenizer: the model's.
        num_prompts: of the request.
        usage: end with a chunk for the usage.
    """

    def __init__(
        self, head: dict[str, Any], tokenizer: Tokenizer, num_prompts: int = 1, *, usage: bool = False
    ) -> None:
        self.head = head
        self.tokenizer = tokenizer
        self._num_prompts = num_prompts
        self._usage = usage

    def end(self, answers: Sequence[AnswerState]) -> Iterable[Payload]:
        if not self._usage:
            return []
        usage = usage_of(answers, self._num_prompts)
        return [{**self.head, "choices": [], "usage": usage, "timings": timings(answers)}]

    def fail(self, error: ApiError) -> Iterable[Payload]:
        return [openai_body(error)]

    def chunk(
        self, index: int, part: dict[str, Any], *, logprobs: Any = None, reason: str | None = None
    ) -> Payload:
        """A chunk for one choice."""
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": reason}
        return {**self.head, "choices": [choice]} | ({"usage": None} if self._usage else {})


class ChatChunks(ChunkStream):
    """The chunks of a streamed chat completion."""

    def begin(self, num_answers: int) -> Iterable[Payload]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self.chunk(index, {"delta": delta}) for index in range(num_answers)]

    def update(self, update: Update) -> Iterable[Payload]:
        index = update.index
        deltas = [body for delta in update.deltas if (body := self._delta(index, delta)) is not None]
        logprobs = chat_logprobs(update.logprobs, self.tokenizer) if update.logprobs else None
        if logprobs and not deltas:
            deltas = [{}]
        chunks = [
            self.chunk(index, {"delta": delta}, logprobs=None if later else logprobs)
            for later, delta in enumerate(deltas)
        ]
        if update.finish is not None:
            chunks.append(self.chunk(index, {"delta": {}}, reason=update.reason))
        return chunks

    def _delta(self, index: int, delta: Delta) -> dict[str, Any] | None:
        if isinstance(delta, Text):
            return {"content": delta.text}
        if isinstance(delta, Thinking):
            return {"reasoning_content": delta.text}
        if isinstance(delta, CallStart):
            id = call_id(self.head["id"], index, delta.index)
            function = {"name": delta.name, "arguments": ""}
            return {
                "tool_calls": [{"index": delta.index, "id": id, "type": "function", "function": function}]
            }
        if isinstance(delta, CallArguments):
            return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
        return None


class TextChunks(ChunkStream):
    """The chunks of a streamed text completion. An echo with log probabilities comes once the prompt is read.

    Args:
        echoes: the beginning of each answer.
    """

    def __init__(
        self,
        head: dict[str, Any],
        tokenizer: Tokenizer,
        num_prompts: int,
        echoes: Sequence[Echo],
        *,
        usage: bool = False,
    ) -> None:
        super().__init__(head, tokenizer, num_prompts, usage=usage)
        self._echoes = echoes
        self._logprobs = [TextLogprobs(tokenizer) for _ in echoes]

    def begin(self, num_answers: int) -> Iterable[Payload]:
        return [
            self.chunk(index, {"text": echo.text})
            for index, echo in enumerate(self._echoes)
            if echo.text and not echo.ids
        ]

    def update(self, update: Update) -> Iterable[Payload]:
        index, logprobs = update.index, self._logprobs[update.index]
        if update.prompt_logprobs:
            echo = self._echoes[index]
            read = logprobs.body((), list(zip(echo.ids, update.prompt_logprobs, strict=True)))
            return [self.chunk(index, {"text": echo.text}, logprobs=read)]
        text = "".join(delta.text for delta in update.deltas if isinstance(delta, Text))
        new = [*update.logprobs, *last_token(update.finish)]
        if not (text or new or update.finish):
            return []
        reason = update.reason if update.finish is not None else None
        known = logprobs.body(new) if new else None
        return [self.chunk(index, {"text": text}, logprobs=known, reason=reason)]
