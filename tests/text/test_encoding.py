"""Text to ids and back, against the `tokenizers` library."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from godwit.text import tokenizer
from godwit.text.tokenizer import Tokenizer

Make = Callable[[str], dict[str, Any]]


class TestAgainstTheLibrary:
    TEXTS = (
        "", " ", "the dog", "  the dog ", "the<mid>dog", " the <mid> dog", "<s>the dog</s>",
        "<s> a<mid></s>b", "word words word's aword word", "\u2581odd \u2581", "é à 你好 \U0001f999\n\ttail ",
        "a\u0301<mid>e\u0301", "<|im_start|>user\n hi<|im_end|>\n\n<think>\n</think>",
        "<|im_start|><|im_start|", "<tool_call><think",
    )  # fmt: skip

    @pytest.mark.parametrize("text", TEXTS)
    def test_encoding_with_control_tokens(self, pair: Any, text: str) -> None:
        ours, theirs = pair
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids
        assert (
            ours.encode(text, allow_special=True, add_special_tokens=False)
            == theirs.encode(text, add_special_tokens=False).ids
        )

    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("skip", [True, False])
    def test_decoding(self, pair: Any, text: str, skip: bool) -> None:
        ours, theirs = pair
        ids = theirs.encode(text).ids
        assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)

    def test_random_texts(self, pair: Any) -> None:
        ours, theirs = pair
        pieces = [
            "the",
            " ",
            "  ",
            "dog",
            "\n",
            "é",
            "\u0301",
            "你",
            "<mid>",
            "<s>",
            "<think>",
            "\u2581",
            "word",
            "7",
        ]
        for _ in range(300):
            text = "".join(random.choices(pieces, k=random.randint(0, 12)))
            ids = ours.encode(text, allow_special=True)
            assert ids == theirs.encode(text).ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip), (
                    text
                )

    def test_names(self, pair: Any) -> None:
        ours, theirs = pair
        names = theirs.get_vocab(with_added_tokens=True)
        assert ours.vocab_size == max(names.values()) + 1
        for name, id in names.items():
            assert ours.token_to_id(name) == id
            assert ours.id_to_token(id) == name
        assert ours.token_to_id("no such token") is None
        for id in (-1, ours.vocab_size, 1 << 40):
            assert ours.id_to_token(id) is None

    def test_settings_of_a_training_do_not_leak(self, make: Make) -> None:
        raw = make("bytes")
        padding: dict[str, Any] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
        padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
        truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        changed = raw | {"padding": padding, "truncation": truncation}
        changed["model"] = raw["model"] | {"dropout": 0.9}
        for text in ("a", "the quick brown fox jumps over the lazy dog"):
            assert Tokenizer(changed).encode(text) == Tokenizer(raw).encode(text)


#: Where ways of encoding could differ: nothing but spaces, marks, control tokens, no spaces at all.
HARD_TEXTS = (
    " ", "\n", "\r\n\t ", "a", "<", "\u0301", "e\u0301", "\U0001f999", "\u200d\U0001f468", "\u4f60\u597d",
    "\ufffd", "\u2581", "\0", "word ", " the dog", "<mid>", "<s>", "</s> ", "<|im_end|>", "<think>\n",
    "12345", "don't ",
)  # fmt: skip


@contextmanager
def switching_only_where_the_lock_is_released() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class TestLongTexts:
    @pytest.mark.parametrize("special", [False, True])
    def test_they_have_the_same_ids(self, pair: Any, special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        ours, theirs = pair
        draw = random.Random(7)
        texts = [piece * 60 for piece in HARD_TEXTS]
        texts += ["".join(draw.choices(HARD_TEXTS, k=200)) for _ in range(20)]
        monkeypatch.setattr(tokenizer, "_LONG_CHARS", 1)
        found = [ours.encode(text, allow_special=special) for text in texts]
        monkeypatch.setattr(tokenizer, "_LONG_CHARS", sys.maxsize)
        assert found == [ours.encode(text, allow_special=special) for text in texts]
        if special:
            assert found == [theirs.encode(text).ids for text in texts]

    def test_others_run_meanwhile(self, tok: Tokenizer) -> None:
        text = "the quick brown fox " * 10_000

        def runs_meanwhile() -> bool:
            begun, ended = threading.Event(), threading.Event()

            def encode() -> None:
                begun.set()
                tok.encode(text)
                ended.set()

            thread = threading.Thread(target=encode)
            with switching_only_where_the_lock_is_released():
                thread.start()
                begun.wait()
                meanwhile = not ended.is_set()
            thread.join()
            return meanwhile

        # On a busy machine this thread may get no processor in time, but hardly ever so often.
        assert any(runs_meanwhile() for _ in range(10))


class TestUserText:
    def test_no_added_token_comes_out_of_plain_text(self, pair: Any) -> None:
        ours, theirs = pair
        names = theirs.get_added_tokens_decoder()
        names.pop(ours.token_to_id("<unk>"), None)
        for token in names.values():
            for text in (token.content, f"a {token.content} b{token.content}"):
                ids = ours.encode(text, add_special_tokens=False)
                assert not names.keys() & set(ids)
                assert ours.decode(ids) == text

    def test_control_tokens_among_the_words_of_a_unigram_model(self, make: Make) -> None:
        words = [["<unk>", 0.0], ["<s>", 0.0], ["\u2581", -2.0], *([c, -9.0] for c in "<s>ab")]
        raw = make("always")
        raw["model"] = {"type": "Unigram", "unk_id": 0, "vocab": words, "byte_fallback": False}
        raw["added_tokens"] = raw["added_tokens"][:2]
        tok = Tokenizer(raw)
        ids = tok.encode("a<s>b<s><s>", add_special_tokens=False)
        assert 1 not in ids
        assert tok.decode(ids) == "a<s>b<s><s>"
        assert tok.encode("<s>", allow_special=True) == [1, 1]
        assert tok.encode("\u4f60")[-1] == 0  # what is unknown stays unknown

    def test_runs_of_spaces_are_words_wherever_they_stand(self, make: Make) -> None:
        raw = make("bytes")
        token = raw["added_tokens"][-1]
        raw["added_tokens"].append(token | {"id": token["id"] + 1, "content": "    ", "normalized": True})
        tok = Tokenizer(raw)
        id = tok.token_to_id("    ")
        assert id in tok.encode("a    b")
        assert tok.encode("a    b") == tok.encode("a    b", allow_special=True)

    def test_lone_surrogates_become_the_replacement_character(self, tok: Tokenizer) -> None:
        assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
        assert tok.decode(tok.encode("\ud83e\udd99")) == "\U0001f999"


class TestQwen:
    VECTORS = (
        ("Hello world", "9707 1879"),
        (" Hello world", "21927 1879"),
        ("Hello, world!", "9707 11 1879 0"),
        ("   Hello", "256 21927"),
        ("3333", "18 18 18 18"),
        ("w048 7tuijk dsdfhu", "86 15 19 23 220 22 83 1963 41808 11472 2940 16739"),
        (" this is \U0001f999.cpp", "419 374 11162 99 247 13 10821"),
        ("ied 4 ½ months", "1122 220 19 220 26062 3951"),
        ("\n\n", "271"),
    )

    def test_vectors(self, qwen: Tokenizer) -> None:
        for text, ids in self.VECTORS:
            assert qwen.encode(text) == [int(id) for id in ids.split()]
            assert qwen.decode(qwen.encode(text)) == text

    def test_numbers(self, qwen: Tokenizer) -> None:
        assert qwen.vocab_size == 151_669
        assert len(qwen.special_ids) == 14
        assert qwen.encode("<|im_end|>", allow_special=True) == [151_645]
        assert 151_645 not in qwen.encode("<|im_end|>")
        assert qwen.decode([151_657, 151_645, 151_700]) == "<tool_call>"
