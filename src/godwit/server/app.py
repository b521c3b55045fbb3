"""The application: routes, middleware, start and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from godwit.server.anthropic import messages
from godwit.server.auth import Guard
from godwit.server.chat_page import read_chat_page
from godwit.server.errors import INTERNAL, ApiError, bad_request, respond
from godwit.server.host import EngineHost
from godwit.server.log import Record, RequestLog
from godwit.server.openai import completions, responses
from godwit.server.openai.text_schemas import DetokenizeRequest, TokenizeRequest
from godwit.server.openapi import describe
from godwit.server.service import Service
from godwit.server.settings import Settings
from godwit.server.thinking import ThinkingWish

_BATCH = 4096


def make_app(service: Service) -> Starlette:
    """The application. It closes the engine at shutdown."""
    settings = service.settings
    routes = [
        *read_chat_page().routes(),
        *(Route(path, endpoint, methods=[method]) for method, path, endpoint in with_short_paths(ROUTES)),
    ]
    app = Starlette(
        routes=routes,
        middleware=_middleware(service, settings),
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error},
        lifespan=lambda app: _lifespan(service.host, service),
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _middleware(service: Service, settings: Settings) -> list[Middleware]:
    layers = [Middleware(RequestLog, observe=service.metrics.observe)]
    if settings.origins:  # before the guard: preflight requests carry no key
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
                max_age=600,
            )
        )
    return [*layers, Middleware(Guard, settings=settings)]


@contextlib.asynccontextmanager
async def _lifespan(host: EngineHost, service: Service) -> AsyncIterator[None]:
    await service.prompts.warm()
    watcher = asyncio.create_task(host.watch(service.metrics.restarts.inc))
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        await asyncio.to_thread(host.close)


async def tokenize(request: Request) -> Response:
    """The tokens of a text, or of a conversation as the model reads it."""
    service: Service = request.app.state.service
    asked = await service.bodies.read_body(request, TokenizeRequest)
    prompts = service.prompts
    if asked.messages is None:
        text = asked.prompt or ""
        prompts.maker.check_size(text)
        add, parse = asked.add_special_tokens, asked.parse_special
        prompt = await prompts.run(
            request, lambda: prompts.maker.text(text, add_special_tokens=add, parse_special=parse)
        )
    else:
        tools = [tool.function.tool() for tool in asked.tools]
        variables = service.thinking.variables(ThinkingWish(), asked.chat_template_kwargs)
        prompt = await prompts.make_prompt(request, asked.conversation_of(asked.messages, tools, variables))
    rest = {"count": len(prompt.ids), "max_model_len": service.context}
    ids = await prompts.run(request, lambda: _as_json(prompt.ids))
    return Response(f'{{"tokens":{ids},{json.dumps(rest)[1:]}', media_type="application/json")


def _as_json(ids: Sequence[int]) -> str:
    """In batches: writing a million ids at once would block the interpreter for long."""
    batches = (ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH))
    return f"[{','.join(','.join(map(str, batch)) for batch in batches)}]"


async def detokenize(request: Request) -> Response:
    """The text of tokens, with control tokens spelled out."""
    service: Service = request.app.state.service
    asked = await service.bodies.read_body(request, DetokenizeRequest)
    unknown = [id for id in asked.tokens if id >= service.tokenizer.vocab_size]
    if unknown:
        raise bad_request(
            f"there is no token {unknown[0]}: the ids end at {service.tokenizer.vocab_size - 1}"
        )
    text = await service.prompts.run(
        request, lambda: service.tokenizer.decode(asked.tokens, skip_special=False)
    )
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's special tokens and chat template, for evaluation tools."""
    service: Service = request.app.state.service
    tokenizer, template = service.tokenizer, service.tokenizer.chat_template
    info: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.named_tokens}
    info |= {
        "eos_token_ids": sorted(tokenizer.stop_ids),
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.context,
        "chat_template": None if template is None else template.source,
    }
    return JSONResponse({"bos_token": None, "eos_token": None, "pad_token": None, "unk_token": None} | info)


async def health(request: Request) -> Response:
    """Whether the process is up."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether requests can be served, and if not, why."""
    service: Service = request.app.state.service
    reason = "the server is shutting down" if service.draining else service.host.trouble
    if reason is None:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not ready", "reason": reason}, 503)


async def metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    """The OpenAPI description."""
    return JSONResponse(describe())


Endpoint = Callable[[Request], Awaitable[Response]]
ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/chat/completions", completions.chat_completions),
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/responses", responses.responses),
    ("GET", "/v1/models", completions.models),
    ("GET", "/v1/models/{model:path}", completions.model),
    ("POST", "/v1/messages", messages.messages),
    ("POST", "/v1/messages/count_tokens", messages.count_tokens),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/tokenizer_info", tokenizer_info),
    ("GET", "/health", health),
    ("GET", "/ready", ready),
    ("GET", "/metrics", metrics),
    ("GET", "/openapi.json", openapi),
)


def with_short_paths(
    routes: Iterable[tuple[str, str, Endpoint]],
) -> Iterator[tuple[str, str, Endpoint]]:
    """The routes, those below /v1 also without it: clients differ in whether their base URL includes it."""
    for method, path, endpoint in routes:
        yield method, path, endpoint
        if path.startswith("/v1/"):
            yield method, path.removeprefix("/v1"), endpoint


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    record: Record = request.state.record
    record.error = record.error or error.message
    return respond(error, request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    if error.status_code == 405:
        return respond(ApiError(405, "wrong method for this address", headers=headers), request.url.path)
    return respond(ApiError(error.status_code, "there is nothing at this address"), request.url.path)


async def _internal_error(request: Request, error: Exception) -> Response:
    return respond(ApiError(500, INTERNAL), request.url.path)
