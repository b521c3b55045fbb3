"""Shared by the data modules of the default recipe: records, chats, dates and system prompts."""

from __future__ import annotations

import datetime
import hashlib
import json
import lzma
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Message = dict[str, Any]
Tool = dict[str, Any]
T = TypeVar("T")


@dataclass
class Chat:
    """One conversation, in the form of the chat template.

    `spare` names functions that no call of the conversation needs, which may be dropped if it is too long.
    """

    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)


def read_jsonl(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The first `limit` records of an xz-compressed JSON Lines file."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if limit is not None and number >= limit:
                return
            yield json.loads(line)


def stable_hash(text: str) -> int:
    """A hash that is the same in every process and on every machine, 0 .. 2**64 - 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_out(key: str, percent: float) -> bool:
    """Whether `key` is among the `percent` held out from training."""
    return stable_hash("heldout:" + key) % 10_000 < percent * 100


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    """One of `choices`."""
    return choices[rng.randrange(len(choices))]


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    """A system message."""
    return {"role": "system", "content": text}


def long_date(day: datetime.date) -> str:
    """`Friday, March 1, 2019`."""
    return f"{day:%A}, {day:%B} {day.day}, {day.year}"


def random_date(rng: random.Random) -> datetime.date:
    """A day in the years 2018 to 2030."""
    return datetime.date(2018, 1, 1) + datetime.timedelta(days=rng.randrange(13 * 365))


DATE_LINES = (
    "Today is {iso}.",
    "Today is {long}.",
    "Today's date is {iso}.",
    "Today's date is {long}.",
    "The current date is {iso}.",
    "The current date is {long}.",
    "Current date: {iso}",
    "Date: {iso} ({weekday})",
    "It is {long}.",
    "Today is {weekday}, {iso}.",
    "Today is {weekday} {day} {month} {year}.",
)


def date_line(rng: random.Random, day: datetime.date, *, weekday: bool = False) -> str:
    """A sentence that gives the date; with `weekday`, one that names the day of the week."""
    lines = [line for line in DATE_LINES if not weekday or "{long}" in line or "{weekday}" in line]
    return pick(rng, lines).format(
        iso=day.isoformat(),
        long=long_date(day),
        weekday=f"{day:%A}",
        day=day.day,
        month=f"{day:%B}",
        year=day.year,
    )


PERSONAS = (
    "You are Godwit, a helpful assistant.",
    "You are Godwit, a helpful assistant.",
    "You are Godwit.",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are Godwit, a small and friendly assistant.",
    "You are a friendly assistant that answers briefly.",
    "You are Godwit, an assistant that runs on this computer. Be brief and honest.",
    "Answer the user's questions. If you do not know, say so.",
    "You are a polite assistant. Keep your answers short.",
)

TOOL_PERSONAS = (
    *PERSONAS,
    "You are a helpful assistant with access to functions. Use them when they are needed.",
    "You help people with bookings and questions. Ask for what is missing before you call a function.",
    "You are an assistant that can call functions.",
    "Help the user with the functions below.",
)


def system_prompt(
    rng: random.Random, *, day: datetime.date | None = None, none: float = 0.4
) -> list[Message]:
    """Zero or one short system message, with a date in a part of them (always when `day` is given and it exists)."""
    if rng.random() < none:
        return []
    text = pick(rng, PERSONAS)
    if day is not None or rng.random() < 0.3:
        text += pick(rng, (" ", "\n")) + date_line(rng, day or random_date(rng))
    return [system(text)]


def sentence(text: str) -> str:
    """`text` with a capital letter at its start and a full stop at its end."""
    text = text.strip()
    if not text:
        return text
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?\"'" else text + "."
