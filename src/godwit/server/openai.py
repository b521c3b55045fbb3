"""OpenAI's API: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from godwit.engine.chat_prompt import Prompt
from godwit.server.answers import Answers, check_choices
from godwit.server.errors import bad_request, from_engine, openai_body
from godwit.server.openai_bodies import (
    ChatChunks,
    ChunkStream,
    Echo,
    TextChunks,
    chat_choice,
    chat_logprobs,
    text_choice,
    timings,
    usage_of,
)
from godwit.server.protocol import ChatRequest, SharedFields
from godwit.server.protocol_texts import CompletionRequest
from godwit.server.service import Chat, Service, allowed_tools
from godwit.server.sse import DONE, KEEP_ALIVE, EventStream, event

#: What the list of models tells of the choices that are made where a request leaves them open.
_SHOWN_DEFAULTS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "max_tokens"),
)


def chat_of(asked: ChatRequest, service: Service) -> Chat:
    """The request in the words of the service.

    Raises:
        ApiError: it cannot be honoured.
    """
    choosing = asked.choosing() | {"logprobs": (asked.top_logprobs or 0) if asked.logprobs else None}
    if asked.max_completion_tokens is not None:
        choosing["max_tokens"] = asked.max_completion_tokens
    wish = asked.wish(asked.reasoning_effort, "reasoning_effort")
    variables = service.thinking.variables(wish, asked.chat_template_kwargs)
    choice = asked.choice()
    tools = allowed_tools([tool.function for tool in asked.tools], choice)
    return Chat(
        conversation=asked.conversation_of(asked.messages, [tool.tool() for tool in tools], variables),
        params=service.sampling(**choosing),
        n=asked.n,
        mode=choice.mode,
        tool=choice.tool,
        parallel=asked.parallel_tool_calls,
        strict=any(tool.strict for tool in tools),
        form=asked.form(),
        salt=asked.cache_salt,
        thinking=wish,
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
    num_prompts = len(asked.prompts())
    check_choices(asked.n * num_prompts, service.settings.limits.choices)
    params = service.sampling(**choosing_of(asked, service))
    each = [pair for pair in await _prompts(request, asked, service) for _ in range(asked.n)]
    constraints = await service.hold(request, asked.form(), "none", len(each))
    scored = asked.echo and asked.logprobs is not None
    prompts, echoes = [prompt for prompt, _ in each], [echo for _, echo in each]
    answers = service.start(
        request, prompts, params, asked.cache_salt, constraints=constraints, score_prompts=scored
    )
    head, tokenizer = _head(request, service, "cmpl-", "text_completion"), service.tokenizer
    if asked.stream:
        shape = TextChunks(head, tokenizer, num_prompts, echoes, usage=_wants_usage(asked))
        return EventStream(stream(answers, shape))
    with_logprobs = tokenizer if asked.logprobs is not None else None
    choices = [
        text_choice(index, answer, echoes[index], with_logprobs)
        for index, answer in enumerate(await answers.collect(request))
    ]
    ends = {"usage": usage_of(answers.answers, num_prompts), "timings": timings(answers.answers)}
    return JSONResponse({**head, "choices": choices, **ends})


def choosing_of(asked: CompletionRequest, service: Service) -> dict[str, Any]:
    """How to choose tokens; an answer that fills a gap ends where the gap does.

    Raises:
        ApiError: the model cannot fill gaps.
    """
    choosing = asked.choosing() | {"logprobs": asked.logprobs}
    if not asked.suffix:
        return choosing
    if service.fim is None:
        raise bad_request(
            "this model's tokenizer has no tokens for filling gaps (such as <|fim_prefix|>), so it cannot "
            "use a `suffix`; leave it out",
            "suffix",
        )
    return choosing | {"stop_token_ids": [*(asked.stop_token_ids or ()), *service.fim.ends]}


async def _prompts(request: Request, asked: CompletionRequest, service: Service) -> list[tuple[Prompt, Echo]]:
    """The prompts, and how answers to them begin."""
    given = asked.prompts()
    service.prompts.check_size(asked.suffix, *(prompt for prompt in given if isinstance(prompt, str)))

    def encode(text: str, *, around: bool) -> Prompt:
        return service.prompts.text(text, add_special_tokens=around, parse_special=asked.parse_special)

    def read(one: str | list[int]) -> tuple[Prompt, Echo]:
        around = asked.add_special_tokens and not asked.suffix
        prompt = encode(one, around=around) if isinstance(one, str) else Prompt(tuple(one))
        if asked.suffix and service.fim is not None:
            behind = encode(asked.suffix, around=False)
            return Prompt(service.fim.prompt(prompt.ids, behind.ids)), Echo()
        if not asked.echo:
            return prompt, Echo()
        text = one if isinstance(one, str) else service.tokenizer.decode(one)
        return prompt, Echo(text, () if asked.logprobs is None else prompt.ids)

    return await service.prepare(request, lambda: [*map(read, given)])


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
    name, params = service.settings.name, service.sampling()
    own = {"id": name, "object": "model", "created": service.started, "owned_by": "godwit"}
    own |= {"type": "model", "display_name": name, "max_model_len": service.context}
    return own | {"default_sampling": {field: getattr(params, field) for field in _SHOWN_DEFAULTS}}


def _head(request: Request, service: Service, prefix: str, kind: str) -> dict[str, Any]:
    head = {"id": prefix + request.state.record.id, "object": kind, "created": int(time())}
    return head | {"model": service.settings.name, "system_fingerprint": service.fingerprint}


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
