"""The server's OpenAPI 3.1 description."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import godwit
from godwit.server.anthropic.schemas import CountRequest, MessagesRequest
from godwit.server.openai.response_schemas import ResponsesRequest
from godwit.server.openai.schemas import ChatRequest
from godwit.server.openai.text_schemas import CompletionRequest, DetokenizeRequest, TokenizeRequest

_TEMPLATE = "#/components/schemas/{model}"
_BODIES: tuple[tuple[str, type[BaseModel], str, tuple[str, ...]], ...] = (
    ("/v1/chat/completions", ChatRequest, "Answer a conversation.", ("id", "object", "choices", "usage")),
    ("/v1/completions", CompletionRequest, "Continue a text.", ("id", "object", "choices", "usage")),
    (
        "/v1/responses",
        ResponsesRequest,
        "Answer a conversation.",
        ("id", "object", "output", "status", "usage"),
    ),
    ("/v1/messages", MessagesRequest, "Answer a conversation.", ("id", "type", "role", "content", "usage")),
    ("/v1/messages/count_tokens", CountRequest, "Count the tokens of a conversation.", ("input_tokens",)),
    (
        "/tokenize",
        TokenizeRequest,
        "The tokens of a text or a conversation.",
        ("tokens", "count", "max_model_len"),
    ),
    ("/detokenize", DetokenizeRequest, "The text of tokens.", ("prompt",)),
)
_PLAIN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("/v1/models", "The model.", ("object", "data")),
    ("/tokenizer_info", "The tokenizer's special tokens and chat template.", ("eos_token", "chat_template")),
    ("/health", "Whether the process is up.", ("status",)),
    ("/ready", "Whether requests can be served.", ("status",)),
)
_ERRORS = {
    "400": "The request is invalid.",
    "401": "A key is needed.",
    "403": "The Host header is not accepted.",
    "404": "There is no such model.",
    "408": "The body took too long.",
    "413": "The body is too large.",
    "415": "The body must be JSON.",
    "429": "The key used up its requests or tokens of this minute.",
    "500": "An internal error.",
    "503": "The server is overloaded, shutting down or failing.",
    "529": "The same in Anthropic's API.",
}


def describe() -> dict[str, Any]:
    """The description."""
    _, definitions = models_json_schema(
        [(model, "validation") for _, model, _, _ in _BODIES], ref_template=_TEMPLATE
    )
    schemas = definitions.get("$defs", {}) | {"Error": _error_schema()}
    for schema in schemas.values():
        _allow_null(schema)
    paths = {path: {"post": _post(model, text, fields)} for path, model, text, fields in _BODIES}
    paths |= {path: {"get": _operation(text, _json(_object(fields)))} for path, text, fields in _PLAIN}
    paths["/metrics"] = {
        "get": _operation("Counts for Prometheus.", {"text/plain": {"schema": {"type": "string"}}})
    }
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Godwit", "version": godwit.__version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": keys},
        "security": [{"bearer": []}, {"header": []}, {}],
    }


def _allow_null(schema: dict[str, Any]) -> None:
    """An optional field may be null, which means the same as leaving it out."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


def _post(model: type[BaseModel], text: str, fields: tuple[str, ...]) -> dict[str, Any]:
    answers = _json(_object(fields))
    if "stream" in model.model_fields:
        answers["text/event-stream"] = {}
    body = {"required": True, "content": _json({"$ref": _TEMPLATE.format(model=model.__name__)})}
    return _operation(text, answers) | {"requestBody": body}


def _operation(text: str, content: dict[str, Any]) -> dict[str, Any]:
    error = _json({"$ref": _TEMPLATE.format(model="Error")})
    errors = {status: {"description": meaning, "content": error} for status, meaning in _ERRORS.items()}
    return {"summary": text, "responses": {"200": {"description": "OK", "content": content}, **errors}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _object(fields: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "object", "required": list(fields)}


def _error_schema() -> dict[str, Any]:
    error = {"type": "object", "required": ["type", "message"], "properties": {"message": {"type": "string"}}}
    return {"type": "object", "required": ["error"], "properties": {"error": error}}
