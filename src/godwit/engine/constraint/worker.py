"""A separate process that tries grammars out, within limits of time and memory.

A client's schema or regular expression is a program of a stranger: it may take all memory, or more stack than
there is, where no check could interrupt it. So it is compiled here first, in a process that can be ended at
any point; what gets through costs little and is then compiled where it is used. The file is started by path
and imports nothing of godwit.

Protocol on stdin and stdout: lines of JSON. The first is the set-up (`sys_path`, `memory_bytes`,
`walk_seconds`, and of the vocabulary `tokens` in hexadecimal digits, `special_ids`, `stop_ids`), answered by
`{}`. Each later line `{"grammar": text, "limits": {}}` is answered by `{"error": text}`, empty where all is
well, and `{"convert": text}`, a grammar in Lark's form or llama.cpp's, by the former or an error:
`{"lark": text}`.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from time import thread_time
from typing import Any

#: As little as any thread may have in which the grammar is compiled later.
STACK_BYTES = 512 << 10
#: Random answers that a grammar has to get through, and tokens of each.
NUM_WALKS = 2
WALK_TOKENS = 64


class Vocabulary:
    """Tokens as the library wants to have them."""

    bos_token_id = None

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.tokens = [bytes.fromhex(token) for token in setup["tokens"]]
        self.special_token_ids = setup["special_ids"]
        self.eos_token_id = setup["stop_ids"][0]
        special = set(self.special_token_ids)
        self._ids = {token: id for id, token in enumerate(self.tokens) if token and id not in special}
        self._longest = min(32, max(map(len, self._ids), default=1))

    def __call__(self, text: bytes | str) -> list[int]:
        """Some way to write a text that a grammar forces: on trial, any will do."""
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

    vocabulary = llguidance.TokenizerWrapper(Vocabulary(setup))
    return llguidance.LLTokenizer(vocabulary, n_vocab=len(setup["tokens"]), eos_token=setup["stop_ids"])


def walk(
    matcher: Any, stop_ids: Sequence[int], seconds: float, clock: Callable[[], float] = thread_time
) -> str:
    """Follow a grammar on random ways, always the same ones.

    Returns: what went wrong, "" if nothing did.
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
        if error and not (begun and error.startswith("NoExtension")):  # chance may run into a dead end
            return error
    return ""


def pick(mask: bytes, stop_ids: Sequence[int], chance: random.Random) -> int | None:
    """One of the ids whose bits are set, but not one that ends an answer; None if there is no other."""
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
    """What to say to one request."""
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
    except BaseException as error:  # where the library's Rust code panics, it is no Exception
        return {"error": str(error)[:2000] or type(error).__name__}


def limit_memory(num_bytes: int) -> None:
    """Let allocations beyond this fail, on systems that can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve() -> None:
    """Answer requests until stdin ends."""
    setup = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = setup["sys_path"]
    tokenizer = make_tokenizer(setup)
    limit_memory(setup["memory_bytes"])
    print("{}", flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(answer(json.loads(line), tokenizer, setup)), flush=True)


def main() -> None:
    """Serve on a small stack, so that what would overflow another one ends this process first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asked
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
