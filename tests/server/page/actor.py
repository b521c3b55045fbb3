"""A server that serves the chat page under a strict policy and plays the answers it is given."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from godwit.server.chat_page import POLICY, read_chat_page

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = read_chat_page()
DEFAULTS = {
    **{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "max_tokens": None},
    **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def end(reason: str = "stop", *, prompt: int = 20, cached: int = 16, generated: int = 5) -> list[Any]:
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    details = {"cached_tokens": cached}
    usage = {"prompt_tokens": prompt, "completion_tokens": generated, "prompt_tokens_details": details}
    return [last, {"choices": [], "usage": usage}, "[DONE]"]


def text(*parts: str) -> list[Any]:
    """A whole answer."""
    return [*(delta(content=part) for part in parts), *end()]


def call(name: str, arguments: str, index: int = 0) -> list[Any]:
    """A tool call that comes in two pieces."""
    half = len(arguments) // 2
    first = {"index": index, "id": f"call_{index}", "function": {"name": name, "arguments": arguments[:half]}}
    rest = {"index": index, "function": {"arguments": arguments[half:]}}
    return [delta(tool_calls=[first]), delta(tool_calls=[rest])]


class Server(ThreadingHTTPServer):
    """Each reply is a status with a body, or a list of chunks, with pauses (seconds, an Event)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: deque[list[Any] | tuple[int, Any]] = deque()
        self.requests: list[dict[str, Any]] = []
        self.key: str | None = None
        self.promised: int | None = None  # the length of a reply, as its header has it
        self.left = threading.Event()  # a client went away in the middle of a reply

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """The page, the list of models, and the answers."""

    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        prefix = f"/static/{PAGE.digest}/"
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.html)
        elif self.path.startswith(prefix):
            name = self.path.removeprefix(prefix)
            kind = {".js": "text/javascript", ".css": "text/css"}.get(Path(name).suffix, "font/woff2")
            self._send(200, kind, PAGE.files[name], **{"Cache-Control": "max-age=3600"})
        elif self.path == "/v1/models" and not self._refused():
            models = [{"id": "tiny", "default_sampling": DEFAULTS}, {"id": "other"}]
            self._send(200, "application/json", json.dumps({"data": models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        if self._refused():
            return
        self.server.requests.append(body)
        reply = self.server.replies.popleft()
        if isinstance(reply, tuple):
            self._send(reply[0], "application/json", json.dumps(reply[1]).encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if self.server.promised is not None:
            self.send_header("Content-Length", str(self.server.promised))
        self.end_headers()
        try:
            for item in reply:
                self._play(item)
        except OSError:
            self.server.left.set()

    def _send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _refused(self) -> bool:
        if self.server.key in (None, self.headers.get("Authorization", "").removeprefix("Bearer ")):
            return False
        error = {"error": {"message": "The API key is missing or wrong."}}
        self._send(401, "application/json", json.dumps(error).encode())
        return True

    def _play(self, item: Any) -> None:
        if isinstance(item, threading.Event):
            item.wait(60)
        elif isinstance(item, float):
            time.sleep(item)
        elif item == "hang":
            for _ in range(1000):
                self.wfile.write(b": keep-alive\r\n\r\n")
                time.sleep(0.02)
        else:
            data = item if isinstance(item, str) else json.dumps(item)
            self.wfile.write(f"data: {data}\n\n".encode())
