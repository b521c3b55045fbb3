"""OpenAI's newer API: /v1/responses. No response is stored; its items are kept for a while, to be named."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from time import time
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from godwit.dialect.parser import CallArguments, CallEnd, CallStart, Delta, Text, Thinking
from godwit.engine import TokenLogprobs
from godwit.server.answers import Answer, Answers, Update, Usage
from godwit.server.errors import bad_request, from_engine, openai_body
from godwit.server.items import ItemStore
from godwit.server.openai_bodies import call_id, logprob_body, thinking_ended
from godwit.server.protocol_responses import Item, ItemReference, ResponsesRequest, TextConfig
from godwit.server.response_tools import CallText, OfferedTool, echoed, left_out, offered
from godwit.server.service import Chat, Service, allowed_tools
from godwit.server.sse import DONE, KEEP_ALIVE, EventStream, event
from godwit.tokenizer import Tokenizer

Body = dict[str, Any]
_ITEM_FIELDS: Mapping[str, Body] = {"message": {"role": "assistant"}, "reasoning": {"summary": []}}
#: Where the text of a call stands, and how the events that bring it begin.
_CALL_TEXTS = {
    "function_call": ("arguments", "response.function_call_arguments"),
    "custom_tool_call": ("input", "response.custom_tool_call_input"),
}
_ITEM: TypeAdapter[Item] = TypeAdapter(Item)
_log = logging.getLogger("godwit.server")
_PART_FIELDS: Mapping[str, Body] = {"message": {"annotations": []}, "reasoning": {}}


def chat_of(asked: ResponsesRequest, service: Service) -> Chat:
    """The request in the words of the service.

    Raises:
        ApiError: it cannot be honoured.
    """
    wish = asked.wish(asked.reasoning.effort if asked.reasoning else None, "reasoning.effort")
    variables = service.thinking.variables(wish, {})
    choice = asked.choice()
    tools = allowed_tools(offered(asked.tools), choice)
    return Chat(
        conversation=asked.conversation([tool.tool() for tool in tools], variables),
        params=service.sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            max_tokens=asked.max_output_tokens,
            logprobs=asked.logprobs(),
        ),
        mode=choice.mode,
        tool=choice.tool,
        parallel=asked.parallel_tool_calls,
        strict=any(tool.strict for tool in tools),
        form=asked.form(),
        thinking=wish,
    )


async def responses(request: Request) -> Response:
    """The answer to a conversation."""
    service: Service = request.app.state.service
    asked = await service.read(request, ResponsesRequest)
    service.check_model(asked.model)
    owner = request.state.salt
    asked.input = resolved(asked.input, owner, service.items)
    if hosted := left_out(asked.tools):
        _log.info(
            "%s left out tools that this server cannot run: %s", request.state.record.id, ", ".join(hosted)
        )
    chat = chat_of(asked, service)
    answers = await service.chat(request, chat)
    tools = {tool.name: tool for tool in offered(asked.tools)}
    shape = ResponseEvents(_head(request, asked, chat, service), service.tokenizer, tools)

    def keep(body: Body) -> None:
        for item in body["output"] if asked.store is not False else ():
            service.items.put(owner, item)

    if asked.stream:
        return EventStream(stream(answers, shape, keep))
    (answer,) = await answers.collect(request)
    for update in _updates(answer):
        for _ in shape.events(update):  # the events build up the same body
            pass
    body = shape.ended(answer)
    keep(body)
    return JSONResponse(body)


def resolved(given: str | list[Item], owner: str, items: ItemStore) -> str | list[Item]:
    """The input with the items that it refers to.

    Raises:
        ApiError: one is not there, or is named twice: a short request could stand for any amount of text.
    """
    if isinstance(given, str):
        return given
    names = [item.id for item in given if isinstance(item, ItemReference)]
    if len(set(names)) < len(names):
        raise bad_request("an item can be referred to only once in a request", "input")
    return [_found(item.id, owner, items) if isinstance(item, ItemReference) else item for item in given]


def _found(id: str, owner: str, items: ItemStore) -> Item:
    found = items.get(owner, id)
    if found is None:
        raise bad_request(
            f"this server does not have the item {id[:80]!r}, or no longer; send the item itself instead",
            "input",
        )
    item: Item = _ITEM.validate_python(found)
    return item


def _updates(answer: Answer) -> Iterator[Update]:
    """A whole answer as if it came now, one part after the other."""
    yield Update(0, [Thinking(answer.thinking)] if answer.thinking else [])
    yield Update(0, [Text(answer.text)] if answer.text else [], said=answer.said)
    deltas: list[Delta] = []
    for index, call in enumerate(answer.calls):
        deltas += [CallStart(index, call.name), CallArguments(index, call.arguments)]
        deltas.append(CallEnd(index, call.complete, call.raw))
    yield Update(0, deltas, finish=answer.finish, reason=answer.reason)


def _head(request: Request, asked: ResponsesRequest, chat: Chat, service: Service) -> Body:
    """The fields of a response that are known before its answer."""
    told = asked.model_dump(include={"tool_choice"}, exclude_none=True, by_alias=True)
    text = asked.text or TextConfig()
    return {
        "id": f"resp_{request.state.record.id}",
        "object": "response",
        "created_at": int(time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens if asked.max_output_tokens != -1 else None,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "model": service.settings.name,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls,
        "presence_penalty": chat.params.presence_penalty,
        "frequency_penalty": chat.params.frequency_penalty,
        "previous_response_id": None,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": chat.params.temperature,
        "top_logprobs": chat.params.logprobs or 0,
        "text": {
            "format": text.format.told() if text.format else {"type": "text"},
            "verbosity": text.verbosity or "medium",
        },
        "tool_choice": told.get("tool_choice", "auto"),
        "tools": echoed(asked.tools),
        "top_p": chat.params.top_p,
        "truncation": asked.truncation or "disabled",
        "usage": None,
        "user": asked.user,
    }


async def stream(
    answers: Answers, shape: ResponseEvents, keep: Callable[[Body], None]
) -> AsyncIterator[bytes]:
    """The events of a streamed response, up to its last state; ``keep`` gets that before the client does."""
    try:
        for value in shape.begin():
            yield event(value, value["type"])
        async for update in answers.updates():
            if update is None:
                yield KEEP_ALIVE
                continue
            for value in shape.events(update):
                yield event(value, value["type"])
        for value in shape.end(answers.answers[0]):
            keep(value["response"])
            yield event(value, value["type"])
        yield DONE
    except Exception as error:
        answers.failed(error)
        for value in shape.fail(openai_body(from_engine(error))["error"]):
            yield event(value, value["type"])
    finally:
        answers.cancel()


class ResponseEvents:
    """The events of a streamed response, and the response that they build up.

    Args:
        head: the fields that are known before the answer.
        tokenizer: writes tokens.
        tools: those that the model may call, by the names that it knows.
    """

    def __init__(self, head: Body, tokenizer: Tokenizer, tools: Mapping[str, OfferedTool]) -> None:
        self._head = head
        self._tools = tools
        self._call_text = CallText(custom=False)
        self._tokenizer = tokenizer
        self._said: list[TokenLogprobs] = []  # of the text that comes next
        self._number = 0
        self._output: list[Body] = []
        self._open: Body | None = None  # the item that is being written

    def begin(self) -> list[Body]:
        return [self._event(f"response.{kind}", response=self._body()) for kind in ("created", "in_progress")]

    def events(self, update: Update) -> Iterator[Body]:
        self._said += update.said
        for delta in update.deltas:
            yield from self._delta(delta)
            self._said = []
        if update.finish is not None:
            yield from self._close("completed" if update.reason != "length" else "incomplete")

    def end(self, answer: Answer) -> list[Body]:
        body = self.ended(answer)
        return [self._event(f"response.{body['status']}", response=body)]

    def ended(self, answer: Answer) -> Body:
        """The whole response."""
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

    def fail(self, error: Body) -> list[Body]:
        told = {"code": "server_error", "message": error["message"]}
        failed = self._body() | {"status": "failed", "error": told}
        return [self._event("response.failed", response=failed)]

    def _delta(self, delta: Delta) -> Iterator[Body]:
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

    def _begin_call(self, start: CallStart) -> Iterator[Body]:
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

    def _more_of_call(self, text: str) -> Iterator[Body]:
        item = self._current()
        field, event = _CALL_TEXTS[item["type"]]
        item[field] += text
        if text:
            yield self._item_event(f"{event}.delta", delta=text)

    def _part(self, kind: str, part: str, text: str) -> Iterator[Body]:
        """More of a text, which begins an item where none of its kind is open."""
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            item = {"type": kind, "content": []} | _ITEM_FIELDS[kind]
            yield from self._begin(item, "msg_" if kind == "message" else "rs_")
            content: Body = {"type": part, "text": ""} | _PART_FIELDS[kind]
            if kind == "message":
                content["logprobs"] = []
            yield self._item_event("response.content_part.added", content_index=0, part=dict(content))
            self._current()["content"].append(content)
        content = self._current()["content"][0]
        content["text"] += text
        more: Body = {}
        if kind == "message":
            more["logprobs"] = [logprob_body(one, self._tokenizer) for one in self._said]
            content["logprobs"] += more["logprobs"]
        yield self._item_event(f"response.{part}.delta", content_index=0, delta=text, **more)

    def _begin(self, item: Body, prefix: str) -> Iterator[Body]:
        id = f"{prefix}{self._head['id'].partition('_')[2]}{len(self._output):02d}"
        self._open = {"id": id, "status": "in_progress", **item}
        self._output.append(self._open)
        yield self._event(
            "response.output_item.added", output_index=len(self._output) - 1, item=_copy(self._open)
        )

    def _close(self, status: str = "completed") -> Iterator[Body]:
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] in _CALL_TEXTS:
            field, event = _CALL_TEXTS[item["type"]]
            told = {name: item[name] for name in ("name", field) if name == field or field == "arguments"}
            yield self._item_event(f"{event}.done", **told)
        else:
            part = item["content"][0]
            told = {name: part[name] for name in ("text", "logprobs") if name in part}
            yield self._item_event(f"response.{part['type']}.done", content_index=0, **told)
            yield self._item_event("response.content_part.done", content_index=0, part=dict(part))
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=_copy(item))
        self._open = None

    def _current(self) -> Body:
        if self._open is None:
            raise RuntimeError("no item of the response is open")
        return self._open

    def _item_event(self, kind: str, **fields: Any) -> Body:
        return self._event(kind, item_id=self._current()["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Body:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _body(self) -> Body:
        return {**self._head, "output": [_copy(item) for item in self._output]}


def _copy(item: Body) -> Body:
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)
