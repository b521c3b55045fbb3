"""Convert a GGUF file's tokenizer to the files of a checkpoint directory, such as `tokenizer.json`.

A GGUF file has the vocabulary, the merges or scores, and the name of the pre-tokenizer; the rest follows from
the kind of tokenizer.
"""

from __future__ import annotations

import json
from typing import Any

from godwit.checkpoint.gguf.metadata import Metadata
from godwit.checkpoint.safetensors import shown
from godwit.errors import CheckpointError, UnsupportedModelError

_UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _words(letters: str, digits: str, symbols: str = _SYMBOLS) -> str:
    return "|".join((_CONTRACTIONS, letters, digits, symbols, _TAIL))


_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
#: `tokenizer.ggml.pre` -> regular expression of the pre-tokenizer; None: the byte-level one of GPT-2.
_WORDS: dict[str, str | None] = {
    "qwen2": _words(_LETTERS, r"\p{N}"),
    "qwen35": _words(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
    "llama-bpe": _words(_LETTERS, r"\p{N}{1,3}"),
    "llama3": _words(_LETTERS, r"\p{N}{1,3}"),
    "smollm": None,
    "gpt-2": None,
    "default": None,
}
_NONE = (None, "none", "no_vocab")
_NORMALIZED = ("qwen2", "qwen35")  # to NFC
_MARKS = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
_ENDS = ("eos", "eot", "eom")
#: Control tokens that end an answer, whatever the file names as its EOS.
_END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_LLAMA3 = ("llama-bpe", "llama3")
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "penalty_repeat": "repetition_penalty"}  # fmt: skip


