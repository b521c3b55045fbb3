"""The child's side of a :class:`godwit.worker.Worker`: loads a script, sets limits, answers requests.

It is started by path and imports nothing of godwit. Frames on stdin and stdout are an 8-byte little-endian
length and that many bytes. The first request (JSON) is the set-up: ``sys_path``, ``script``, ``setup``,
``memory_bytes``, ``cpu_seconds``, ``stack_bytes``; it is answered by ``{}``. Each later one is JSON,
``{"value": ..., "num_files": n}``, and n frames of raw bytes. A process that ends without an answer has
exceeded a limit, or crashed.

The script defines ``start(setup)``. It returns the function that answers requests: it gets the value and the
files, and returns what JSON can hold.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any


def read_frame(stream: IO[bytes]) -> bytes:
    """The next frame; raises EOFError if the other side is gone."""
    header = stream.read(8)
    size = int.from_bytes(header, "little")
    body = stream.read(size) if len(header) == 8 else b""
    if len(header) < 8 or len(body) < size:
        raise EOFError
    return body


def write_frame(stream: IO[bytes], body: bytes) -> None:
    """Send a frame."""
    stream.write(len(body).to_bytes(8, "little"))
    stream.write(body)
    stream.flush()


def limit(memory_bytes: int, cpu_seconds: float | None) -> None:
    """Let the system enforce the limits from here on, where it can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if cpu_seconds is not None:
            cpu = math.ceil(cpu_seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def reply(answer: Callable[..., Any], value: Any, files: list[bytes]) -> Any:
    """The answer to one request; ``{"error": ...}`` if it raised an exception."""
    try:
        return answer(value, *files)
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except BaseException as error:  # a panic in Rust code is not an Exception
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def serve(begin: Mapping[str, Any]) -> None:
    """Answer requests until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    spec = importlib.util.spec_from_file_location("godwit_script", begin["script"])
    if spec is None or spec.loader is None:
        raise ImportError(begin["script"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = module.start(begin["setup"])
    limit(begin["memory_bytes"], begin["cpu_seconds"])
    write_frame(answers, b"{}")
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = json.loads(read_frame(requests))
            files = [read_frame(requests) for _ in range(request["num_files"])]
            write_frame(answers, json.dumps(reply(answer, request["value"], files)).encode())


def main() -> None:
    """Set up, then serve, in a thread if the stack is to be small."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asked
    begin = json.loads(read_frame(sys.stdin.buffer))
    sys.path[:] = begin["sys_path"]
    if not begin["stack_bytes"]:
        return serve(begin)
    threading.stack_size(begin["stack_bytes"])
    thread = threading.Thread(target=serve, args=(begin,))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
