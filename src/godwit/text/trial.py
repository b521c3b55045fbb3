"""Tries an untrusted tokenizer in a limited process before it is read in this one.

A `tokenizer.json` is data, but it says what is done to every text: steps that double it thirty times, or
tokens of a megabyte, take all memory, and some contents make the native library abort the program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from godwit import errors
from godwit.errors import CheckpointError
from godwit.worker import Worker, WorkerLimits

from .files import FILES, check_size

#: Seconds of processor time, and bytes of address space, for a small tokenizer and more for each byte of its
#: files. One of 18 MB and 270,000 tokens takes 3 s and 340 MiB.
SECONDS, SECONDS_PER_BYTE = 10.0, 1e-6
MEMORY_BYTES, MEMORY_PER_BYTE = 1 << 30, 32
#: Seconds of wall time for one of processor time, since the machine may be busy.
_WALL_SECONDS = 10
MAX_STEPS = 64
MAX_GROWTH = 4096
_passed: set[bytes] = set()  # digests of what was tried in this process


def try_out(files: Mapping[str, bytes], where: str) -> None:
    """Read a tokenizer and use it a little in another process, once for the same files.

    Raises:
        CheckpointError, TemplateError, UnsupportedModelError: as reading it, or it exceeds a limit.
        BusyError: the process cannot be started.
    """
    used = {name: files[name] for name in FILES if name in files}
    for name, content in used.items():
        check_size(len(content), FILES[name], f"{where}/{name}")
    digest = _digest(used)
    if digest in _passed:
        return
    size = sum(map(len, used.values()))
    seconds, memory_bytes = SECONDS + size * SECONDS_PER_BYTE, MEMORY_BYTES + size * MEMORY_PER_BYTE
    worker = Worker(
        Path(__file__).with_name("trial_worker.py"),
        {},
        WorkerLimits(memory_bytes, cpu_seconds=seconds),
        purpose="tries tokenizers",
        hint="check the memory limit of this system",
    )
    request = {"where": where, "names": list(used)}
    try:
        answer = worker.ask(request, _WALL_SECONDS * seconds, used.values())
    finally:
        worker.drop()
    if answer is None or answer.keys() == {"error"}:
        raise CheckpointError(
            f"{where}: its tokenizer was stopped: it ends the program that reads it, or takes more than "
            f"{seconds:.0f} s or {memory_bytes >> 20} MiB; use another one"
        )
    if answer:
        raise getattr(errors, answer["kind"])(answer["error"])
    _passed.add(digest)


def check_growth(raw: Mapping[str, Any]) -> None:
    """Refuse steps that together make a text very much longer, whatever the text.

    Raises:
        CheckpointError: there are too many steps, or they multiply a text by too much.
    """
    growth = 1
    for count, step in enumerate(_steps([raw.get("normalizer"), raw.get("pre_tokenizer")]), 1):
        if step.get("type") == "Replace":
            growth *= _growth(step)
        if count > MAX_STEPS or growth > MAX_GROWTH:
            raise CheckpointError("its normalizer may make texts very much longer; use another tokenizer")


def _growth(step: Mapping[str, Any]) -> int:
    """By how much a replacement makes a text longer at most."""
    content, pattern = str(step.get("content", "")).encode(), step.get("pattern")
    word = pattern.get("String") if isinstance(pattern, Mapping) else None
    if isinstance(word, str) and word:
        return max(1, -(-len(content) // len(word.encode())))
    return 1 + len(content)  # an empty match puts the content between all letters


def _steps(value: Any) -> Iterator[Mapping[str, Any]]:
    """All steps, nested ones too."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting.extend(one)
        elif isinstance(one, Mapping):
            yield one
            waiting.extend(one.get(key) for key in ("normalizers", "pretokenizers"))


def _digest(files: Mapping[str, bytes]) -> bytes:
    whole = hashlib.blake2b(digest_size=32)
    for name, data in files.items():
        whole.update(f"{name} {len(data)}\n".encode())
        whole.update(data)
    return whole.digest()
