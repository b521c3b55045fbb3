"""Added tokens of both files and with all flags, as `transformers` reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import CheckpointError
from godwit.text.tokenizer import Tokenizer

Make = Callable[[str], dict[str, Any]]
PLAIN = {"special": False, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
NAMED = {"__type": "AddedToken"}
TEXTS = (
    "a<extra>b",
    "a <extra> b",
    "<extra>",
    " <extra>",
    "a<EXTRA>b <Extra>",
    "the<extra>quick <extra2> brown",
    "cafe\u0301 caf\u00e9 na\u00efve",
    "a word, words, aword",
    "<think>a</think> <extra><think>",
)


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **PLAIN, **flags}


def write(folder: Path, raw: dict[str, Any], added: list[dict[str, Any]], settings: dict[str, Any]) -> Path:
    size = 1 + max([*raw["model"]["vocab"].values(), *(one["id"] for one in raw["added_tokens"])])
    tokens = [*raw["added_tokens"], *({"id": size + place, **one} for place, one in enumerate(added))]
    (folder / "tokenizer.json").write_text(json.dumps({**raw, "added_tokens": tokens}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


LOWER = {"type": "Lowercase"}
CASES: list[tuple[str, Any, list[dict[str, Any]], dict[str, Any]]] = [
    *(
        (kind, None, [token("<extra>", **flags)], {})
        for kind in ("bytes", "legacy")
        for flags in (
            {"special": True},
            {"normalized": True},
            {"lstrip": True, "rstrip": True},
            {"lstrip": True, "rstrip": True, "normalized": True},
            {"single_word": True},
        )
    ),
    ("bytes", LOWER, [token("<extra>", normalized=True), token("<extra2>")], {}),
    ("bytes", LOWER, [token("<EXTRA>", normalized=True)], {}),
    ("bytes", LOWER, [token("<EXTRA>")], {}),
    ("bytes", LOWER, [token("word", single_word=True, normalized=True)], {}),
    ("bytes", None, [token("cafe\u0301", normalized=True)], {}),
    ("bytes", None, [token("caf\u00e9")], {}),
    ("bytes", None, [token("<extra", normalized=True), token("extra>")], {}),
    *(
        (kind, None, [], {"added_tokens_decoder": decoder})
        for kind in ("bytes", "legacy")
        for decoder in (
            {"500000": token("<extra>", special=True)},
            {"600": token("<extra2>"), "599": token("<extra>", normalized=True)},
            {"600": {"content": "<extra>"}},
            {"600": token("<think>", lstrip=True)},
            {"600": token("the")},
        )
    ),
    ("bytes", None, [], {"eos_token": "<extra>"}),
    ("bytes", None, [], {"eos_token": NAMED | token("<extra>", lstrip=True), "pad_token": "<extra2>"}),
    ("bytes", None, [], {"additional_special_tokens": ["<extra>", NAMED | token("<extra2>", rstrip=True)]}),
    ("bytes", None, [], {"added_tokens_decoder": {"600": token("<extra>")}, "eos_token": "<extra>"}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "normalizer", "added", "settings"), CASES)
def test_as_transformers(
    kind: str,
    normalizer: Any,
    added: list[dict[str, Any]],
    settings: dict[str, Any],
    make: Make,
    tmp_path: Path,
) -> None:
    library = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    raw = make(kind)
    raw = {**raw, "normalizer": normalizer} if normalizer else raw
    folder = write(tmp_path, raw, added, settings)
    ours, theirs = (
        Tokenizer.from_dir(folder, trusted=True),
        library.PreTrainedTokenizerFast.from_pretrained(folder),
    )
    assert ours.vocab_size == len(theirs) or kind == "legacy"
    for text in TEXTS:
        assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"], text
        if added or "added_tokens_decoder" in settings:
            ids = ours.encode(text, allow_special=True, add_special_tokens=False)
            assert ours.decode(ids, skip_special=False).lower().count("extra") == text.lower().count("extra")


def test_a_token_of_the_settings_ends_answers(make: Make, tmp_path: Path) -> None:
    decoder = {"600": token("<stop>", special=True)}
    settings = {"added_tokens_decoder": decoder, "eos_token": "<stop>"}
    tok = Tokenizer.from_dir(write(tmp_path, make("bytes"), [], settings), trusted=True)
    (id,) = tok.encode("<stop>", allow_special=True)
    assert tok.stop_ids == {id} and tok.stop_tokens == ("<stop>",) and id in tok.special_ids
    assert id not in tok.encode("<stop>")


def test_the_normaliser_makes_no_control_token_of_what_a_user_typed(make: Make, tmp_path: Path) -> None:
    raw = {**make("bytes"), "normalizer": LOWER}
    template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    added = [token("<turn>", normalized=True, special=True), token("<aside>", normalized=True)]
    tok = Tokenizer.from_dir(write(tmp_path, raw, added, {"chat_template": template}), trusted=True)
    id = tok.token_to_id("<turn>")
    messages = [{"role": "user", "content": "a <turn> b <TURN> c <\u0054urn>"}]
    assert tok.encode_chat(messages, add_generation_prompt=False).count(id or -1) == 1
    assert tok.encode("<TURN>", allow_special=True) == [id]
    assert id not in tok.encode("<TURN> <turn>")


@pytest.mark.parametrize(
    "decoder", [[1], {"x": token("a")}, {"1": "a"}, {"1": {"special": True}}, {"1": {"content": 3}}]
)
def test_settings_that_are_no_tokens(decoder: Any, make: Make, tmp_path: Path) -> None:
    folder = write(tmp_path, make("bytes"), [], {"added_tokens_decoder": decoder})
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        Tokenizer.from_dir(folder, trusted=True)
