"""Tokenizers inside GGUF files: the same ids as the tokenizer that they were made from."""

from __future__ import annotations

import itertools
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import godwit
from godwit.checkpoint.gguf.metadata import Metadata
from godwit.checkpoint.gguf.tokenizer import as_files
from godwit.errors import CheckpointError, UnsupportedModelError
from godwit.text.tokenizer import Tokenizer

BUILT_IN = Path(godwit.__file__).parent / "default_model"
QWEN = Path(__file__).resolve().parents[4] / "shared" / "fixtures" / "qwen" / "tokenizer.json.xz"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEXTS = [
    "Hello world", "  3333 x\n\n\ty", "naïve café \u2014 \U0001f999 12½", "\r\n\r\n \t", " a  b   c ",
    "The year 2026's end; don't WE'LL!", "日本語のテキスト", "e\u0301 \u212b \ufdfa", "नमस्ते", "x" * 300,
    "def f(x):\n    return x**2  # 100%", "<|im_start|>system\nhi<|im_end|>", "</think> <tool_call>",
]  # fmt: skip


def keys_of(raw: dict[str, Any], rule: str) -> dict[str, Any]:
    """The keys that a converter writes for a byte-level tokenizer.json."""
    added = {token["id"]: token for token in raw["added_tokens"]}
    words = {id: word for word, id in raw["model"]["vocab"].items()}
    count = 1 + max([*added, *words])
    tokens = [added[id]["content"] if id in added else words.get(id, f"[PAD{id}]") for id in range(count)]
    kinds = [
        (CONTROL if added[id]["special"] else USER) if id in added else NORMAL if id in words else UNUSED
        for id in range(count)
    ]
    merges = [one if isinstance(one, str) else " ".join(one) for one in raw["model"]["merges"]]
    return {
        "general.architecture": "qwen3",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": merges,
    }


def files_of(keys: dict[str, Any]) -> dict[str, bytes]:
    return as_files(Metadata(Path("f.gguf"), keys))


def tokenizer_of(keys: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_files(files_of(keys), "f.gguf", trusted=True)


def check_same(ours: Tokenizer, theirs: Tokenizer) -> None:
    for text in TEXTS:
        for special in (False, True):
            ids = ours.encode(text, allow_special=special)
            assert ids == theirs.encode(text, allow_special=special), text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special=False), text


def test_qwen() -> None:
    if not QWEN.exists():
        pytest.skip("this tokenizer is not part of the repository")
    raw = json.loads(lzma.decompress(QWEN.read_bytes()))
    keys = keys_of(raw, "qwen2") | {"tokenizer.ggml.eos_token_id": 151645}
    ours, theirs = tokenizer_of(keys), Tokenizer(raw)
    check_same(ours, theirs)
    assert set(ours.stop_tokens) == {"<|im_end|>", "<|endoftext|>"}
    assert ours.special_ids == theirs.special_ids


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def small(rule: str, **more: Any) -> dict[str, Any]:
    tokens = [*byte_letters(), "th", "the", "Ġthe", "12", "123", "1234", "<|eot_id|>", "<|begin|>", "<tag>"]
    merges = ["t h", "th e", "Ġ the", "1 2", "12 3", "123 4"]
    kinds = [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 263,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def spelled(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.id_to_token(id) for id in tokenizer.encode(text)]


def test_rules_cut_numbers_in_their_own_ways() -> None:
    qwen, llama, gpt2 = (tokenizer_of(small(rule)) for rule in ("qwen2", "llama-bpe", "gpt-2"))
    smollm = tokenizer_of(small("smollm"))
    assert spelled(qwen, "1234") == spelled(smollm, "1234") == ["1", "2", "3", "4"]
    assert spelled(gpt2, "1234") == ["1234"]
    assert spelled(llama, "1234") == ["<|begin|>", "123", "4"]  # which begins texts unless told not to
    assert spelled(tokenizer_of(small("llama-bpe", add_bos_token=False)), "123") == ["123"]
    both = tokenizer_of(small("gpt-2", add_bos_token=True, add_eos_token=True, eos_token_id=262))
    assert spelled(both, "the the") == ["<|begin|>", "the", "Ġthe", "<|eot_id|>"]
    assert both.stop_tokens == ("<|eot_id|>",)
    for one in (qwen, llama, gpt2, smollm):
        for text in TEXTS:
            assert one.decode(one.encode(text)) == text or one is qwen  # which composes letters first


def test_control_tokens_are_only_what_the_program_writes() -> None:
    made = tokenizer_of(small("llama-bpe", eot_token_id=262, add_bos_token=False))
    assert 262 not in made.encode("<|eot_id|>") and made.encode("<|eot_id|>", allow_special=True) == [262]
    assert made.encode("a<tag>b", allow_special=True) == [97, 264, 98]
    assert made.decode([97, 264, 98]) == "a<tag>b"  # not special: it is shown
    assert made.stop_ids == {262} and made.decode([97, 262]) == "a"


def test_settings_and_template() -> None:
    keys = small("gpt-2", eos_token_id=262, chat_template="{{ messages[0].content }}<|eot_id|>")
    keys["tokenizer.chat_template"] = keys.pop("tokenizer.ggml.chat_template")
    keys |= {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    made = tokenizer_of(keys)
    assert made.generation_defaults == {"temperature": 0.6, "top_k": 20}
    assert made.encode_chat([{"role": "user", "content": "a<|eot_id|>"}])[-1] == 262
    assert made.encode_chat([{"role": "user", "content": "a<|eot_id|>"}]).count(262) == 1
    assert made.named_tokens["bos_token"] == "<|begin|>"


def test_a_whole_tokenizer_goes_first() -> None:
    raw = (BUILT_IN / "tokenizer.json").read_text()
    keys = {**small("gpt-2"), "tokenizer.huggingface.json": raw}
    assert files_of(keys)["tokenizer.json"].decode() == raw


# ---- SentencePiece -----------------------------------------------------------------------------------------


def pieces(**more: Any) -> dict[str, Any]:
    words = ["\u2581", "a", "b", "c", "d", "ab", "abc", "\u2581ab", "bc", "cd", "\u2581\u2581"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -14.0, -3.0, -1.0, -2.0, -0.5, -5.0, -4.0]
    kinds = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * len(words))]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def by_scores(keys: dict[str, Any], text: str) -> list[str]:
    """SentencePiece's own way: the neighbours with the best joined score become one, leftmost first."""
    scores = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"].tolist(), strict=True))
    words = list(text)
    while True:
        pairs = enumerate(itertools.pairwise(words))
        best = max(((scores[a + b], -i) for i, (a, b) in pairs if a + b in scores), default=None)
        if best is None:
            break
        at = -best[1]
        words[at : at + 2] = [words[at] + words[at + 1]]
    found: list[str] = []
    for word in words:
        found += [word] if word in scores else [f"<0x{byte:02X}>" for byte in word.encode()]
    return found


