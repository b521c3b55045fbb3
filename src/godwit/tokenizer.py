"""Text to token ids and back, for any checkpoint with a `tokenizer.json`.

The `tokenizers` library normalises, splits and merges, but it would also turn a control token that a user
typed into the real one. So its copy of the tokenizer knows no added tokens; they are matched here, and only
in texts that are allowed to contain them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from .chat_template import ROLE_OTHER, TOOL_RESULT, ChatTemplate, RoleTracker, Shield
from .detokenizer import DecodePlan, StreamDecoder
from .errors import CheckpointError, GodwitError, TemplateError
from .tokenizer_files import (
    ReadText,
    eos_ids,
    in_folder,
    in_memory,
    read_json,
    read_template,
    token_text,
)

__all__ = ["AddedToken", "ChatTemplate", "StreamDecoder", "Tokenizer"]

MAX_TOKENIZER_BYTES = 256 << 20
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_new_tokens", "do_sample",
)  # fmt: skip
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_WORD_CATEGORIES = ("Mn", "Mc", "Me", "Pc")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole in text: an entry of `added_tokens` in `tokenizer.json`."""

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AddedToken:
        """Read one entry; raises KeyError, TypeError or ValueError when it is malformed."""
        if not isinstance(raw["content"], str) or not isinstance(raw["id"], int):
            raise TypeError("an added token needs a text and a number")
        if not 0 <= raw["id"] < 1 << 31:
            raise ValueError(f"no token can have the number {raw['id']}")
        flags = (bool(raw.get(name)) for name in ("special", "lstrip", "rstrip", "single_word"))
        return cls(raw["id"], raw["content"], *flags)

    @property
    def is_control(self) -> bool:
        """False for ordinary text, such as runs of spaces, which some vocabularies list here too."""
        return self.special or not (len(self.content) == 1 or self.content.isspace())


