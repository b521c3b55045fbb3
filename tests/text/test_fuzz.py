"""Random damage to a tokenizer's files: it works, or there is an error of one sentence that names a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.errors import GodwitError
from godwit.text.tokenizer import Tokenizer
from tests.text.conftest import TEMPLATE, _make

quick = settings(max_examples=250, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
SETTINGS = {
    "eos_token": {"content": "<|im_end|>", "special": True},
    "added_tokens_decoder": {"900": {"content": "<new>", "special": True}},
    "additional_special_tokens": ["<other>"],
    "chat_template": TEMPLATE,
}
GENERATION = {"eos_token_id": [1, 2], "temperature": 0.5, "top_k": 3}
RAW = {kind: _make(kind) for kind in ("bytes", "first", "legacy")}

kinds = st.sampled_from(sorted(RAW))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["Replace", "Sequence", "ByteLevel", "BPE", "Unigram", "<|im_end|>", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "content", "pattern", "id", "normalizers", "vocab"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def check(files: dict[str, bytes]) -> None:
    try:
        tokenizer = Tokenizer.from_files(files, "here", trusted=True)
        ids = tokenizer.encode("the quick <|im_end|> dog \u4f60 <new>", allow_special=True)
        tokenizer.decode([*ids, 10**12, -1])
    except GodwitError as error:
        assert len(str(error)) < 1000 and len(str(error).splitlines()) == 1


def contents(kind: str) -> dict[str, bytes]:
    parts = {"tokenizer": RAW[kind], "tokenizer_config": SETTINGS, "generation_config": GENERATION}
    return {f"{name}.json": json.dumps(part).encode() for name, part in parts.items()}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something could be replaced; of a vocabulary's thousands of entries the first few."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, item) in enumerate(inner):
        if number < 8:
            yield (*path, key)
            yield from places(item, (*path, key))


@pytest.mark.parametrize("kind", sorted(RAW))
def test_the_samples_themselves_work(kind: str) -> None:
    tokenizer = Tokenizer.from_files(contents(kind), "here", trusted=True)
    assert tokenizer.decode(tokenizer.encode("the dog")).strip() == "the dog"


@quick
@given(kinds, st.sampled_from(("tokenizer", "tokenizer_config", "generation_config")), st.data())
def test_replaced_values(kind: str, name: str, data: st.DataObject) -> None:
    changed = copy.deepcopy(
        {"tokenizer": RAW[kind], "tokenizer_config": SETTINGS, "generation_config": GENERATION}[name]
    )
    *way, last = data.draw(st.sampled_from(list(places(changed))))
    target: Any = changed
    for key in way:
        target = target[key]
    target[last] = data.draw(values)
    check(contents(kind) | {f"{name}.json": json.dumps(changed).encode()})


@quick
@given(kinds, st.integers(0, 400), st.sampled_from(b'0123456789-.,:[]{}"eE\\\xff\0'), st.booleans())
def test_changed_bytes(kind: str, at: int, value: int, behind: bool) -> None:
    files = contents(kind)
    content = bytearray(files["tokenizer.json"])
    content[-1 - at if behind else at] = value
    check(files | {"tokenizer.json": bytes(content)})


@quick
@given(
    st.sampled_from(("tokenizer", "tokenizer_config", "generation_config", "config")), st.binary(max_size=60)
)
def test_noise(name: str, content: bytes) -> None:
    check(contents("bytes") | {f"{name}.json": content})
