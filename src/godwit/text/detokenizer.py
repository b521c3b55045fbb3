"""Token ids to text: the decoders of Hugging Face `tokenizer.json` files, byte by byte so that they stream.

Valid text comes out as the `tokenizers` library gives it. Where the bytes are not UTF-8, each maximal
invalid part becomes one U+FFFD; the library does the same for byte-level vocabularies, but for `<0x..>`
tokens it replaces the whole run, which cannot be known while streaming.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from godwit.errors import UnsupportedModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The GPT-2 alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class DecodePlan:
    """What the `decoder` of a tokenizer does to each token, in order, and to the whole.

    `steps` are ("bytes",) for the GPT-2 alphabet, ("hex",) for tokens such as `<0x0A>`, ("replace", old,
    new), and ("space", mark) for a mark that means a space. `drop_first`: in the first token that mark
    means nothing. `strip` is the number of spaces removed at the beginning of the text.
    """

    steps: tuple[tuple[str, ...], ...]
    drop_first: bool
    strip: int

    @classmethod
    def from_dict(cls, raw: object) -> DecodePlan:
        """Read the `decoder` of a `tokenizer.json`; raises UnsupportedModelError for an unknown kind."""
        steps: list[tuple[str, ...]] = []
        strip = 0
        drop_first = fused = False
        for part in _flatten(raw):
            kind = part.get("type")
            if kind == "ByteLevel":
                steps.append(("bytes",))
                fused = True
            elif kind == "ByteFallback":
                steps.append(("hex",))
            elif kind == "Replace" and isinstance(part.get("pattern", {}).get("String"), str):
                steps.append(("replace", part["pattern"]["String"], str(part.get("content", ""))))
            elif kind == "Metaspace":
                steps.append(("space", str(part.get("replacement", "\u2581"))))
                never = part.get("prepend_scheme") == "never" or part.get("add_prefix_space") is False
                drop_first = not never
            elif kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and part.get("content") == " " and not part.get("stop"):
                strip += int(part.get("start", 0))
            else:
                raise UnsupportedModelError(f"its decoder {kind!r} is not supported")
        return cls(tuple(steps), drop_first, strip)

    def convert(self, token: str, first: bool) -> bytes:
        """The UTF-8 bytes of a token; `first`: it is the first one of the text."""
        for kind, *arguments in self.steps:
            if kind == "bytes":
                codes = [_ALPHABET.get(character, -1) for character in token]
                return bytes(codes) if -1 not in codes else _utf8(token)
            if kind == "hex" and (match := _BYTE_TOKEN.fullmatch(token)):
                return bytes([int(match[1], 16)])
            if kind == "replace":
                token = token.replace(arguments[0], arguments[1])
            elif kind == "space":
                token = token.replace(arguments[0], "" if first and self.drop_first else " ")
        return _utf8(token)


def _flatten(raw: object) -> list[Mapping[str, Any]]:
    if not isinstance(raw, Mapping):
        raise UnsupportedModelError("it has no decoder, so its tokens cannot be turned into text")
    if raw.get("type") != "Sequence":
        return [raw]
    return [part for child in raw.get("decoders", []) for part in _flatten(child)]


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


class StreamDecoder:
    """Turns ids into text one by one; a character is emitted once all its bytes are there.

    `lookup(id, first)` returns the bytes of a token, or None for one that does not exist or is left out.
    """

    def __init__(self, lookup: Callable[[int, bool], bytes | None], *, strip: int = 0) -> None:
        self._lookup = lookup
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._strip = strip

    def push(self, id: int) -> str:
        """The text that this token completes; empty while a character lacks bytes."""
        data = self._lookup(int(id), self._first)
        if data is None:
            return ""
        self._first = False
        return self._utf8.decode(self._without_prefix(data) if self._strip else data)

    @property
    def complete(self) -> bool:
        """Whether no character lacks bytes."""
        return not self._utf8.getstate()[0]

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an incomplete character, else nothing."""
        return self._utf8.decode(b"", True)

    def _without_prefix(self, data: bytes) -> bytes:
        spaces = min(len(data) - len(data.lstrip(b" ")), self._strip)
        self._strip = self._strip - spaces if spaces == len(data) else 0
        return data[spaces:]