class Tokenizer:
    """Encodes text and conversations; decodes ids, at once or one at a time.

    Ids 0 to `vocab_size` - 1 exist; a model may have more rows. `special_ids` are left out of decoded text.
    Generation ends at `stop_ids`, written `stop_tokens`. `generation_defaults` are the sampling settings that
    the checkpoint recommends. `chat_template` is None where the checkpoint has none. `named_tokens` are those
    that the checkpoint gives a part to: `bos_token`, `eos_token`, `pad_token`, ...
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        chat_template: ChatTemplate | None = None,
        stop_ids: Iterable[int] = (),
        stop_tokens: Iterable[str] = (),
        generation_defaults: Mapping[str, Any] | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`raw` is the content of `tokenizer.json`. Raises GodwitError when it cannot be used."""
        try:
            self._added = [AddedToken.from_dict(token) for token in raw.get("added_tokens") or []]
            self._base = _load(raw)
            self._by_id = {token.id: token for token in self._added}
            self._by_text = {token.content: token for token in self._added if token.content}
            self._forbidden = self._find_forbidden(raw["model"])
            self._first_only = '"prepend_scheme": "first"' in json.dumps(raw.get("pre_tokenizer"))
            self._bare = _load(_without_prefix(raw)) if self._first_only or self._forbidden else self._base
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"it is not a valid tokenizer ({error!r})") from None
        control = [token for token in self._added if token.is_control]
        # A control token of one character could not be broken up by the shield, so none is read from a text.
        self._any_token = _alternatives(
            token.content for token in self._added if not token.is_control or len(token.content) > 1
        )
        self._text_token = _alternatives(token.content for token in self._added if not token.is_control)
        reserved = (token.content for token in control if token.special)
        self._shield = Shield([TOOL_RESULT, *(token.content for token in control)], reserved)
        self._prefix, self._suffix = self._probe_post_processor()
        self._plan = DecodePlan.from_dict(raw.get("decoder"))
        self._bytes: dict[tuple[int, bool], bytes | None] = {}
        self.vocab_size: int = 1 + max([*self._base.get_vocab().values(), *self._by_id], default=-1)
        self.special_ids = frozenset(token.id for token in self._added if token.special)
        named = (self.token_to_id(token) for token in stop_tokens)
        stops = (id for id in (*stop_ids, *named) if id is not None)
        self.stop_ids = frozenset(id for id in stops if 0 <= id < self.vocab_size)
        self.stop_tokens = tuple(self.id_to_token(id) or "" for id in sorted(self.stop_ids))
        self.chat_template = chat_template
        self.generation_defaults = dict(generation_defaults or {})
        self.named_tokens = dict(named_tokens or {})

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a directory. Raises CheckpointError, or TemplateError for an oversized template.

        Reads `tokenizer.json` and, where they exist, `tokenizer_config.json`, `chat_template.jinja`,
        `generation_config.json` and `config.json`.
        """
        return cls._read(in_folder(Path(path)), str(path))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str) -> Tokenizer:
        """The tokenizer in files that were read from what errors call `where`. Raises as `from_dir`."""
        return cls._read(in_memory(files, where), where)

    @classmethod
    def _read(cls, read: ReadText, where: str) -> Tokenizer:
        raw = read_json(read, where, "tokenizer.json", MAX_TOKENIZER_BYTES)
        if raw is None:
            raise CheckpointError(f"{where} has no tokenizer.json; give a directory that holds a tokenizer")
        settings = read_json(read, where, "tokenizer_config.json") or {}
        generation = read_json(read, where, "generation_config.json") or {}
        config = read_json(read, where, "config.json") or {}
        special = {name: text for name in _SPECIAL_NAMES if (text := token_text(settings.get(name)))}
        nested = config.get("text_config")
        sources = [generation, config, nested if isinstance(nested, Mapping) else {}]
        numbers = {key: value for key, value in generation.items() if isinstance(value, (int, float))}
        try:
            return cls(
                raw,
                chat_template=read_template(read, settings, special),
                stop_ids=[id for source in sources for id in eos_ids(source.get("eos_token_id"))],
                stop_tokens=[special["eos_token"]] if "eos_token" in special else [],
                generation_defaults={key: numbers[key] for key in _SAMPLING if key in numbers},
                named_tokens=special,
            )
        except TemplateError:
            raise
        except GodwitError as error:
            raise type(error)(f"{where}/tokenizer.json: {error}") from None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in its vocabulary spelling, control tokens included."""
        added = self._by_text.get(token)
        return added.id if added is not None else self._base.token_to_id(token)

    def id_to_token(self, id: int) -> str | None:
        """The vocabulary spelling of an id; None where there is no such token."""
        added = self._by_id.get(id)
        if added is not None:
            return added.content
        return self._base.id_to_token(id) if 0 <= id < 1 << 32 else None

    def encode(self, text: str, *, allow_special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, which may have been typed by anyone: no part of it becomes a control token.

        `allow_special` is for texts of the program itself: control tokens written out in them are matched.
        `add_special_tokens` adds what the checkpoint wants around a plain prompt (a BOS token, or nothing).
        """
        parts = self._split(_valid(text), self._any_token if allow_special else self._text_token)
        ids = [id for part in parts for id in self._encode_part(part)]
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD and ids without a token become nothing."""
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        skipped = self.special_ids if skip_special else frozenset[int]()

        def lookup(id: int, first: bool) -> bytes | None:
            return None if id in skipped else self.token_bytes(id, first=first)

        return StreamDecoder(lookup, strip=self._plan.strip)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a conversation in the checkpoint's chat template; no text in it can become a control token.

        Raises TemplateError when there is no template, when it fails, or when a message is malformed.
        """
        variables = {"add_generation_prompt": add_generation_prompt, **kwargs}
        parts, mark = self._render(messages, tools, variables)
        return [id for part in parts for id in self._encode_part(part, mark)]

    def encode_chat_with_roles(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> tuple[list[int], list[int]]:
        """(ids, one role code a token) of a conversation in a ChatML template, for training.

        0: what an assistant wrote, with the `<|im_end|>` that closes it. 1: what a user wrote, likewise.
        2: system text, tools, tool results and everything between the turns. Raises TemplateError.
        """
        if not {"<|im_start|>", "<|im_end|>"} <= self._by_text.keys():
            raise TemplateError(
                "this tokenizer has no <|im_start|> and <|im_end|>; roles are known only in ChatML templates"
            )
        parts, mark = self._render(messages, tools, {"add_generation_prompt": False, **kwargs})
        tracker = RoleTracker()
        pairs: list[tuple[int, int]] = []
        for part, after in itertools.zip_longest(parts, parts[1:]):
            if part.token is not None:
                pairs.append((part.token.id, tracker.control(part.text)))
                continue
            header, code = tracker.text(part.text, after.text if after else "")
            spans = self._spans(part.text.replace(mark, ""), part.leads)
            pairs += [(id, ROLE_OTHER if start < header else code) for id, start in spans]
        return [id for id, _ in pairs], [code for _, code in pairs]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> tuple[list[_Part], str]:
        if self.chat_template is None:
            raise TemplateError(
                "this checkpoint has no chat template; add a chat_template.jinja or use plain prompts"
            )
        mark, shielded, shielded_tools, shielded_variables = self._shield.apply(messages, tools, variables)
        text = self.chat_template.render(shielded, tools=shielded_tools, **shielded_variables)
        return list(self._split(_valid(text), self._any_token)), mark

    def _split(self, text: str, pattern: re.Pattern[str]) -> Iterator[_Part]:
        """Cut `text` at added tokens; those with `lstrip` or `rstrip` swallow the white space beside them."""
        done = 0
        for match in pattern.finditer(text):
            token = self._by_text[match[0]]
            start, stop = match.span()
            if start < done or (token.single_word and _touches_word(text, start, stop)):
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip())
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip())
            if start > done:
                yield _Part(text[done:start], None, self._leads(done))
            yield _Part(token.content, token, False)
            done = stop
        if done < len(text):
            yield _Part(text[done:], None, self._leads(done))

    def _leads(self, start: int) -> bool:
        return start == 0 or not self._first_only

    def _encode_part(self, part: _Part, mark: str = "") -> list[int]:
        if part.token is not None:
            return [part.token.id]
        text = part.text.replace(mark, "") if mark else part.text
        ids: list[int] = self._run(text, part.leads).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        return [id for id, _ in self._spans(text, part.leads)]

    def _spans(self, text: str, leads: bool) -> list[tuple[int, int]]:
        """(id, index of its first character) of text without added tokens."""
        encoding = self._run(text, leads)
        spans = [(id, start, stop) for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)]
        cuts = [start + 1 for id, start, stop in spans if id in self._forbidden and stop - start > 1]
        if not cuts:
            return [(id, start) for id, start, _ in spans if id not in self._forbidden]
        # Some vocabularies hold control tokens among the words. Cut in two, they are words no more.
        result: list[tuple[int, int]] = []
        for start, stop in itertools.pairwise([0, *cuts, len(text)]):
            inner = self._spans(text[start:stop], leads and start == 0)
            result += [(id, start + place) for id, place in inner]
        return result

    def _run(self, text: str, leads: bool, *, around: bool = False) -> tokenizers.Encoding:
        with _library_errors():
            return (self._base if leads else self._bare).encode(text, add_special_tokens=around)

    def _find_forbidden(self, model: Mapping[str, Any]) -> frozenset[int]:
        """Control tokens that the model of the tokenizer could produce from plain text."""
        control = {token.id for token in self._added if token.is_control}
        known = {id for id in control if self._base.id_to_token(id) is not None}
        return frozenset(known - {model.get("unk_id"), self._base.token_to_id(str(model.get("unk_token")))})

    def _probe_post_processor(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        plain: list[int] = self._run("a", True).ids
        full: list[int] = self._run("a", True, around=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def token_bytes(self, id: int, *, first: bool = False) -> bytes | None:
        """What an id adds to a text, maybe a part of a character; None where there is no such token.

        Some tokenizers write the ``first`` token of a text without its leading space.
        """
        key = id, first and self._plan.drop_first
        if key not in self._bytes:
            token = self.id_to_token(id)
            self._bytes[key] = self._plan.convert(token, key[1]) if token is not None else None
        return self._bytes[key]


@dataclass(frozen=True)
class _Part:
    """An added token, or text between two; `leads`: it gets the prefix space of the tokenizer, if any."""

    text: str
    token: AddedToken | None
    leads: bool


def _alternatives(words: Iterable[str]) -> re.Pattern[str]:
    """Matches one of `words`, the longest that fits."""
    ordered = sorted(filter(None, words), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _touches_word(text: str, start: int, stop: int) -> bool:
    return any(map(_is_word, (text[start - 1 : start], text[stop : stop + 1])))


def _is_word(character: str) -> bool:
    """Like `\\w` of the library, which counts combining marks, unlike that of Python."""
    return bool(character) and (character.isalnum() or unicodedata.category(character) in _WORD_CATEGORIES)


def _valid(text: str) -> str:
    """`text` without the lone surrogates that JSON lets through."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _load(raw: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer without added tokens, and without what only training needs."""
    model = dict(raw["model"])
    if model.get("dropout"):
        model["dropout"] = None
    if model.get("continuing_subword_prefix") and model.get("type") != "WordPiece":
        # No language model has one, and a wrong one makes the library abort the whole program.
        raise CheckpointError("its continuing_subword_prefix is not supported")
    plain = {**raw, "model": model, "added_tokens": [], "truncation": None, "padding": None}
    with _library_errors():
        return tokenizers.Tokenizer.from_str(json.dumps(plain))


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """The library raises bare Exception, and where its Rust code panics, a BaseException of its own."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"it is not a valid tokenizer ({error})") from None


def _without_prefix(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer without the space that it puts before a text."""
    return {**raw, **{key: _strip_prefix(raw.get(key)) for key in ("normalizer", "pre_tokenizer")}}


def _strip_prefix(step: Any) -> Any:
    if not isinstance(step, Mapping):
        return step
    if step.get("type") == "Prepend":
        return None
    result = {**step}
    if "prepend_scheme" in step:
        result["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        result["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            result[key] = [inner for inner in map(_strip_prefix, step[key]) if inner is not None]
    return result
