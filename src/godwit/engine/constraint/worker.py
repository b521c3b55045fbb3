"""A process that tries grammars, within limits of time and memory.

A client's schema or regular expression is untrusted: compiling it may take all memory or overflow the stack,
and cannot be interrupted. So it is compiled first in this process, which can be killed at any time; what
passes is cheap, and is compiled again where it is used. The file is started by path and imports nothing of
godwit.

It is the script of a :class:`godwit.worker.Worker`. Its set-up holds `walk_seconds` and, of the vocabulary,
`tokens` in hexadecimal digits, `special_ids` and `stop_ids`. It answers `{"grammar": text, "limits": {}}` by
`{"error": text}`, empty where all is well, and `{"convert": text}`, a grammar in Lark or llama.cpp's GBNF,
by `{"lark": text}` or an error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import thread_time
from typing import Any

#: Random answers on trial, and tokens of each.
NUM_WALKS = 2
WALK_TOKENS = 64


class TrialVocabulary:
    """Tokens as the library needs them."""

    bos_token_id = None

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.tokens = [bytes.fromhex(token) for token in setup["tokens"]]
        self.special_token_ids = setup["special_ids"]
        self.eos_token_id = setup["stop_ids"][0]
        special = set(self.special_token_ids)
        self._ids = {token: id for id, token in enumerate(self.tokens) if token and id not in special}
        self._longest = min(32, max(map(len, self._ids), default=1))

    def __call__(self, text: bytes | str) -> list[int]:
        """Some tokens for a text that a grammar forces: on trial any will do."""
        rest = text.encode() if isinstance(text, str) else text
        ids = []
        while rest:
            sizes = range(min(self._longest, len(rest)), 0, -1)
            size = next((size for size in sizes if rest[:size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[rest[:size]])
            rest = rest[size:]
        return ids


def make_tokenizer(setup: Mapping[str, Any]) -> Any:
    """The library's tokenizer."""
    import llguidance

    vocabulary = llguidance.TokenizerWrapper(TrialVocabulary(setup))
    return llguidance.LLTokenizer(vocabulary, n_vocab=len(setup["tokens"]), eos_token=setup["stop_ids"])


def walk(
    matcher: Any, stop_ids: Sequence[int], seconds: float, clock: Callable[[], float] = thread_time
) -> str:
    """Follow a grammar along random answers, the same ones each time.

    Returns: what went wrong, or "".
    """
    end = clock() + seconds
    for number in range(NUM_WALKS):
        chance, copy, begun = random.Random(number), matcher.deep_copy(), False
        for _ in range(WALK_TOKENS):
            mask = copy.compute_bitmask()
            token = None if copy.is_error() else pick(mask, stop_ids, chance)
            if token is None:
                break
            copy.consume_token(token)
            begun = True
            if clock() > end:
                return "it takes too much time to follow"
        error = str(copy.get_error())
        if error and not (
            begun and error.startswith("NoExtension")
        ):  # a random answer may run into a dead end
            return error
    return ""


def pick(mask: bytes, stop_ids: Sequence[int], chance: random.Random) -> int | None:
    """A random id whose bit is set, other than the stop tokens; None if there is none."""
    bits = bytearray(mask)
    for id in stop_ids:
        bits[id // 8] &= ~(1 << id % 8) & 255
    start = chance.randrange(len(bits))
    turned = bytes(bits[start:] + bits[:start])
    found = turned.lstrip(b"\0")
    if not found:
        return None
    place = (start + len(turned) - len(found)) % len(bits)
    return 8 * place + chance.choice([bit for bit in range(8) if found[0] >> bit & 1])


def answer(request: Mapping[str, Any], tokenizer: Any, setup: Mapping[str, Any]) -> dict[str, str]:
    """The answer to one request."""
    from llguidance import LLMatcher, LLParserLimits, gbnf_to_lark

    try:
        if "convert" in request:
            return {"lark": gbnf_to_lark.any_to_lark(request["convert"])}
        limits = LLParserLimits(**request["limits"])
        matcher = LLMatcher(tokenizer, request["grammar"], log_level=0, limits=limits)
        if matcher.is_error():
            return {"error": matcher.get_error()}
        return {"error": walk(matcher, setup["stop_ids"], setup["walk_seconds"])}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except BaseException as error:  # a panic in the library's Rust code is not an Exception
        return {"error": str(error)[:2000] or type(error).__name__}


def start(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, str]]:
    """The function that answers requests."""
    return partial(answer, tokenizer=make_tokenizer(setup), setup=setup)
