"""OpenAI's Responses API. Responses are not stored; their items are kept for a while, for references."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from time import time

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from godwit.dialect.parser import CallArguments, CallEnd, CallStart, Delta, Text, Thinking
from godwit.server.answers import AnswerState, Update
from godwit.server.errors import bad_request
from godwit.server.openai.items import ItemStore
from godwit.server.openai.response_events import ResponseEvents
from godwit.server.openai.response_schemas import Item, ItemReference, ResponsesRequest, TextConfig
from godwit.server.openai.response_tools import echoed, left_out, offered
from godwit.server.service import ChatJob, Service
from godwit.server.sse import EventStream, Payload

_ITEM: TypeAdapter[Item] = TypeAdapter(Item)
_log = logging.getLogger("godwit.server")


def job_of(asked: ResponsesRequest, service: Service) -> ChatJob:
    """The request, independent of the API.

    Raises:
        ApiError: it is contradictory.
    """
    wish = asked.wish(asked.reasoning.effort if asked.reasoning else None, "reasoning.effort")
    variables = service.thinking.variables(wish, {})
    choice = asked.choice()
    tools = choice.among(offered(asked.tools))
    return ChatJob(
        conversation=asked.conversation([tool.tool() for tool in tools], variables),
        params=service.sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            max_tokens=asked.max_output_tokens,
            logprobs=asked.logprobs(),
        ),
        choice=choice,
        parallel=asked.parallel_tool_calls,
        strict=any(tool.strict for tool in tools),
        form=asked.form(),
        thinking=wish,
    )


async def responses(request: Request) -> Response:
    """The answer to a conversation."""
    service: Service = request.app.state.service
    asked = await service.bodies.read_body(request, ResponsesRequest)
    owner = request.state.salt
    asked.input = resolved(asked.input, owner, service.items)
    if hosted := left_out(asked.tools):
        _log.info("%s: tools left out: %s", request.state.record.id, ", ".join(hosted))
    job = job_of(asked, service)
    answers = await service.chat(request, job)
    tools = {tool.name: tool for tool in offered(asked.tools)}

    def keep(item: Payload) -> None:
        if asked.store is not False:
            service.items.put(owner, item)

    events = ResponseEvents(_head(request, asked, job, service), service.tokenizer, tools, keep)
    if asked.stream:
        return EventStream(answers, events)
    (answer,) = await answers.collect(request)
    for update in _updates(answer):
        for _ in events.update(update):  # builds the response
            pass
    return JSONResponse(events.ended(answer))


def resolved(given: str | list[Item], owner: str, items: ItemStore) -> str | list[Item]:
    """The input with references replaced by their items.

    Raises:
        ApiError: an item is not there, or is named twice: a short request could stand for any amount of text.
    """
    if isinstance(given, str):
        return given
    names = [item.id for item in given if isinstance(item, ItemReference)]
    if len(set(names)) < len(names):
        raise bad_request("an item can be referenced only once in a request", "input")
    return [_found(item.id, owner, items) if isinstance(item, ItemReference) else item for item in given]


def _found(id: str, owner: str, items: ItemStore) -> Item:
    found = items.get(owner, id)
    if found is None:
        raise bad_request(
            f"the item {id[:80]!r} is not stored here, or no longer; send the item itself",
            "input",
        )
    item: Item = _ITEM.validate_python(found)
    return item


def _updates(answer: AnswerState) -> Iterator[Update]:
    """A whole answer as updates, one for each part."""
    yield Update(0, [Thinking(answer.thinking)] if answer.thinking else [])
    yield Update(0, [Text(answer.text)] if answer.text else [], said=answer.said)
    deltas: list[Delta] = []
    for index, call in enumerate(answer.calls):
        deltas += [CallStart(index, call.name), CallArguments(index, call.arguments)]
        deltas.append(CallEnd(index, call.complete, call.raw))
    yield Update(0, deltas, finish=answer.finish, reason=answer.reason)


def _head(request: Request, asked: ResponsesRequest, job: ChatJob, service: Service) -> Payload:
    """The fields of a response that do not depend on the answer."""
    choice = asked.model_dump(include={"tool_choice"}, exclude_none=True, by_alias=True)
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
        "presence_penalty": job.params.presence_penalty,
        "frequency_penalty": job.params.frequency_penalty,
        "previous_response_id": None,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": job.params.temperature,
        "top_logprobs": job.params.logprobs or 0,
        "text": {
            "format": text.format.echo() if text.format else {"type": "text"},
            "verbosity": text.verbosity or "medium",
        },
        "tool_choice": choice.get("tool_choice", "auto"),
        "tools": echoed(asked.tools),
        "top_p": job.params.top_p,
        "truncation": asked.truncation or "disabled",
        "usage": None,
        "user": asked.user,
    }
