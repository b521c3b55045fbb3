"""OpenAI's API: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from godwit.engine import GenerationRequest
from godwit.engine.chat_prompt import Prompt
from godwit.server.errors import bad_request
from godwit.server.openai.choices import Echo, chat_choice, chat_logprobs, text_choice, timings, usage_of
from godwit.server.openai.chunks import ChatChunks, TextChunks
from godwit.server.openai.schemas import ChatRequest
from godwit.server.openai.text_schemas import CompletionRequest
from godwit.server.service import ChatJob, Service
from godwit.server.sse import EventStream

#: The defaults of requests that the list of models shows.
_SHOWN_DEFAULTS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "max_tokens"),
)


def job_of(asked: ChatRequest, service: Service) -> ChatJob:
    """The request, independent of the API.

    Raises:
        ApiError: it is contradictory.
    """
    choosing = asked.choosing() | {"logprobs": (asked.top_logprobs or 0) if asked.logprobs else None}
    if asked.max_completion_tokens is not None:
        choosing["max_tokens"] = asked.max_completion_tokens
    wish = asked.wish(asked.reasoning_effort, "reasoning_effort")
    variables = service.thinking.variables(wish, asked.chat_template_kwargs)
    choice = asked.choice()
    tools = choice.among([tool.function for tool in asked.tools])
    return ChatJob(
        conversation=asked.conversation_of(asked.messages, [tool.tool() for tool in tools], variables),
        params=service.sampling(**choosing),
        n=asked.n,
        choice=choice,
        parallel=asked.parallel_tool_calls,
        strict=any(tool.strict for tool in tools),
        form=asked.form(),
        salt=asked.cache_salt,
        thinking=wish,
    )


async def chat_completions(request: Request) -> Response:
    """Answers to a conversation."""
    service: Service = request.app.state.service
    asked = await service.bodies.read_body(request, ChatRequest)
    answers = await service.chat(request, job_of(asked, service))
    if asked.stream:
        head = _head(request, service, "chatcmpl-", "chat.completion.chunk")
        return EventStream(answers, ChatChunks(head, service.tokenizer, usage=asked.wants_usage))
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
    asked = await service.bodies.read_body(request, CompletionRequest)
    num_prompts = len(asked.prompts())
    service.check_load(asked.n * num_prompts)
    params = service.sampling(**choosing_of(asked, service))
    each = [pair for pair in await _prompts(request, asked, service) for _ in range(asked.n)]
    constraints = await service.forms.constrain(request, asked.form(), "none", len(each))
    scored = asked.echo and asked.logprobs is not None
    echoes = [echo for _, echo in each]
    generations = [
        GenerationRequest(
            prompt.ids, params, prompt.boundaries, asked.cache_salt, constraint, score_prompt=scored
        )
        for (prompt, _), constraint in zip(each, constraints, strict=True)
    ]
    answers = service.submit(request, generations)
    head, tokenizer = _head(request, service, "cmpl-", "text_completion"), service.tokenizer
    if asked.stream:
        return EventStream(answers, TextChunks(head, tokenizer, num_prompts, echoes, usage=asked.wants_usage))
    with_logprobs = tokenizer if asked.logprobs is not None else None
    choices = [
        text_choice(index, answer, echoes[index], with_logprobs)
        for index, answer in enumerate(await answers.collect(request))
    ]
    ends = {"usage": usage_of(answers.answers, num_prompts), "timings": timings(answers.answers)}
    return JSONResponse({**head, "choices": choices, **ends})


def choosing_of(asked: CompletionRequest, service: Service) -> dict[str, Any]:
    """The sampling parameters. An answer that fills in the middle ends with the gap.

    Raises:
        ApiError: the model cannot fill in the middle.
    """
    choosing = asked.choosing() | {"logprobs": asked.logprobs}
    if not asked.suffix:
        return choosing
    if service.fim is None:
        raise bad_request(
            "this model's tokenizer has no fill-in-the-middle tokens (such as <|fim_prefix|>), so it cannot "
            "use a `suffix`; remove it",
            "suffix",
        )
    return choosing | {"stop_token_ids": [*(asked.stop_token_ids or ()), *service.fim.ends]}


async def _prompts(request: Request, asked: CompletionRequest, service: Service) -> list[tuple[Prompt, Echo]]:
    """The prompts, and the echoes with which their answers begin."""
    given, maker = asked.prompts(), service.prompts.maker
    maker.check_size(asked.suffix, *(prompt for prompt in given if isinstance(prompt, str)))

    def encode(text: str, *, around: bool) -> Prompt:
        return maker.text(text, add_special_tokens=around, parse_special=asked.parse_special)

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

    return await service.prompts.run(request, lambda: [*map(read, given)])


async def models(request: Request) -> Response:
    """The one model of the server, in a format that fits both APIs."""
    model = _model(request.app.state.service)
    rest = {"has_more": False, "first_id": model["id"], "last_id": model["id"]}
    return JSONResponse({"object": "list", "data": [model], **rest})


async def model(request: Request) -> Response:
    """The model by one of its names."""
    service: Service = request.app.state.service
    name = request.path_params["model"]
    service.bodies.check_model(name)
    return JSONResponse(_model(service) | {"id": name})


def _model(service: Service) -> dict[str, Any]:
    name, params = service.settings.name, service.sampling()
    own = {"id": name, "object": "model", "created": service.started, "owned_by": "godwit"}
    own |= {"type": "model", "display_name": name, "max_model_len": service.context}
    return own | {"default_sampling": {field: getattr(params, field) for field in _SHOWN_DEFAULTS}}


def _head(request: Request, service: Service, prefix: str, kind: str) -> dict[str, Any]:
    head = {"id": prefix + request.state.record.id, "object": kind, "created": int(time())}
    return head | {"model": service.settings.name, "system_fingerprint": service.fingerprint}
