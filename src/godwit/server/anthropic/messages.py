"""Anthropic's Messages API: messages and token counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from godwit.dialect.strict_json import parse_json
from godwit.server.answers import AnswerState
from godwit.server.anthropic.schemas import CountRequest, MessagesRequest
from godwit.server.anthropic.streams import MessageEvents, call_id, reason_of, usage_of
from godwit.server.fields import Mode, ToolChoice
from godwit.server.prompts import Conversation
from godwit.server.service import ChatJob, Service
from godwit.server.sse import EventStream, Payload

_MODES: Mapping[str, Mode] = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}


def conversation_of(asked: CountRequest, service: Service) -> Conversation:
    """The input of the chat template.

    Raises:
        ApiError: the last message cannot be continued.
    """
    variables = service.thinking.variables(asked.wish(), {})
    choice = asked.tool_choice.type if asked.tool_choice else "auto"
    tools = [] if choice == "none" else [tool.tool() for tool in asked.tools]
    return asked.conversation(tools, variables)


def job_of(asked: MessagesRequest, service: Service) -> ChatJob:
    """The request, independent of the API.

    Raises:
        ApiError: it is contradictory.
    """
    choice = asked.tool_choice
    params = service.sampling(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        max_tokens=asked.max_tokens,
        stop=asked.stop_sequences,
    )
    return ChatJob(
        conversation=conversation_of(asked, service),
        params=params,
        choice=ToolChoice(_MODES[choice.type], choice.name) if choice else ToolChoice(),
        parallel=not (choice and choice.disable_parallel_tool_use),
        strict=any(tool.strict for tool in asked.tools),
        form=asked.form(),
        thinking=asked.wish(),
    )


async def messages(request: Request) -> Response:
    """The next message of a conversation."""
    service: Service = request.app.state.service
    asked = await service.bodies.read_body(request, MessagesRequest)
    answers = await service.chat(request, job_of(asked, service))
    head = {
        "id": f"msg_{request.state.record.id}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
    }
    if asked.stream:
        return EventStream(answers, MessageEvents(head, answers.num_prompt))
    (answer,) = await answers.collect(request)
    content = list(_blocks(answer, head["id"]))
    used = any(block["type"] == "tool_use" for block in content)
    return JSONResponse({**head, "content": content, **reason_of(answer, used), "usage": usage_of(answer)})


async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has."""
    service: Service = request.app.state.service
    asked = await service.bodies.read_body(request, CountRequest)
    prompt = await service.prompts.make_prompt(request, conversation_of(asked, service))
    return JSONResponse({"input_tokens": len(prompt.ids)})


def _blocks(answer: AnswerState, id: str) -> Iterator[Payload]:
    """The content of a whole answer; an incomplete call is text."""
    if answer.thinking:
        yield {"type": "thinking", "thinking": answer.thinking, "signature": ""}
    text = "\n".join([*filter(None, [answer.text]), *(c.raw for c in answer.calls if not c.complete)])
    if text:
        yield {"type": "text", "text": text}
    for index, call in enumerate(answer.calls):
        if call.complete:
            use = {"type": "tool_use", "id": call_id(id, index), "name": call.name}
            yield use | {"input": parse_json(call.arguments)}
