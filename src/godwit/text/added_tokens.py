"""Added tokens: those of `tokenizer.json` and `tokenizer_config.json`, and where they occur in a text.

The rules are those of the `tokenizers` library: tokens that are not `normalized` are matched in the text as
it is, the others in what the normaliser makes of the pieces between, the longest first at each place.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_WORD_CATEGORIES = ("Mn", "Mc", "Me", "Pc")
#: Letters of a token; the shield of conversations stores all prefixes and suffixes of each.
MAX_CONTENT = 1000
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: The names under which versions of `transformers` list further special tokens.
_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole in text: an entry of `added_tokens` in `tokenizer.json`."""

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AddedToken:
        """Read one entry; raises KeyError, TypeError or ValueError when it is malformed."""
        if not isinstance(raw["content"], str) or not isinstance(raw["id"], int):
            raise TypeError("an added token needs a text and a number")
        if not 0 <= raw["id"] < 1 << 31:
            raise ValueError(f"no token can have the number {raw['id']}")
        if len(raw["content"]) > MAX_CONTENT:
            raise ValueError(f"an added token has {len(raw['content'])} letters, more than {MAX_CONTENT}")
        return cls(raw["id"], raw["content"], *(bool(raw.get(name)) for name in _FLAGS))

    @property
    def is_control(self) -> bool:
        """False for ordinary text, such as runs of spaces, which some vocabularies list here too."""
        return self.special or not (len(self.content) == 1 or self.content.isspace())


@dataclass(frozen=True)
class TextPart:
    """An added token, or the text between two.

    `leads`: the tokenizer's prefix space, if any, goes before it. `normal`: it is normalised.
    """

    text: str
    token: AddedToken | None
    leads: bool = False
    normal: bool = False


class Matcher:
    """Cuts texts at some added tokens; those with `lstrip` or `rstrip` swallow the white space beside them.

    Args:
        literal: tokens to find in the text as it is.
        normalized: tokens to find in normalised text.
        normalize: the normaliser of a text.
        first_only: only the first part of a text gets the prefix space.
    """

    def __init__(
        self,
        literal: Iterable[AddedToken],
        normalized: Iterable[AddedToken],
        normalize: Callable[[str], str],
        *,
        first_only: bool,
    ) -> None:
        self._literal = {token.content: token for token in literal if token.content}
        found = {normalize(token.content): token for token in normalized if token.content}
        self._normalized = {text: token for text, token in found.items() if text}
        self._patterns = _alternatives(self._literal), _alternatives(self._normalized)
        self._normalize, self._first_only = normalize, first_only

    def split(self, text: str) -> Iterator[TextPart]:
        """The parts of `text` in order."""
        for start, piece, token in _cut(text, self._patterns[0], self._literal):
            if token is not None:
                yield TextPart(token.content, token)
            else:
                yield from self._split_normalized(piece, start == 0 or not self._first_only)

    def _split_normalized(self, text: str, leads: bool) -> Iterator[TextPart]:
        normal = self._normalize(text) if self._normalized else text
        if not self._patterns[1].search(normal):
            yield TextPart(text, None, leads)
            return
        for start, piece, token in _cut(normal, self._patterns[1], self._normalized):
            if token is not None:
                yield TextPart(token.content, token)
            else:
                yield TextPart(piece, None, leads and (start == 0 or not self._first_only), normal=True)


def _cut(
    text: str, pattern: re.Pattern[str], tokens: Mapping[str, AddedToken]
) -> Iterator[tuple[int, str, AddedToken | None]]:
    """(start, text, token) of each token and each text between two."""
    done = 0
    for match in pattern.finditer(text):
        token = tokens[match[0]]
        start, stop = match.span()
        if start < done or (token.single_word and _touches_word(text, start, stop)):
            continue
        if token.lstrip:
            start = done + len(text[done:start].rstrip())
        if token.rstrip:
            stop = len(text) - len(text[stop:].lstrip())
        if start > done:
            yield done, text[done:start], None
        yield start, token.content, token
        done = stop
    if done < len(text):
        yield done, text[done:], None


def _alternatives(words: Iterable[str]) -> re.Pattern[str]:
    """Matches one of `words`, the longest that fits."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _touches_word(text: str, start: int, stop: int) -> bool:
    return any(map(_is_word, (text[start - 1 : start], text[stop : stop + 1])))


def _is_word(character: str) -> bool:
    """Like `\\w` of the library, which counts combining marks, unlike that of Python."""
    return bool(character) and (character.isalnum() or unicodedata.category(character) in _WORD_CATEGORIES)


def merged(added: Iterable[Any], settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[Any]:
    """The tokens `added` of `tokenizer.json`, then those that only `tokenizer_config.json` knows.

    As in `transformers`, a new token has the number of the vocabulary's entry with its text, else the next
    free one, whatever number the settings give. Raises what malformed settings cause: AttributeError,
    KeyError, TypeError or ValueError.
    """
    tokens = list(added)
    known = {token["content"] for token in tokens}
    free = 1 + max([*vocabulary.values(), *(token["id"] for token in tokens)], default=-1)
    for token in _of_settings(settings):
        content = token["content"]
        if not isinstance(content, str):
            raise TypeError(f"a token's content is {content!r:.40}, not a text")
        if not content or content in known:
            continue
        id = vocabulary.get(content, free)
        free += id == free
        known.add(content)
        tokens.append({**token, "id": id})
    return tokens


def _of_settings(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The tokens that `tokenizer_config.json` mentions, without numbers, in the order they are added."""
    decoder = settings.get("added_tokens_decoder") or {}
    named = {name: value for name in SPECIAL_NAMES if (value := settings.get(name))}
    texts = {value["content"] if isinstance(value, Mapping) else value for value in named.values()}
    for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        special = bool(token.get("special")) or token["content"] in texts
        yield {"normalized": not token.get("special"), **token, "special": special}
    lists = [settings.get(name) for name in _SPECIAL_LISTS]
    further = [value for one in lists if isinstance(one, list) for value in one]
    for value in (*named.values(), *further):
        flags = value if isinstance(value, Mapping) else {"content": value}
        yield {"normalized": False, **flags, "special": True}
