"""Well-behaved clients for a server under load, and the results of their requests."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from benchmarks.attacks import ATTACKS, CHAT, TEXT
from benchmarks.plain_http import request

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@dataclass
class Tally:
    """Results of many requests.

    Attributes:
        first, gaps: seconds to the first token, and between tokens, of all answers.
        tokens: number of tokens received.
        finished, left, refused, hostile: numbers of requests that succeeded, that the client abandoned, that
            were refused because the server was busy, and that were hostile and rejected.
        errors: failures that are not the client's fault.
        slowest: seconds until the slowest hostile request was rejected, by kind.
    """

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    finished: int = 0
    left: int = 0
    hostile: int = 0
    errors: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)


def words(rng: random.Random, count: int) -> str:
    """This many nonsense words."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count))


@dataclass(frozen=True)
class Mix:
    """The mix of requests.

    Attributes:
        leaving, hostile: shares of requests that the client abandons, and of hostile ones.
        prompt_words, tokens: minimum and maximum.
        every_route: use all APIs, tools and schemas, and continue conversations; otherwise only plain chats.
        extra: fields added to every request.
        exact: answers have exactly their maximum number of tokens.
    """

    leaving: float = 0.10
    hostile: float = 0.05
    prompt_words: tuple[int, int] = (3, 160)
    tokens: tuple[int, int] = (8, 160)
    every_route: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False


class Client:
    """One client, which sends one request after another.

    Args:
        url: the server's URL.
        mix: the requests to send.
        seed: the same seed gives the same requests.
        tally: collects the results.
    """

    def __init__(self, url: str, mix: Mix, seed: int, tally: Tally) -> None:
        self.url = url
        self.mix = mix
        self.rng = random.Random(seed)
        self.tally = tally
        self.history: list[dict[str, str]] = []

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            await self.one()

    async def one(self) -> None:
        """One request."""
        try:
            if self.rng.random() < self.mix.hostile:
                await self._attack()
            else:
                await self._ask()
        except (OSError, EOFError, ValueError) as error:
            self.tally.errors.append(f"{type(error).__name__}: {error}"[:200])

    async def _attack(self) -> None:
        attack = self.rng.choice(ATTACKS)
        began = perf_counter()
        status = await attack.run(self.url, self.rng)
        self.tally.hostile += 1
        taken = perf_counter() - began
        self.tally.slowest[attack.name] = max(taken, self.tally.slowest.get(attack.name, 0.0))
        if status not in attack.statuses:
            self.tally.errors.append(f"{attack.name}: status {status}")

    async def _ask(self) -> None:
        path, body, limit = self._request()
        leaves = self.rng.random() < self.mix.leaving
        patience = self.rng.randrange(0, limit) if leaves else -1
        began = last = perf_counter()
        seen, ended = 0, False
        data = json.dumps({**body, **self.mix.extra, "stream": True}).encode()
        async with request(self.url, path, data) as reply:
            if reply.status != 200:
                self.tally.errors.append(f"{path}: status {reply.status}: {(await reply.body())[:150]!r}")
                return
            async for event in reply.events():
                if problem := error_in(event):
                    self.tally.errors.append(f"{path}: {problem}")
                    return
                if is_token(event):
                    now = perf_counter()
                    (self.tally.gaps if seen else self.tally.first).append(now - last)
                    last, seen = now, seen + 1
                    self.tally.tokens += 1
                ended = ended or is_end(event)
                if seen == patience:
                    break
        if not ended and seen != patience:
            self.tally.errors.append(f"{path}: the stream broke off after {perf_counter() - began:.1f} s")
        elif ended:
            self.tally.finished += 1
            # tokens whose text came together with that of others
            self.tally.tokens += limit - seen if self.mix.exact else 0
        else:
            self.tally.left += 1

    def _request(self) -> tuple[str, dict[str, Any], int]:
        """Path, body, and maximum tokens of the answer."""
        rng = self.rng
        text = f"Tell me about {words(rng, rng.randint(*self.mix.prompt_words))}."
        limit = rng.randint(*self.mix.tokens)
        kind = rng.random() if self.mix.every_route else 0.0
        messages = self._converse(text)
        if kind < 0.55:
            return CHAT, {"messages": messages, "max_tokens": limit}, limit
        if kind < 0.65:
            return MESSAGES, {"model": "godwit", "messages": messages[1:], "max_tokens": limit}, limit
        if kind < 0.75:
            return RESPONSES, {"input": text, "max_output_tokens": limit}, limit
        if kind < 0.85:
            return TEXT, {"prompt": text, "max_tokens": limit}, limit
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA, "strict": True}}
        more: dict[str, Any] = {"response_format": form} if kind < 0.92 else {"tools": [_TOOL]}
        return CHAT, {"messages": messages, "max_tokens": limit, **more}, limit

    def _converse(self, text: str) -> list[dict[str, str]]:
        """Messages; one conversation in three continues the last one."""
        if not self.mix.every_route or len(self.history) > 4 or self.rng.random() < 0.67:
            system = {"role": "system", "content": "You are Godwit, a helpful assistant."}
            self.history = [system]
        else:
            self.history.append({"role": "assistant", "content": f"I like {words(self.rng, 20)}."})
        self.history = [*self.history, {"role": "user", "content": text}]
        return self.history


def is_token(event: Any) -> bool:
    """Whether an event of any of the APIs has part of an answer."""
    if not isinstance(event, dict):
        return False
    if event.get("type") == "content_block_delta" or str(event.get("type", "")).endswith(".delta"):
        return True
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        if choice.get("text") or delta.get("content") or delta.get("tool_calls"):
            return True
    return False


def is_end(event: Any) -> bool:
    """Whether an event of any of the APIs ends an answer without an error."""
    kinds = ("message_stop", "response.completed", "response.incomplete")
    return event == "[DONE]" or (isinstance(event, dict) and event.get("type") in kinds)


def error_in(event: Any) -> str | None:
    """The error in an event."""
    if isinstance(event, dict) and (event.get("error") or event.get("type") == "response.failed"):
        return json.dumps(event)[:200]
    return None
