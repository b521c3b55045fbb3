"""What OpenAI's clients get back: choices, chunks of streams, probabilities, usage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from godwit.dialect.parser import CallArguments, CallStart, Delta, Text, Thinking
from godwit.engine import TokenLogprobs
from godwit.engine.stream import Finish
from godwit.server.answers import Answer, Update, Usage
from godwit.tokenizer import Tokenizer

#: In place of minus infinity, which JSON does not have.
LEAST_LOGPROB = -9999.0


def usage_of(answers: Sequence[Answer], num_prompts: int = 1) -> dict[str, Any]:
    """Tokens as OpenAI's API counts them."""
    usage = Usage.of(answers, num_prompts)
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.thinking},
    }


def timings(answers: Sequence[Answer]) -> dict[str, Any]:
    """How fast the first answer came, and what drafting gave; an addition to the API."""
    finish = answers[0].finish
    usage = Usage.of(answers)
    if finish is None:
        return {}
    rate = finish.decode_tokens_per_second
    return {
        "queue_seconds": round(finish.queue_seconds, 6),
        "first_token_seconds": round(finish.first_token_seconds, 6),
        "decode_tokens_per_second": None if rate is None else round(rate, 3),
        "drafted": usage.drafted,
        "accepted": usage.accepted,
        "speedup": None if finish.speedup is None else round(finish.speedup, 3),
        "reuse_note": finish.reuse_note,
        "thinking_ended": finish.thinking_ended,
    }


def thinking_ended(answer: Answer) -> dict[str, Any]:
    """Why the thinking of an answer was over, if it was; an addition to the APIs."""
    finish = answer.finish
    ended = None if finish is None else finish.thinking_ended
    return {} if ended is None else {"thinking_ended": ended}


def chat_choice(index: int, answer: Answer, head: dict[str, Any], logprobs: Any) -> dict[str, Any]:
    """One answer to a conversation."""
    calls = [
        {
            "id": call_id(head["id"], index, number),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for number, call in enumerate(answer.calls)
    ]
    content = answer.text if answer.text or not calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    if answer.thinking:
        message["reasoning_content"] = answer.thinking
    if calls:
        message["tool_calls"] = calls
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.reason}


def call_id(answer_id: str, index: int, call: int) -> str:
    """The id of a call, like no other's."""
    return f"call_{answer_id.rpartition('-')[2]}{index:02d}{call:02d}"


def chat_logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """Probabilities as chat completions have them: of all tokens, those of tags and calls included."""
    return {"content": [logprob_body(one, tokenizer) for one in logprobs], "refusal": None}


def logprob_body(one: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    """The probability of one token of a conversation."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(tokenizer, token)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    return entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*other) for other in one.top]}


@dataclass(frozen=True)
class Echo:
    """How a plain completion begins.

    Attributes:
        text: its prompt, where that was asked for.
        ids: of the prompt's tokens, where they come with their probabilities.
    """

    text: str = ""
    ids: Sequence[int] = ()


def text_choice(index: int, answer: Answer, echo: Echo, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One plain completion; ``tokenizer`` writes the tokens where probabilities were asked for."""
    logprobs = None
    if tokenizer is not None:
        read = list(zip(echo.ids, answer.prompt_logprobs, strict=True))
        logprobs = TextLogprobs(tokenizer).body([*answer.logprobs, *_last(answer.finish)], read)
    text = echo.text + answer.text
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.reason}


def _last(finish: Finish | None) -> list[TokenLogprobs]:
    """The stop token, which counts as a token of the answer though it has no text."""
    return [finish.stop_logprobs] if finish is not None and finish.stop_logprobs is not None else []


class TextLogprobs:
    """Probabilities as plain completions have them, for the tokens of one text as they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._offset = 0

    def body(
        self, logprobs: Sequence[TokenLogprobs], prompt: Sequence[tuple[int, TokenLogprobs | None]] = ()
    ) -> dict[str, Any]:
        """The next tokens, those of the ``prompt`` first; the text's very first has no probability."""
        entries = [*prompt, *((one.token_id, one) for one in logprobs)]
        return {
            "tokens": [token_text(self._tokenizer, token) for token, _ in entries],
            "token_logprobs": [one and max(one.logprob, LEAST_LOGPROB) for _, one in entries],
            "top_logprobs": [one and self._top(one) for _, one in entries],
            "text_offset": [self._place(token) for token, _ in entries],
        }

    def _place(self, token: int) -> int:
        place = self._offset
        self._offset += len(self._decoder.push(token))
        return place

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the one that was taken; of several that look the same, the likeliest."""
        top: dict[str, float] = {}
        for token, value in (*one.top, (one.token_id, one.logprob)):
            top.setdefault(token_text(self._tokenizer, token), max(value, LEAST_LOGPROB))
        return top


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The UTF-8 bytes of a token, which may be a part of a character."""
    return tokenizer.token_bytes(token) or b""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is a part of a character as its bytes."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChunkStream(ABC):
    """The chunks of a streamed completion.

    Args:
        head: the fields that all chunks have.
        tokenizer: writes tokens.
        num_prompts: of the request.
        usage: a last chunk tells the usage.
    """

    def __init__(
        self, head: dict[str, Any], tokenizer: Tokenizer, num_prompts: int = 1, *, usage: bool = False
    ) -> None:
        self.head = head
        self.tokenizer = tokenizer
        self._num_prompts = num_prompts
        self._usage = usage

    @abstractmethod
    def begin(self, num_choices: int) -> list[dict[str, Any]]:
        """The chunks before anything is known."""

    @abstractmethod
    def chunks(self, update: Update) -> list[dict[str, Any]]:
        """The chunks for an update."""

    def end(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The chunks behind all answers."""
        if not self._usage:
            return []
        usage = usage_of(answers, self._num_prompts)
        return [{**self.head, "choices": [], "usage": usage, "timings": timings(answers)}]

    def chunk(
        self, index: int, part: dict[str, Any], *, logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": reason}
        return {**self.head, "choices": [choice]} | ({"usage": None} if self._usage else {})


class ChatChunks(ChunkStream):
    """The chunks of a streamed chat completion."""

    def begin(self, num_choices: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self.chunk(index, {"delta": delta}) for index in range(num_choices)]

    def chunks(self, update: Update) -> list[dict[str, Any]]:
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
    """The chunks of a streamed plain completion; an echo with probabilities comes when the prompt is read.

    Args:
        echoes: how each answer begins.
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

    def begin(self, num_choices: int) -> list[dict[str, Any]]:
        return [
            self.chunk(index, {"text": echo.text})
            for index, echo in enumerate(self._echoes)
            if echo.text and not echo.ids
        ]

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        index, logprobs = update.index, self._logprobs[update.index]
        if update.prompt_logprobs:
            echo = self._echoes[index]
            read = logprobs.body((), list(zip(echo.ids, update.prompt_logprobs, strict=True)))
            return [self.chunk(index, {"text": echo.text}, logprobs=read)]
        text = "".join(delta.text for delta in update.deltas if isinstance(delta, Text))
        new = [*update.logprobs, *_last(update.finish)]
        if not (text or new or update.finish):
            return []
        reason = update.reason if update.finish is not None else None
        known = logprobs.body(new) if new else None
        return [self.chunk(index, {"text": text}, logprobs=known, reason=reason)]
