"""Parts of OpenAI's responses: choices, log probabilities, usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from godwit.engine import TokenLogprobs
from godwit.engine.stream import Finish
from godwit.server.answers import AnswerState, Usage
from godwit.text.tokenizer import Tokenizer

#: Replaces minus infinity, which JSON lacks.
LEAST_LOGPROB = -9999.0


def usage_of(answers: Sequence[AnswerState], num_prompts: int = 1) -> dict[str, Any]:
    """Usage in OpenAI's format."""
    usage = Usage.of(answers, num_prompts)
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.thinking},
    }


def timings(answers: Sequence[AnswerState]) -> dict[str, Any]:
    """Speed of the first answer and results of drafting: an extension of the API."""
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


def thinking_ended(answer: AnswerState) -> dict[str, Any]:
    """Why the thinking ended, if it did: an extension of the APIs."""
    finish = answer.finish
    ended = None if finish is None else finish.thinking_ended
    return {} if ended is None else {"thinking_ended": ended}


def chat_choice(index: int, answer: AnswerState, head: dict[str, Any], logprobs: Any) -> dict[str, Any]:
    """A choice of a chat completion."""
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
    """A unique id for a call."""
    return f"call_{answer_id.rpartition('-')[2]}{index:02d}{call:02d}"


def chat_logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """Log probabilities of a chat completion, for all tokens including tags and calls."""
    return {"content": [logprob_body(one, tokenizer) for one in logprobs], "refusal": None}


def logprob_body(one: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    """The log probability of one token of a chat completion."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(tokenizer, token)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    return entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*other) for other in one.top]}


@dataclass(frozen=True)
class Echo:
    """The prompt that a text completion repeats, if requested.

    Attributes:
        text: of the prompt.
        ids: of its tokens, if they come with log probabilities.
    """

    text: str = ""
    ids: Sequence[int] = ()


def text_choice(index: int, answer: AnswerState, echo: Echo, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A choice of a text completion, with log probabilities if there is a ``tokenizer``."""
    logprobs = None
    if tokenizer is not None:
        read = list(zip(echo.ids, answer.prompt_logprobs, strict=True))
        logprobs = TextLogprobs(tokenizer).body([*answer.logprobs, *last_token(answer.finish)], read)
    text = echo.text + answer.text
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.reason}


def last_token(finish: Finish | None) -> list[TokenLogprobs]:
    """The stop token, which is a token of the answer though it has no text."""
    return [finish.stop_logprobs] if finish is not None and finish.stop_logprobs is not None else []


class TextLogprobs:
    """Log probabilities of a text completion, for the tokens of one text as they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._offset = 0

    def body(
        self, logprobs: Sequence[TokenLogprobs], prompt: Sequence[tuple[int, TokenLogprobs | None]] = ()
    ) -> dict[str, Any]:
        """The next tokens, those of the ``prompt`` first. The first token of the text has no probability."""
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
        """The likeliest tokens and the sampled one; of tokens with the same text, the likeliest."""
        top: dict[str, float] = {}
        for token, value in (*one.top, (one.token_id, one.logprob)):
            top.setdefault(token_text(self._tokenizer, token), max(value, LEAST_LOGPROB))
        return top


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The UTF-8 bytes of a token, which may be a part of a character."""
    return tokenizer.token_bytes(token) or b""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text, or as bytes if it is part of a character."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