def as_files(found: Metadata) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and ``chat_template.jinja``.

    None of them where the file holds no tokenizer.

    Raises:
        CheckpointError: lists that do not match.
        UnsupportedModelError: an unsupported kind of tokenizer.
    """
    if found.keys.get("tokenizer.ggml.model") in _NONE:
        return {}
    return _Tokenizer(found).files()


class _Tokenizer:
    def __init__(self, found: Metadata) -> None:
        self._found, self._where = found, found.path
        self._model = self._key("model")
        tokens = self._key("tokens")
        if not isinstance(tokens, list) or not tokens:
            raise CheckpointError(f"{self._where}: its tokenizer has no tokens; fetch the file again")
        self._tokens: list[str] = tokens
        self._types = self._numbers("token_type", [1] * len(tokens))
        if self._model not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                f"{self._where}: tokenizer {shown(self._model)} is not read, only gpt2 and llama are"
            )

    def files(self) -> dict[str, bytes]:
        named = {name: self._id(mark) for mark, name in _MARKS.items()}
        settings = {name: self._tokens[id] for name, id in named.items() if id is not None}
        generation: dict[str, Any] = {"eos_token_id": self._ends()}
        for theirs, ours in _SAMPLING.items():
            value = self._found.keys.get(f"general.sampling.{theirs}")
            if isinstance(value, (int, float)):
                generation[ours] = value
        texts = {
            "tokenizer.json": self._own() or json.dumps(self._content(), ensure_ascii=False),
            "tokenizer_config.json": json.dumps(settings, ensure_ascii=False),
            "generation_config.json": json.dumps(generation),
        }
        template = self._found.keys.get("tokenizer.chat_template")
        if isinstance(template, str) and template:
            texts["chat_template.jinja"] = template
        return {name: text.encode() for name, text in texts.items()}

    def _ends(self) -> list[int]:
        named = {id for mark in _ENDS if (id := self._id(mark)) is not None}
        known = (self._tokens.index(token) for token in _END_TOKENS if token in self._tokens)
        return sorted(named | {id for id in known if self._types[id] == _CONTROL})

    def _own(self) -> str | None:
        """A whole tokenizer.json, which some files carry."""
        own = self._found.keys.get("tokenizer.huggingface.json")
        return own if isinstance(own, str) and own else None

    def _content(self) -> dict[str, Any]:
        kind = self._gpt2() if self._model == "gpt2" else self._sentencepiece()
        return {"version": "1.0", "added_tokens": self._added(), "post_processor": self._around(), **kind}

    def _gpt2(self) -> dict[str, Any]:
        """Byte-level BPE: tokens are spelled in GPT-2's alphabet of bytes."""
        rule = self._key("pre") or "default"
        if rule not in _WORDS:
            raise UnsupportedModelError(
                f"{self._where}: words are cut by the rule {shown(rule)}, which is not known; "
                "give the original checkpoint"
            )
        merges = self._key("merges")
        if not isinstance(merges, list):
            raise CheckpointError(f"{self._where}: its tokenizer has no merges; fetch the file again")
        words, steps = _WORDS[rule], []
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        if words is not None:
            steps.append(
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
            )
        elif rule == "smollm":
            steps.append({"type": "Digits", "individual_digits": True})
        steps.append({**byte_level, "use_regex": words is None})
        return {
            "normalizer": {"type": "NFC"} if rule in _NORMALIZED else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE", "vocab": self._vocabulary(), "merges": merges,
                "ignore_merges": rule in _LLAMA3,
            },
        }  # fmt: skip

    def _sentencepiece(self) -> dict[str, Any]:
        """BPE of SentencePiece: spaces are spelled as U+2581, unknown letters as bytes."""
        scores = self._numbers("scores", [])
        if len(scores) != len(self._tokens):
            raise CheckpointError(f"{self._where}: its tokenizer has no scores; fetch the file again")
        unknown = self._id("unknown")
        prefix = self._found.keys.get("tokenizer.ggml.add_space_prefix", True)
        steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "\u2581"}] if prefix else []
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "vocab": self._vocabulary(), "merges": self._merges(scores), "fuse_unk": True,
                "byte_fallback": True, "unk_token": None if unknown is None else self._tokens[unknown],
            },
        }  # fmt: skip

    def _merges(self, scores: list[float]) -> list[list[str]]:
        """The merges of a SentencePiece vocabulary: every way to split a token in two, best score first."""
        ids = {token: id for id, token in enumerate(self._tokens) if self._types[id] in (1, _USER)}
        found: list[tuple[float, str, str]] = []
        for token, id in ids.items():
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in ids and right in ids:
                    found.append((scores[id], left, right))
        # Among pieces of the same score longer left parts go first, as transformers has them.
        found.sort(key=lambda one: (-one[0], -len(one[1])))
        return [[left, right] for _, left, right in found]

    def _vocabulary(self) -> dict[str, int]:
        vocabulary = {token: id for id, token in enumerate(self._tokens)}
        if len(vocabulary) != len(self._tokens):
            raise CheckpointError(f"{self._where}: its vocabulary holds a token twice; fetch the file again")
        return vocabulary

    def _added(self) -> list[dict[str, Any]]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return [
            {"id": id, "content": token, "special": kind in (_CONTROL, _UNKNOWN), **flags}
            for id, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind in (_CONTROL, _USER, _UNKNOWN) and token
        ]

    def _around(self) -> dict[str, Any] | None:
        """The post-processor of plain text: adds BOS and EOS if the file says so."""
        # llama.cpp adds a BOS token to these unless the file says no.
        default = self._model == "llama" or self._key("pre") in _LLAMA3
        begin = self._id("bos") if self._found.keys.get("tokenizer.ggml.add_bos_token", default) else None
        end = self._id("eos") if self._found.keys.get("tokenizer.ggml.add_eos_token", False) else None
        if begin is None and end is None:
            return None
        special = {self._tokens[id]: id for id in (begin, end) if id is not None}

        def template(kind: str) -> list[dict[str, Any]]:
            before, after = ([_special(self._tokens[id])] if id is not None else [] for id in (begin, end))
            return [*before, {"Sequence": {"id": kind, "type_id": 0}}, *after]

        return {
            "type": "TemplateProcessing",
            "single": template("A"),
            "pair": [*template("A"), *template("B")],
            "special_tokens": {
                token: {"id": token, "ids": [id], "tokens": [token]} for token, id in special.items()
            },
        }

    def _id(self, mark: str) -> int | None:
        value = self._found.keys.get(f"tokenizer.ggml.{mark}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(self._tokens) else None

    def _key(self, name: str) -> Any:
        return self._found.keys.get(f"tokenizer.ggml.{name}")

    def _numbers(self, name: str, default: list[Any]) -> list[Any]:
        value = self._key(name)
        if value is None:
            return default
        numbers = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(numbers, list) or len(numbers) != len(self._tokens):
            raise CheckpointError(
                f"{self._where}: its {name} does not have one entry for each of {len(self._tokens)} tokens"
            )
        return numbers


def _special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}
