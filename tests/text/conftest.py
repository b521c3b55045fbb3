"""Small vocabularies of the kinds that checkpoints have, and the real one of Qwen where it is there."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from godwit.text.tokenizer import ChatTemplate, Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind at all",
    "a user asks, an assistant answers; a system says what both of them should do",
    'def greet(name): return {"name": name, "arguments": [1, 2, 3]}',
    "tool_call tool_response im_start im_end think é à ü ñ 你好 世界",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
TEMPLATE = """
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content or '') }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- (call.function.arguments | tojson) ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""


def _added(id: int, content: str, special: bool, **flags: bool) -> dict[str, Any]:
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, "special": special} | rest | flags


def _byte_level() -> dict[str, Any]:
    """A small vocabulary of the Qwen2 kind, as the content of its tokenizer.json."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator(CORPUS, trainer)
    raw: dict[str, Any] = json.loads(tok.to_str())
    size = len(raw["model"]["vocab"])
    raw["added_tokens"] = [_added(size + i, t, t in SPECIAL) for i, t in enumerate(SPECIAL + PLAIN)]
    return raw


def _sentence_piece(pre_tokenizer: Any, normalizer: Any, decoder: Any) -> dict[str, Any]:
    """A small vocabulary of the Llama kind, with byte fallback and control tokens among its words."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.train_from_iterator(CORPUS[:3], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    raw: dict[str, Any] = json.loads(tok.to_str())
    words = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].__getitem__)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    names += [name for name in ("<", ">", "/", "\u2581") if name not in words]
    raw["model"] |= {
        "vocab": {n: i for i, n in enumerate(names)},
        "byte_fallback": True,
        "unk_token": "<unk>",
    }
    raw["added_tokens"] = [_added(i, names[i], True) for i in range(3)]
    raw["added_tokens"].append(_added(len(names), "<mid>", True, lstrip=True, rstrip=True))
    raw["added_tokens"].append(_added(len(names) + 1, "word", False, single_word=True))
    processor: dict[str, Any] = {"type": "TemplateProcessing"}
    processor["single"] = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    processor["pair"] = [*processor["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    processor["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    return raw | {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "post_processor": processor,
    }


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}


FALLBACK_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
LEGACY_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "bytes": _byte_level,
    "first": lambda: _sentence_piece(_metaspace("first"), None, FALLBACK_DECODER),
    "always": lambda: _sentence_piece(_metaspace("always"), None, _metaspace("always")),
    "never": lambda: _sentence_piece(_metaspace("never"), None, _metaspace("never")),
    "legacy": lambda: _sentence_piece(None, LEGACY_NORMALIZER, FALLBACK_DECODER),
}


@cache
def _serialised(kind: str) -> str:
    return json.dumps(KINDS[kind]())


def _make(kind: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(_serialised(kind))
    return raw


@pytest.fixture(scope="session")
def make() -> Callable[[str], dict[str, Any]]:
    """The content of a tokenizer.json of a kind, the caller's to change."""
    return _make


@pytest.fixture(scope="session")
def template() -> str:
    """A chat template in ChatML."""
    return TEMPLATE


@pytest.fixture(scope="session")
def control_ids() -> frozenset[int]:
    """The added tokens of `tok`."""
    return frozenset(token["id"] for token in _make("bytes")["added_tokens"])


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    """A byte-level tokenizer with a chat template."""
    return Tokenizer(_make("bytes"), chat_template=ChatTemplate(TEMPLATE), stop_tokens=["<|im_end|>"])


@pytest.fixture(scope="session", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """(ours, the library's) for one and the same file."""
    text = _serialised(request.param)
    return Tokenizer(json.loads(text)), tokenizers.Tokenizer.from_str(text)


@pytest.fixture(scope="session")
def qwen(shared_dir: Path) -> Tokenizer:
    """The tokenizer of Qwen2 and Qwen3, all 151,669 tokens."""
    path = shared_dir / "fixtures" / "qwen" / "tokenizer.json.xz"
    if not path.is_file():
        pytest.skip(f"needs the Qwen vocabulary; {path} is absent")
    return Tokenizer(json.loads(lzma.decompress(path.read_bytes())), chat_template=ChatTemplate(TEMPLATE))