@pytest.mark.parametrize("text", ["abc", "ab bc", "abcd abab", "  aé\U0001f999", "cdcd  ab", "a\nb"])
def test_sentencepiece(text: str) -> None:
    keys = pieces()
    made = tokenizer_of(keys)
    marked = "\u2581" + text.replace(" ", "\u2581")
    assert spelled(made, text) == ["<s>", *by_scores(keys, marked)]
    assert made.decode(made.encode(text)) == text
    plain = tokenizer_of(pieces(add_space_prefix=False, add_bos_token=False))
    assert spelled(plain, text) == by_scores(keys, text.replace(" ", "\u2581"))
    assert plain.decode(plain.encode(text)) == text


def test_sentencepiece_as_transformers_converts_it() -> None:
    """The merges are those that transformers makes of the same vocabulary and scores."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    keys = pieces()
    vocabulary = {token: id for id, token in enumerate(keys["tokenizer.ggml.tokens"])}
    scored = list(zip(vocabulary, keys["tokenizer.ggml.scores"].tolist(), strict=True))
    theirs = convert.generate_merges(vocabulary, dict(scored))
    ours = json.loads(files_of(keys)["tokenizer.json"])["model"]["merges"]
    kinds = keys["tokenizer.ggml.token_type"]
    alone = {token for token, kind in zip(vocabulary, kinds, strict=True) if kind == NORMAL}
    assert [tuple(one) for one in ours] == [pair for pair in theirs if {*pair, "".join(pair)} <= alone]


# ---- What cannot be used -----------------------------------------------------------------------------------


def test_no_tokenizer() -> None:
    assert files_of({"general.architecture": "llama"}) == {}
    assert files_of({"general.architecture": "llama", "tokenizer.ggml.model": "none"}) == {}


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"model": "bert"}, UnsupportedModelError, "tokenizer 'bert' is not read"),
        ({"pre": "viking"}, UnsupportedModelError, "the rule 'viking', which is not known"),
        ({"tokens": 3}, CheckpointError, "has no tokens"),
        ({"tokens": []}, CheckpointError, "has no tokens"),
        ({"merges": None}, CheckpointError, "has no merges"),
        ({"token_type": np.array([1, 2], np.int32)}, CheckpointError, "one entry for each of 265 tokens"),
        ({"tokens": ["a"] * 265}, CheckpointError, "holds a token twice"),
    ],
)
def test_what_cannot_be_used(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        files_of(small("gpt-2", **changed))


def test_scores_that_are_missing() -> None:
    with pytest.raises(CheckpointError, match="no scores"):
        files_of(pieces(scores=None))


def test_the_library_agrees() -> None:
    """The file that is made is one that the tokenizers library reads by itself."""
    for keys in (small("qwen35"), pieces()):
        text = files_of(keys)["tokenizer.json"].decode()
        assert tokenizers.Tokenizer.from_str(text).encode("ab 12").ids == tokenizer_of(keys).encode("ab 12")
