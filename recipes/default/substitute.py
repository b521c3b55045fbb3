"""New names in tool dialogues, so that a call's arguments must be copied from the conversation, not memorised."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from recipes.default.common import Message, Tool, pick

# What may be replaced: one to five capitalised words, such as a city, a person, a restaurant or a film.
NAME = re.compile(r"(?=.{3,40}$)[A-Z][A-Za-z'&.\-]*(?: (?:of |the |de |and |& )?[A-Z][A-Za-z'&.\-]*){0,4}")
ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "qu",
    "r",
    "s",
    "sh",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ee", "ia", "oa"]
CODAS = ["", "", "", "l", "n", "r", "s", "t", "nd", "ck", "m"]
ENDINGS = [
    "ton",
    "ville",
    "field",
    "ford",
    "ham",
    "bury",
    "ia",
    "ano",
    "ez",
    "son",
    "sky",
    "berg",
    "wood",
    "port",
    "mouth",
    "dale",
    "stad",
    "grad",
    "nes",
]
HEADS = [
    "Blue",
    "Golden",
    "Little",
    "Old",
    "New",
    "Royal",
    "Green",
    "Silver",
    "Happy",
    "Lucky",
    "Red",
    "White",
    "Black",
    "Grand",
    "Sunny",
    "Quiet",
    "Hidden",
    "Wild",
    "Lost",
    "Bella",
    "Casa",
    "Chez",
    "La",
    "Mount",
    "Lake",
    "Fort",
    "Port",
    "Saint",
    "North",
    "South",
    "East",
    "West",
    "Upper",
    "Lower",
    "Big",
    "Great",
    "Last",
    "First",
]
TAILS = [
    "Harbor",
    "Garden",
    "Lantern",
    "River",
    "Bridge",
    "Table",
    "Kitchen",
    "Lodge",
    "Inn",
    "Park",
    "Tower",
    "Corner",
    "Springs",
    "Valley",
    "Hill",
    "Forest",
    "Moon",
    "Star",
    "Heart",
    "Road",
    "Dragon",
    "Rose",
    "Oak",
    "House",
    "Palace",
    "Station",
    "Plaza",
    "Square",
    "Mill",
    "Crown",
    "Anchor",
    "Bay",
    "Creek",
    "Point",
    "Night",
    "Summer",
    "Dream",
]


def coined(rng: random.Random) -> str:
    """An invented word, such as `Travonford`."""
    count = rng.choices((1, 2), weights=(3, 2))[0]
    body = "".join(pick(rng, ONSETS) + pick(rng, VOWELS) + pick(rng, CODAS) for _ in range(count))
    return (body + pick(rng, ENDINGS)).capitalize()


def new_name(rng: random.Random) -> str:
    """A name of one or two words."""
    kind = rng.random()
    if kind < 0.4:
        return coined(rng)
    if kind < 0.6:
        return f"{coined(rng)} {coined(rng)}"
    if kind < 0.8:
        return f"{pick(rng, HEADS)} {coined(rng)}"
    return f"{pick(rng, HEADS)} {pick(rng, TAILS)}"


def strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def replaceable(messages: Sequence[Message], tools: Sequence[Tool]) -> list[str]:
    """Names that a call copies verbatim from earlier messages or results, and names in results.

    Names in schemas (choices, examples) are kept.
    """
    schemas = json.dumps(tools, ensure_ascii=False)
    heard, kept, unread = "", dict[str, None](), set[str]()
    for message in messages:
        for call in message.get("tool_calls") or ():
            for value in strings(call["arguments"]):
                (kept.setdefault if value in heard else unread.add)(value)
        if message["role"] == "tool":
            kept.update(dict.fromkeys(strings(json.loads(message["content"]))))
        if message["role"] in ("user", "tool"):
            heard += "\n" + message["content"]
    return [v for v in kept if v not in unread and NAME.fullmatch(v) and v not in schemas]


def substitute(
    rng: random.Random, messages: list[Message], tools: Sequence[Tool], share: float = 0.8
) -> None:
    """Replace ``share`` of the replaceable names everywhere in ``messages``, in place."""
    names = {old: new_name(rng) for old in replaceable(messages, tools) if rng.random() < share}
    if not names:
        return
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
    by_lower = {old.lower(): new for old, new in names.items()}

    def other(match: re.Match[str]) -> str:
        new = by_lower[match.group().lower()]
        return new.lower() if match.group().islower() else new

    for message in messages:
        if message.get("content"):
            message["content"] = pattern.sub(other, message["content"])
        for call in message.get("tool_calls") or ():
            text = json.dumps(call["arguments"], ensure_ascii=False)
            call["arguments"] = json.loads(pattern.sub(other, text))
