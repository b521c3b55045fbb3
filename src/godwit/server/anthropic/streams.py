"""The events of a streamed message, and the parts of responses that whole messages share with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from godwit.dialect.parser import CallArguments, CallEnd, CallStart, Delta, Text, Thinking
from godwit.server.answers import AnswerState, Update, Usage
from godwit.server.errors import ApiError, anthropic_body
from godwit.server.openai.choices import thinking_ended
from godwit.server.sse import Payload, StreamFormat

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def usage_of(answer: AnswerState) -> Payload:
    """The usage of a whole answer."""
    usage = Usage.of([answer])
    return usage_body(usage.prompt, usage.cached, usage.completion) | thinking_ended(answer)


def usage_body(prompt: int, cached: int, completion: int) -> Payload:
    """Usage in Anthropic's format, which counts cached tokens of the prompt separately."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
    }


def call_id(message_id: str, index: int) -> str:
    """A unique id for a call."""
    return f"toolu_{message_id.rpartition('_')[2]}{index:02d}"


def reason_of(answer: AnswerState, used_tools: bool) -> Payload:
    """Why the answer ended."""
    reason, finish = answer.reason, answer.finish
    if reason == "tool_calls" and not used_tools:
        reason = "stop"
    if reason == "stop" and finish is not None and finish.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop}
    return {"stop_reason": _REASONS[reason], "stop_sequence": None}


class MessageEvents(StreamFormat):
    """The events of a streamed message. They begin once the engine knows how much of the prompt is cached.

    The input of a call is sent when the call is complete: half of it, or invalid JSON, must not be taken for
    what the model wants.

    Args:
        head: the fields that do not depend on the answer.
        num_prompt: tokens of the prompt.
    """

    last = b""

    def __init__(self, head: Payload, num_prompt: int) -> None:
        self._begun = False
        self._head = head
        self._num_prompt = num_prompt
        self._index = -1
        self._open = ""  # the type of the block being written
        self._calls: dict[int, tuple[str, list[str]]] = {}
        self._used = False

    def update(self, update: Update) -> Iterable[Payload]:
        begin = [] if update.cached is None else self._begin(update.cached)
        return [*begin, *(value for delta in update.deltas for value in self._delta(delta))]

    def end(self, answers: Sequence[AnswerState]) -> Iterable[Payload]:
        usage = usage_of(answers[0])
        delta = reason_of(answers[0], self._used)
        last = {"type": "message_delta", "delta": delta, "usage": usage}
        return [*self._close(), last, {"type": "message_stop"}]

    def fail(self, error: ApiError) -> Iterable[Payload]:
        return [anthropic_body(error)]

    def heartbeat(self) -> Payload | None:
        return {"type": "ping"} if self._begun else None

    def _begin(self, cached: int) -> list[Payload]:
        self._begun = True
        usage = usage_body(self._num_prompt, cached, 0)
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def _delta(self, delta: Delta) -> Iterator[Payload]:
        if isinstance(delta, Text):
            yield from self._begin_block({"type": "text", "text": ""})
            yield self._block_delta({"type": "text_delta", "text": delta.text})
        elif isinstance(delta, Thinking):
            yield from self._begin_block({"type": "thinking", "thinking": "", "signature": ""})
            yield self._block_delta({"type": "thinking_delta", "thinking": delta.text})
        elif isinstance(delta, CallStart):
            self._calls[delta.index] = (delta.name, [])
        elif isinstance(delta, CallArguments):
            self._calls[delta.index][1].append(delta.text)
        else:
            yield from self._call(delta)

    def _call(self, end: CallEnd) -> Iterator[Payload]:
        name, parts = self._calls.pop(end.index)
        if not end.complete:
            yield from self._delta(Text(end.raw if self._open != "text" else f"\n{end.raw}"))
            return
        yield from self._close()
        use = {"type": "tool_use", "id": call_id(self._head["id"], end.index), "name": name, "input": {}}
        yield from self._begin_block(use)
        yield self._block_delta({"type": "input_json_delta", "partial_json": "".join(parts)})
        yield from self._close()
        self._used = True

    def _begin_block(self, block: Payload) -> Iterator[Payload]:
        if self._open == block["type"]:
            return
        yield from self._close()
        self._index += 1
        self._open = block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _block_delta(self, delta: Payload) -> Payload:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[Payload]:
        if not self._open:
            return []
        self._open = ""
        return [{"type": "content_block_stop", "index": self._index}]
