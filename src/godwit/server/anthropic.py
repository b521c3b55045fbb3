"""Anthropic's API: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from godwit.dialect.parser import CallArguments, CallEnd, CallStart, Delta, Text, Thinking
from godwit.dialect.strict_json import parse_json
from godwit.engine.stream import Finish
from godwit.server.answers import Answer, Answers, Update, Usage
from godwit.server.errors import anthropic_body, from_engine
from godwit.server.fields import Mode
from godwit.server.openai_bodies import thinking_ended
from godwit.server.prompts import Conversation
from godwit.server.protocol_messages import CountRequest, MessagesRequest
from godwit.server.service import Chat, Service
from godwit.server.sse import KEEP_ALIVE, EventStream, event

_MODES: Mapping[str, Mode] = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def conversation_of(asked: CountRequest, service: Service) -> Conversation:
    """The conversation in the shape of chat templates.

    Raises:
        ApiError: it cannot be continued.
    """
    variables = service.thinking.variables(asked.wish(), {})
    choice = asked.tool_choice.type if asked.tool_choice else "auto"
    tools = [] if choice == "none" else [tool.tool() for tool in asked.tools]
    return asked.conversation(tools, variables)


def chat_of(asked: MessagesRequest, service: Service) -> Chat:
    """The request in the words of the service.

    Raises:
        ApiError: it cannot be honoured.
    """
    choice = asked.tool_choice
    params = service.sampling(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        max_tokens=asked.max_tokens,
        stop=asked.stop_sequences,
    )
    return Chat(
        conversation=conversation_of(asked, service),
        params=params,
        mode=_MODES[choice.type] if choice else "auto",
        tool=choice.name if choice else None,
        parallel=not (choice and choice.disable_parallel_tool_use),
        strict=any(tool.strict for tool in asked.tools),
        form=asked.form(),
        thinking=asked.wish(),
    )


async def messages(request: Request) -> Response:
    """The next message of a conversation."""
    service: Service = request.app.state.service
    asked = await service.read(request, MessagesRequest)
    service.check_model(asked.model)
    chat = chat_of(asked, service)
    answers = await service.chat(request, chat)
    head = {
        "id": f"msg_{request.state.record.id}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
    }
    if asked.stream:
        return EventStream(stream(answers, head))
    (answer,) = await answers.collect(request)
    content = list(_blocks(answer, head["id"]))
    return JSONResponse({**head, "content": content, **_end(answer, content), "usage": usage_of(answer)})


async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has."""
    service: Service = request.app.state.service
    asked = await service.read(request, CountRequest)
    service.check_model(asked.model)
    prompt = await service.make_prompt(request, conversation_of(asked, service))
    return JSONResponse({"input_tokens": len(prompt.ids)})


def usage_of(answer: Answer) -> dict[str, Any]:
    """The tokens of a whole answer."""
    usage = Usage.of([answer])
    return usage_body(usage.prompt, usage.cached, usage.completion) | thinking_ended(answer)


def usage_body(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """Tokens as Anthropic's API counts them: those of the prompt that were cached stand apart."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
    }


def _blocks(answer: Answer, id: str) -> Iterator[dict[str, Any]]:
    """The content of a whole answer; a call that cannot be read is text."""
    if answer.thinking:
        yield {"type": "thinking", "thinking": answer.thinking, "signature": ""}
    text = "\n".join([*filter(None, [answer.text]), *(c.raw for c in answer.calls if not c.complete)])
    if text:
        yield {"type": "text", "text": text}
    for index, call in enumerate(answer.calls):
        if call.complete:
            use = {"type": "tool_use", "id": call_id(id, index), "name": call.name}
            yield use | {"input": parse_json(call.arguments)}


def call_id(message_id: str, index: int) -> str:
    """The id of a call, like no other's."""
    return f"toolu_{message_id.rpartition('_')[2]}{index:02d}"


def _end(answer: Answer, content: list[dict[str, Any]]) -> dict[str, Any]:
    used = any(block["type"] == "tool_use" for block in content)
    return reason_of(answer.reason, used, answer.finish)


def reason_of(reason: str, used_tools: bool, finish: Finish | None) -> dict[str, Any]:
    """Why the answer ended."""
    if reason == "tool_calls" and not used_tools:
        reason = "stop"
    if reason == "stop" and finish is not None and finish.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop}
    return {"stop_reason": _REASONS[reason], "stop_sequence": None}


async def stream(answers: Answers, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """The events of a streamed message, up to message_stop or to an error."""
    shape = MessageEvents(head, answers.num_prompt)
    try:
        async for update in answers.updates():
            if update is None and not shape.begun:
                yield KEEP_ALIVE
                continue
            for value in [{"type": "ping"}] if update is None else shape.events(update):
                yield event(value, value["type"])
        for value in shape.end(answers.answers[0]):
            yield event(value, value["type"])
    except Exception as error:
        answers.failed(error)
        yield event(anthropic_body(from_engine(error)), "error")
    finally:
        answers.cancel()


class MessageEvents:
    """The events of a streamed message, the first as soon as it is known what was cached of the prompt.

    The input of a call is given out when the call is whole: half of it, or what is no object, must not be
    taken for what the model wants.

    Attributes:
        begun: there were events.
    """

    def __init__(self, head: dict[str, Any], num_prompt: int) -> None:
        self.begun = False
        self._head = head
        self._num_prompt = num_prompt
        self._index = -1
        self._open = ""  # the type of the block that is being written
        self._calls: dict[int, tuple[str, list[str]]] = {}
        self._used = False

    def events(self, update: Update) -> list[dict[str, Any]]:
        begin = [] if update.cached is None else self._begin(update.cached)
        return [*begin, *(value for delta in update.deltas for value in self._delta(delta))]

    def end(self, answer: Answer) -> list[dict[str, Any]]:
        usage = usage_of(answer)
        delta = reason_of(answer.reason, self._used, answer.finish)
        last = {"type": "message_delta", "delta": delta, "usage": usage}
        return [*self._close(), last, {"type": "message_stop"}]

    def _begin(self, cached: int) -> list[dict[str, Any]]:
        self.begun = True
        usage = usage_body(self._num_prompt, cached, 0)
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def _delta(self, delta: Delta) -> Iterator[dict[str, Any]]:
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

    def _call(self, end: CallEnd) -> Iterator[dict[str, Any]]:
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

    def _begin_block(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open == block["type"]:
            return
        yield from self._close()
        self._index += 1
        self._open = block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _block_delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = ""
        return [{"type": "content_block_stop", "index": self._index}]
