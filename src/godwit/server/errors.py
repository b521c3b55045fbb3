"""Errors as clients see them: one sentence, in the format of the API that was called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from godwit.errors import BusyError, MemoryBudgetError, TemplateError, UsageError

INTERNAL = "an internal error ended this request; see the server's log"
MAX_MESSAGE_CHARS = 600
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    413: "request_too_large",
    529: "overloaded_error",
}
#: A path or an address in memory: clients must not see them.
_PATH = re.compile(r"[/\\][\w.@+-]+[/\\]|0x[0-9a-fA-F]{6,}")


class ApiError(Exception):
    """A request that is refused or failed.

    Attributes:
        status: HTTP status.
        message: one sentence for the client.
        param: the field of the request at fault.
        code: for programs.
        headers: of the response.
        for_anthropic: the message for Anthropic's clients, where they expect another wording.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        for_anthropic: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.for_anthropic = for_anthropic or message


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the client must change the request."""
    return ApiError(400, message, param=param, code=code)


def too_long(context: int, prompt: int, answer: int = 1, *, part: str = "messages") -> ApiError:
    """400: the text does not fit the context. Clients recognize this wording and shorten the text.

    Args:
        context: the model's context in tokens.
        prompt: tokens of the prompt, or a lower bound.
        answer: requested tokens.
        part: the part of the request that is too long.
    """
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + answer} "
        f"tokens ({prompt} in the {part}, {answer} in the completion). Please shorten the {part}.",
        code="context_length_exceeded",
        for_anthropic=f"prompt is too long: {max(prompt, context + 1)} tokens > {context} maximum",
    )


def overloaded(message: str) -> ApiError:
    """503: the same request may succeed later."""
    return ApiError(503, message, code="overloaded", headers={"Retry-After": "1"})


def rate_limited(what: str, seconds: int) -> ApiError:
    """429: a key used up its ``what`` ("requests" or "tokens") of this minute."""
    return ApiError(
        429,
        f"this API key has used up its {what} per minute; send the request again in {seconds} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


def from_engine(error: Exception) -> ApiError:
    """The error that the client sees for one from the engine or the tokenizer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError | MemoryBudgetError | TemplateError):
        return bad_request(_harmless(str(error), "the request cannot be served as it is"))
    if isinstance(error, BusyError):
        return overloaded("the server is short of processes or memory; send the request again in a moment")
    return ApiError(500, INTERNAL)


def failed_answer(text: str | None, *, refused: bool = False) -> ApiError:
    """The error for an answer that ended with ``text``: 400 if it was ``refused``, else 500."""
    return ApiError(400 if refused else 500, _harmless(text or INTERNAL, INTERNAL))


def _harmless(text: str, other: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS and not _PATH.search(text) else other


def speaks_anthropic(path: str) -> bool:
    """Whether the errors of a path have Anthropic's format."""
    return re.match(r"(/v1)?/messages(/|$)", path) is not None


def openai_body(error: ApiError) -> dict[str, Any]:
    """The error in OpenAI's format."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """The error in Anthropic's format."""
    status = anthropic_status(error)
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.for_anthropic}}


def anthropic_status(error: ApiError) -> int:
    """Anthropic's API has its own status for an overloaded server."""
    return 529 if error.status == 503 else error.status


def respond(error: ApiError, path: str) -> Response:
    """The response to a request for ``path`` that failed."""
    if speaks_anthropic(path):
        return JSONResponse(anthropic_body(error), anthropic_status(error), headers=error.headers)
    return JSONResponse(openai_body(error), error.status, headers=error.headers)
