"""Ids to text, all at once and one by one."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tokenizers

from godwit.errors import UnsupportedModelError
from godwit.text.tokenizer import Tokenizer

Make = Callable[[str], dict[str, Any]]


def streamed(tok: Tokenizer, ids: list[int], *, skip_special: bool = True) -> list[str]:
    stream = tok.stream(skip_special=skip_special)
    return [*map(stream.push, ids), stream.flush()]


def code_points() -> Iterator[str]:
    """Samples of every plane, the combining marks and the borders of the UTF-8 lengths."""
    for plane in range(17):
        yield from (chr(plane * 0x10000 + random.randrange(0x10000)) for _ in range(120))
    yield from map(chr, range(0x300, 0x370))
    yield from map(
        chr, (0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFD, 0xFFFF, 0x10000, sys.maxunicode)
    )


def round_trips(tok: Tokenizer, size: int) -> None:
    points = [c for c in code_points() if unicodedata.category(c) != "Cs"]
    random.shuffle(points)
    for start in range(0, len(points), size):
        text = "".join(points[start : start + size])
        ids = tok.encode(text)
        assert tok.decode(ids) == unicodedata.normalize("NFC", text)
        assert "".join(streamed(tok, ids)) == tok.decode(ids)


class TestStreaming:
    def test_every_plane(self, tok: Tokenizer) -> None:
        round_trips(tok, 1)
        round_trips(tok, 7)

    def test_never_half_a_character(self, tok: Tokenizer) -> None:
        text = "a\U0001f999é你b"
        pieces = streamed(tok, tok.encode(text))
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == text
        assert "" in pieces  # something was held back

    def test_an_incomplete_end_comes_with_flush(self, tok: Tokenizer) -> None:
        ids = tok.encode("a\U0001f999")
        assert streamed(tok, ids[:-1])[-2:] == ["", "\ufffd"]
        assert tok.decode(ids[:-1]) == "a\ufffd"

    def test_control_tokens_inside_a_character(self, tok: Tokenizer) -> None:
        first, *rest = tok.encode("\U0001f999")
        end = tok.token_to_id("<|im_end|>")
        assert end is not None
        assert tok.decode([first, end, *rest]) == "\U0001f999"
        assert tok.decode([first, end], skip_special=False) == "\ufffd<|im_end|>"

    def test_any_ids(self, pair: Any) -> None:
        """Also ids that no text encodes to: invalid UTF-8, control tokens, numbers without a token."""
        ours, theirs = pair
        for _ in range(200):
            ids = [random.randrange(ours.vocab_size + 3) for _ in range(random.randint(0, 12))]
            for skip in (True, False):
                text = ours.decode(ids, skip_special=skip)
                assert "".join(streamed(ours, ids, skip_special=skip)) == text
                if "\ufffd" not in text:
                    assert text == theirs.decode(ids, skip_special_tokens=skip)

    def test_invalid_bytes_of_byte_level_vocabularies(self, tok: Tokenizer, make: Make) -> None:
        theirs = tokenizers.Tokenizer.from_str(json.dumps(make("bytes")))
        for _ in range(500):
            ids = [random.randrange(256) for _ in range(random.randint(1, 10))]
            assert tok.decode(ids) == theirs.decode(ids)

    def test_unknown_decoder(self, make: Make) -> None:
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        for decoder in (
            None,
            {"type": "BPEDecoder", "suffix": "_"},
            {"type": "Sequence", "decoders": [strip]},
        ):
            with pytest.raises(UnsupportedModelError, match="decoder"):
                Tokenizer(make("bytes") | {"decoder": decoder})

    def test_every_plane_in_the_real_vocabulary(self, qwen: Tokenizer) -> None:
        for size in (1, 2, 9, 40):
            round_trips(qwen, size)
