"""The chat page: its files, routes and content security policy."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from godwit.server.errors import ApiError
from godwit.server.log import STATIC

DIRECTORY = Path(__file__).with_name("static")
_PLACE = b"__STATIC__"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".woff2": "font/woff2",
}
#: Styles that scripts set on elements, as KaTeX does, need no 'unsafe-inline', unlike styles in HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
_FILE_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "public, max-age=31536000, immutable",
}


@dataclass(frozen=True)
class ChatPage:
    """The page, which may run its own scripts and connect to this server, and nothing else.

    Attributes:
        html: the page.
        digest: of all files; part of their URLs, so that they can be cached forever.
        files: path below the digest -> content.
    """

    html: bytes
    digest: str
    files: Mapping[str, bytes]

    def routes(self) -> list[Route]:
        """The routes of the page and its files."""
        return [
            Route("/", self._page, methods=["GET"]),
            Route(STATIC + "{digest}/{name:path}", self._file, methods=["GET"]),
        ]

    async def _page(self, request: Request) -> Response:
        return self._respond(request, self.html, "text/html; charset=utf-8", _PAGE_HEADERS)

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        content = self.files.get(name) if request.path_params["digest"] == self.digest else None
        if content is None:
            raise ApiError(404, "there is nothing at this address")
        return self._respond(request, content, _TYPES[Path(name).suffix], _FILE_HEADERS)

    def _respond(self, request: Request, content: bytes, kind: str, headers: Mapping[str, str]) -> Response:
        tag = f'"{self.digest}"'
        headers = {**headers, "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)


def read_chat_page(directory: Path = DIRECTORY) -> ChatPage:
    """The page in a directory, with the files that it may load."""
    paths = [path for path in sorted(directory.rglob("*")) if path.suffix in _TYPES]
    files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    html = (directory / "page.html").read_bytes()
    hashed = hashlib.sha256(html)
    for name, content in files.items():
        hashed.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    digest = hashed.hexdigest()[:16]
    return ChatPage(html.replace(_PLACE, f"{STATIC[1:]}{digest}".encode()), digest, files)
