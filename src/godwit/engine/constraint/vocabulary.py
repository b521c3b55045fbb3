"""A model's tokens, as the grammar library needs them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from godwit.dialect.tags import CALL, END_CALL, END_THINK, THINK
from godwit.text.tokenizer import Tokenizer

_TAGS = (CALL, END_CALL, THINK, END_THINK)


@dataclass(frozen=True)
class Tags:
    """Tags that are single tokens of a vocabulary.

    Attributes:
        ids: the token of each such tag.
        letter: the token of an ordinary character, which is allowed wherever any text is.
    """

    ids: Mapping[str, int]
    letter: int | None

    @staticmethod
    def of(tokenizer: Tokenizer, vocab_size: int) -> Tags:
        known = {
            tag: id for tag in _TAGS if (id := tokenizer.token_to_id(tag)) is not None and id < vocab_size
        }
        letter = tokenizer.encode("~", add_special_tokens=False)[-1:]
        return Tags(known, letter[0] if letter else None)


class GrammarVocabulary:
    """A tokenizer as the library needs it: control tokens never stand for text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop: int) -> None:
        self.eos_token_id = stop
        self.tokens = [tokenizer.token_bytes(id) or b"" for id in range(vocab_size)]
        self.special_token_ids = sorted(
            id for id in tokenizer.special_ids | tokenizer.stop_ids if id < vocab_size
        )
        self._tokenizer = tokenizer
        tags = [tag for tag in _TAGS if tokenizer.token_to_id(tag) not in (None, *self.special_token_ids)]
        self._tags = re.compile(f"({'|'.join(map(re.escape, tags))})") if tags else None

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens with which the model would write a text that a grammar forces."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        parts = [text] if self._tags is None else self._tags.split(text)
        return [id for part in parts for id in self._part(part)]

    def _part(self, part: str) -> list[int]:
        tag = self._tokenizer.token_to_id(part) if part in _TAGS else None
        return self._tokenizer.encode(part, add_special_tokens=False) if tag is None else [tag]
