"""The events of a streamed response."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import time
from typing import Any

from godwit.dialect.parser import CallArguments, CallStart, Delta, Text, Thinking
from godwit.engine import TokenLogprobs
from godwit.server.answers import AnswerState, Update, Usage
from godwit.server.errors import ApiError
from godwit.server.openai.choices import call_id, logprob_body, thinking_ended
from godwit.server.openai.response_tools import CallText, OfferedTool
from godwit.server.sse import Payload, StreamFormat
from godwit.text.tokenizer import Tokenizer

_ITEM_FIELDS: Mapping[str, Payload] = {"message": {"role": "assistant"}, "reasoning": {"summary": []}}
_PART_FIELDS: Mapping[str, Payload] = {"message": {"annotations": []}, "reasoning": {}}
#: By the type of an item: the field with the text of a call, and the prefix of its events.
_CALL_TEXTS = {
    "function_call": ("arguments", "response.function_call_arguments"),
    "custom_tool_call": ("input", "response.custom_tool_call_input"),
}


class ResponseEvents(StreamFormat):
    """The events of a streamed response, and the response that they build.

    Args:
        head: the fields that do not depend on the answer.
        tokenizer: the model's.
        tools: those that the model may call, by the names that it sees.
        keep: stores an item of the finished response; called before the client gets it.
    """

    def __init__(
        self,
        head: Payload,
        tokenizer: Tokenizer,
        tools: Mapping[str, OfferedTool],
        keep: Callable[[Payload], None],
    ) -> None:
        self._head = head
        self._tools = tools
        self._keep = keep
        self._call_text = CallText(custom=False)
        self._tokenizer = tokenizer
        self._said: list[TokenLogprobs] = []  # of the next text
        self._number = 0
        self._output: list[Payload] = []
        self._open: Payload | None = None  # the item being written

    def begin(self, num_answers: int) -> Iterable[Payload]:
        return [self._event(f"response.{kind}", response=self._body()) for kind in ("created", "in_progress")]

    def update(self, update: Update) -> Iterator[Payload]:
        self._said += update.said
        for delta in update.deltas:
            yield from self._delta(delta)
            self._said = []
        if update.finish is not None:
            yield from self._close("completed" if update.reason != "length" else "incomplete")

    def end(self, answers: Sequence[AnswerState]) -> Iterable[Payload]:
        body = self.ended(answers[0])
        return [self._event(f"response.{body['status']}", response=body)]

    def ended(self, answer: AnswerState) -> Payload:
        """The finished response, whose items are stored now."""
        for item in self._output:
            self._keep(_copy(item))
        usage = Usage.of([answer])
        cut = answer.reason == "length"
        return self._body() | {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.thinking, **thinking_ended(answer)},
                "total_tokens": usage.prompt + usage.completion,
            },
        }

    def fail(self, error: ApiError) -> Iterable[Payload]:
        failed = self._body() | {
            "status": "failed",
            "error": {"code": "server_error", "message": error.message},
        }
        return [self._event("response.failed", response=failed)]

    def _delta(self, delta: Delta) -> Iterator[Payload]:
        if isinstance(delta, Text):
            yield from self._part("message", "output_text", delta.text)
        elif isinstance(delta, Thinking):
            yield from self._part("reasoning", "reasoning_text", delta.text)
        elif isinstance(delta, CallStart):
            yield from self._close()
            yield from self._begin_call(delta)
        elif isinstance(delta, CallArguments):
            yield from self._more_of_call(self._call_text.push(delta.text))
        else:
            yield from self._more_of_call(self._call_text.flush())
            yield from self._close("completed" if delta.complete else "incomplete")

    def _begin_call(self, start: CallStart) -> Iterator[Payload]:
        tool = self._tools.get(start.name)
        kind, prefix = ("function_call", "fc_")
        if custom := tool is not None and tool.kind == "custom":
            kind, prefix = ("custom_tool_call", "ctc_")
        self._call_text = CallText(custom=custom)
        id = call_id(self._head["id"].replace("_", "-"), 0, start.index)
        call = {"type": kind, "call_id": id, "name": tool.own_name if tool else start.name}
        if tool is not None and tool.namespace:
            call["namespace"] = tool.namespace
        yield from self._begin(call | {_CALL_TEXTS[kind][0]: ""}, prefix)

    def _more_of_call(self, text: str) -> Iterator[Payload]:
        item = self._current()
        field, event = _CALL_TEXTS[item["type"]]
        item[field] += text
        if text:
            yield self._item_event(f"{event}.delta", delta=text)

    def _part(self, kind: str, part: str, text: str) -> Iterator[Payload]:
        """More text, in a new item if none of its kind is open."""
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            item = {"type": kind, "content": []} | _ITEM_FIELDS[kind]
            yield from self._begin(item, "msg_" if kind == "message" else "rs_")
            content: Payload = {"type": part, "text": ""} | _PART_FIELDS[kind]
            if kind == "message":
                content["logprobs"] = []
            yield self._item_event("response.content_part.added", content_index=0, part=dict(content))
            self._current()["content"].append(content)
        content = self._current()["content"][0]
        content["text"] += text
        more: Payload = {}
        if kind == "message":
            more["logprobs"] = [logprob_body(one, self._tokenizer) for one in self._said]
            content["logprobs"] += more["logprobs"]
        yield self._item_event(f"response.{part}.delta", content_index=0, delta=text, **more)

    def _begin(self, item: Payload, prefix: str) -> Iterator[Payload]:
        id = f"{prefix}{self._head['id'].partition('_')[2]}{len(self._output):02d}"
        self._open = {"id": id, "status": "in_progress", **item}
        self._output.append(self._open)
        yield self._event(
            "response.output_item.added", output_index=len(self._output) - 1, item=_copy(self._open)
        )

    def _close(self, status: str = "completed") -> Iterator[Payload]:
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] in _CALL_TEXTS:
            field, event = _CALL_TEXTS[item["type"]]
            done = {name: item[name] for name in ("name", field) if name == field or field == "arguments"}
            yield self._item_event(f"{event}.done", **done)
        else:
            part = item["content"][0]
            done = {name: part[name] for name in ("text", "logprobs") if name in part}
            yield self._item_event(f"response.{part['type']}.done", content_index=0, **done)
            yield self._item_event("response.content_part.done", content_index=0, part=dict(part))
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=_copy(item))
        self._open = None

    def _current(self) -> Payload:
        if self._open is None:
            raise RuntimeError("no item of the response is open")
        return self._open

    def _item_event(self, kind: str, **fields: Any) -> Payload:
        return self._event(kind, item_id=self._current()["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Payload:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _body(self) -> Payload:
        return {**self._head, "output": [_copy(item) for item in self._output]}


def _copy(item: Payload) -> Payload:
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)
