"""OpenAI's API: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from godwit.server.answers import Answers, check_choices
from godwit.server.errors import from_engine, openai_body
from godwit.server.openai_bodies import (
    ChatChunks,
    ChunkStream,
    TextChunks,
    chat_choice,
    chat_logprobs,
    text_logprobs,
    timings,
    usage_of,
)
from godwit.server.prompts import Conversation, Prompt
from godwit.server.protocol import ChatRequest, CompletionRequest, NamedTool, SharedFields
from godwit.server.service import Chat, Service
from godwit.server.sse import DONE, KEEP_ALIVE, EventStream, event


def chat_of(asked: ChatRequest, service: Service) -> Chat:
    """The request in the words of the service.

    Raises:
        ApiError: it cannot be honoured.
    """
    choosing = asked.choosing() | {"logprobs": (asked.top_logprobs or 0) if asked.logprobs else None}
    if asked.max_completion_tokens is not None:
        choosing["max_tokens"] = asked.max_completion_tokens
    variables = dict(asked.chat_template_kwargs)
    if asked.reasoning_effort is not None:
        variables.setdefault("enable_thinking", asked.reasoning_effort not in ("none", "minimal"))
    choice = asked.tool_choice
    messages = [message.message() for message in asked.messages]
    tools = [tool.function.tool() for tool in asked.tools]
    return Chat(
        conversation=Conversation(messages, tools, variables),
        params=service.sampling(**choosing),
        n=asked.n,
        mode="required" if isinstance(choice, NamedTool) else choice,
        tool=choice.function.name if isinstance(choice, NamedTool) else None,
        parallel=asked.parallel_tool_calls,
        strict=any(tool.function.strict for tool in asked.tools),
        form=asked.form(),
        salt=asked.cache_salt,
    )


async def chat_completions(request: Request) -> Response:
    """Answers to a conversation."""
    service: Service = request.app.state.service
    asked = await service.read(request, ChatRequest)
    service.check_model(asked.model)
    answers = await service.chat(request, chat_of(asked, service))
    if asked.stream:
        head = _head(request, service, "chatcmpl-", "chat.completion.chunk")
        return EventStream(stream(answers, ChatChunks(head, service.tokenizer, usage=_wants_usage(asked))))
    head = _head(request, service, "chatcmpl-", "chat.completion")
    choices = []
    for index, answer in enumerate(await answers.collect(request)):
        logprobs = chat_logprobs(answer.logprobs, service.tokenizer) if asked.logprobs else None
        choices.append(chat_choice(index, answer, head, logprobs))
    ends = {"usage": usage_of(answers.answers), "timings": timings(answers.answers)}
    return JSONResponse({**head, "choices": choices, **ends})


async def completions(request: Request) -> Response:
    """Continuations of plain texts."""
    service: Service = request.app.state.service
    asked = await service.read(request, CompletionRequest)
    service.check_model(asked.model)
    given = asked.prompts()
    check_choices(asked.n * len(given), service.settings.limits.choices)
    params = service.sampling(**asked.choosing(), logprobs=asked.logprobs)
    service.prompts.check_size(*(prompt for prompt in given if isinstance(prompt, str)))
    prompts: list[Prompt] = await service.prompt_threads.run(
        lambda: [service.prompts.text(p) if isinstance(p, str) else Prompt(tuple(p)) for p in given]
    )
    repeated = [prompt for prompt in prompts for _ in range(asked.n)]
    constraints = await service.hold(asked.form(), "none", len(repeated))
    answers = service.start(request, repeated, params, asked.cache_salt, constraints=constraints)
    texts = [p if isinstance(p, str) else service.tokenizer.decode(p) for p in given] if asked.echo else []
    echoes = [text for text in texts for _ in range(asked.n)] or [""] * len(answers.answers)
    head = _head(request, service, "cmpl-", "text_completion")
    if asked.stream:
        shape = TextChunks(head, service.tokenizer, len(given), echoes, usage=_wants_usage(asked))
        return EventStream(stream(answers, shape))
    choices = []
    for index, answer in enumerate(await answers.collect(request)):
        choice: dict[str, Any] = {"index": index, "text": echoes[index] + answer.text}
        logprobs = None
        if asked.logprobs is not None:
            logprobs = text_logprobs(answer.logprobs, service.tokenizer, 0)
        choices.append(choice | {"logprobs": logprobs, "finish_reason": answer.reason})
    ends = {"usage": usage_of(answers.answers, len(given)), "timings": timings(answers.answers)}
    return JSONResponse({**head, "choices": choices, **ends})


async def models(request: Request) -> Response:
    """The one model there is, in a shape that suits both APIs."""
    model = _model(request.app.state.service)
    rest = {"has_more": False, "first_id": model["id"], "last_id": model["id"]}
    return JSONResponse({"object": "list", "data": [model], **rest})


async def model(request: Request) -> Response:
    """The model by one of its names."""
    service: Service = request.app.state.service
    name = request.path_params["model"]
    service.check_model(name)
    return JSONResponse(_model(service) | {"id": name})


def _model(service: Service) -> dict[str, Any]:
    name = service.settings.name
    own = {"id": name, "object": "model", "created": service.started, "owned_by": "godwit"}
    return own | {"type": "model", "display_name": name, "max_model_len": service.context}


def _head(request: Request, service: Service, prefix: str, kind: str) -> dict[str, Any]:
    head = {"id": prefix + request.state.record.id, "object": kind, "created": int(time())}
    return head | {"model": service.settings.name}


def _wants_usage(asked: SharedFields) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage


async def stream(answers: Answers, shape: ChunkStream) -> AsyncIterator[bytes]:
    """The events of a streamed response, up to [DONE] or to an error."""
    try:
        for chunk in shape.begin(len(answers.answers)):
            yield event(chunk)
        async for update in answers.updates():
            if update is None:
                yield KEEP_ALIVE
                continue
            for chunk in shape.chunks(update):
                yield event(chunk)
        for chunk in shape.end(answers.answers):
            yield event(chunk)
        yield DONE
    except Exception as error:
        answers.failed(error)
        yield event(openai_body(from_engine(error)))
    finally:
        answers.cancel()
