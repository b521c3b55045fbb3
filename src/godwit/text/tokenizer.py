"""Text to token ids and back, for any checkpoint with a `tokenizer.json`.

The `tokenizers` library normalises, splits and merges, but it would also turn a control token that a user
typed into the real one. So its copy of the tokenizer has no added tokens; they are matched here, and only in
texts that may contain them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from godwit.errors import CheckpointError, GodwitError, TemplateError

from .added_tokens import SPECIAL_NAMES, AddedToken, Matcher, TextPart, merged
from .chat_template import ROLE_OTHER, TOOL_RESULT, ChatTemplate, RoleTracker, Shield, thinks_nothing
from .detokenizer import DecodePlan, StreamDecoder
from .files import (
    MAX_TOKENIZER_BYTES,
    ReadText,
    eos_ids,
    files_in,
    in_memory,
    read_json,
    read_template,
    token_text,
)
from .library import library_errors, load, without_prefix
from .trial import try_out

__all__ = ["AddedToken", "ChatTemplate", "StreamDecoder", "Tokenizer"]

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_new_tokens", "do_sample",
)  # fmt: skip
MAX_AROUND = 64  # tokens that the post-processor puts around a text
#: Parts that are looked at to tell a template's words from those of an assistant.
_LOOKAHEAD = 8
#: Longer texts are encoded without the interpreter's lock; for shorter ones that costs more than it gains.
_LONG_CHARS = 1024


class Tokenizer:
    """Encodes text and conversations; decodes ids, at once or one at a time.

    Ids 0 to `vocab_size` - 1 exist; a model may have more rows. `special_ids` are left out of decoded text.
    Generation ends at `stop_ids`, whose texts are `stop_tokens`. `generation_defaults` are the sampling
    settings that the checkpoint recommends. `chat_template` is None if the checkpoint has none.
    `named_tokens` are the texts of `bos_token`, `eos_token`, `pad_token`, ...
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
        """`raw` is the content of `tokenizer.json`. Raises GodwitError if it cannot be used."""
        try:
            self._added = [AddedToken.from_dict(token) for token in raw.get("added_tokens") or []]
            self._base = load(raw)
            self._by_id = {token.id: token for token in self._added}
            self._by_text = {token.content: token for token in self._added if token.content}
            self._forbidden = self._find_forbidden(raw["model"])
            self._first_only = '"prepend_scheme": "first"' in json.dumps(raw.get("pre_tokenizer"))
            bare = without_prefix(raw)
            needed = self._first_only or self._forbidden
            # Not loaded a second time where nothing differs: large vocabularies take seconds.
            same = all(bare[key] == raw.get(key) for key in ("normalizer", "pre_tokenizer"))
            self._bare = load(bare) if needed and not same else self._base
            self._raw = raw
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"it is not a valid tokenizer ({error!r})") from None
        control = [token for token in self._added if token.is_control]
        self._set_matchers()
        reserved = (token.content for token in control if token.special)
        self._shield = Shield([TOOL_RESULT, *(token.content for token in control)], reserved)
        self._prefix, self._suffix = self._probe_post_processor()
        self._plan = DecodePlan.from_dict(raw.get("decoder"))
        self._openings: dict[str, str] = {}
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
    def from_dir(cls, path: str | Path, *, trusted: bool = False) -> Tokenizer:
        """The tokenizer in a directory. Raises CheckpointError, or TemplateError for an oversized template.

        Reads `tokenizer.json` and, where they exist, `tokenizer_config.json`, `chat_template.jinja`,
        `generation_config.json` and `config.json`; links must not lead out of the directory. Unless it is
        `trusted`, a tokenizer is first tried in a limited process.
        """
        return cls.from_files(files_in(Path(path)), str(path), trusted=trusted)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str, *, trusted: bool = False) -> Tokenizer:
        """The tokenizer in `files`; errors call their folder `where`. Raises as `from_dir`."""
        if not trusted:
            try_out(files, where)
        return cls._read(in_memory(files, where), where)

    @classmethod
    def _read(cls, read: ReadText, where: str) -> Tokenizer:
        raw = read_json(read, where, "tokenizer.json", MAX_TOKENIZER_BYTES)
        if raw is None:
            raise CheckpointError(f"{where} has no tokenizer.json; give a directory that holds a tokenizer")
        settings = read_json(read, where, "tokenizer_config.json") or {}
        generation = read_json(read, where, "generation_config.json") or {}
        config = read_json(read, where, "config.json") or {}
        special = {name: text for name in SPECIAL_NAMES if (text := token_text(settings.get(name)))}
        nested = config.get("text_config")
        sources = [generation, config, nested if isinstance(nested, Mapping) else {}]
        numbers = {key: value for key, value in generation.items() if isinstance(value, (int, float))}
        try:
            return cls(
                _with_settings(raw, settings),
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
        """The vocabulary spelling of an id; None if there is no such token."""
        added = self._by_id.get(id)
        if added is not None:
            return added.content
        return self._base.id_to_token(id) if 0 <= id < 1 << 32 else None

    def encode(self, text: str, *, allow_special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Token ids of an untrusted `text`: no part of it becomes a control token.

        `allow_special` is for texts of the program itself: control tokens in them are matched.
        `add_special_tokens` adds what the checkpoint puts around a plain prompt (a BOS token, or nothing).
        """
        parts = (self._any_token if allow_special else self._text_token).split(_valid(text))
        ids = [id for part in parts for id in self._encode_part(part)]
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD and ids without a token become nothing."""
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, skip_special: bool = True, shown: Collection[int] = ()) -> StreamDecoder:
        """A decoder for ids that arrive one by one; ``shown``: special tokens that are not skipped."""
        skipped = self.special_ids.difference(shown) if skip_special else frozenset[int]()

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

        Raises TemplateError if there is no template, it fails, or a message is malformed.
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
        2: system text, tools, tool results, everything between the turns, and what the template itself
        puts in front of an assistant's words: what opens an answer, and thinking that is empty. Raises
        TemplateError.
        """
        if not {"<|im_start|>", "<|im_end|>"} <= self._by_text.keys():
            raise TemplateError(
                "this tokenizer has no <|im_start|> and <|im_end|>; roles are known only in ChatML templates"
            )
        parts, mark = self._render(messages, tools, {"add_generation_prompt": False, **kwargs})
        tracker = RoleTracker(self._opening(kwargs), own_empty=thinks_nothing(messages))
        pairs: list[tuple[int, int]] = []
        for index, part in enumerate(parts):
            if part.token is not None:
                pairs.append((part.token.id, tracker.control(part.text)))
                continue
            following = "".join(after.text for after in parts[index + 1 : index + 1 + _LOOKAHEAD])
            header, code = tracker.text(part.text, following)
            spans = self._spans(part.text.replace(mark, ""), part.leads, part.normal)
            pairs += [(id, ROLE_OTHER if start < header else code) for id, start in spans]
        return [id for id, _ in pairs], [code for _, code in pairs]

    def _opening(self, variables: Mapping[str, Any]) -> str:
        """What the template puts after the header of the next answer."""
        key = json.dumps(variables, sort_keys=True, default=repr)
        if key not in self._openings:
            asked = {**variables, "add_generation_prompt": True}
            try:
                parts, _ = self._render([{"role": "user", "content": "."}], None, asked)
            except TemplateError:  # some templates want other messages
                parts = []
            text = "".join(part.text for part in parts)
            self._openings[key] = text.rpartition("<|im_start|>assistant\n")[2] if parts else ""
        return self._openings[key]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> tuple[list[TextPart], str]:
        if self.chat_template is None:
            raise TemplateError(
                "this checkpoint has no chat template; add a chat_template.jinja or use plain prompts"
            )
        mark, shielded, shielded_tools, shielded_variables = self._shield.apply(messages, tools, variables)
        text = self.chat_template.render(shielded, tools=shielded_tools, **shielded_variables)
        return list(self._chat_token.split(_valid(text))), mark

    def _encode_part(self, part: TextPart, mark: str = "") -> list[int]:
        if part.token is not None:
            return [part.token.id]
        text = part.text.replace(mark, "") if mark else part.text
        ids: list[int] = self._run(text, part.leads, normal=part.normal, offsets=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        pieces = self._pieces(text, part.leads, part.normal)
        return [id for _, piece in pieces for id in piece.ids if id not in self._forbidden]

    def _spans(self, text: str, leads: bool, normal: bool) -> list[tuple[int, int]]:
        """(id, index of its first character) of text without added tokens."""
        return [
            (id, place + start)
            for place, piece in self._pieces(text, leads, normal)
            for id, (start, _) in zip(piece.ids, piece.offsets, strict=True)
            if id not in self._forbidden
        ]

    def _pieces(self, text: str, leads: bool, normal: bool) -> Iterator[tuple[int, tokenizers.Encoding]]:
        """(index of its first character, encoding) of each piece of text without added tokens.

        Some vocabularies contain control tokens as words; such a match is cut in two.
        """
        piece = self._run(text, leads, normal=normal)
        found = [index for index, id in enumerate(piece.ids) if id in self._forbidden]
        # Not from `offsets`, which makes as many tuples as there are tokens.
        spans = [span for index in found if (span := piece.token_to_chars(index)) is not None]
        cuts = [start + 1 for start, stop in spans if stop - start > 1]
        if not cuts:
            yield 0, piece
            return
        for start, stop in itertools.pairwise([0, *cuts, len(text)]):
            for place, inner in self._pieces(text[start:stop], leads and start == 0, normal):
                yield start + place, inner

    def _run(
        self, text: str, leads: bool, *, around: bool = False, normal: bool = False, offsets: bool = True
    ) -> tokenizers.Encoding:
        chosen = self._normal if normal else self._base if leads else self._bare
        with library_errors():
            if len(text) < _LONG_CHARS:
                return chosen.encode(text, add_special_tokens=around)
            # Only the library's batches release the interpreter's lock.
            encode = chosen.encode_batch if offsets else chosen.encode_batch_fast
            return encode([text], add_special_tokens=around)[0]

    @cached_property
    def _normal(self) -> tokenizers.Tokenizer:
        """For text that is already normalised; few vocabularies ever need it."""
        return load({**self._raw, "normalizer": None})

    def _set_matchers(self) -> None:
        """What is matched in the program's own texts, in rendered conversations, and in untrusted texts."""
        # The shield cannot break up a control token of one character, so none is read from a text.
        readable = [token for token in self._added if not token.is_control or len(token.content) > 1]
        plain = [token for token in self._added if not token.is_control]
        # In conversations, the normaliser must not turn what a user typed into a control token.
        chat = [token for token in plain if token.normalized]
        self._any_token = self._matcher(readable, [token for token in readable if token.normalized])
        self._chat_token = self._matcher(readable, chat)
        self._text_token = self._matcher(plain, chat)

    def _matcher(self, tokens: list[AddedToken], normalized: list[AddedToken]) -> Matcher:
        literal = [token for token in tokens if token not in normalized]
        return Matcher(literal, normalized, self._normalize, first_only=self._first_only)

    def _normalize(self, text: str) -> str:
        normalizer = self._base.normalizer
        if normalizer is None:
            return text
        with library_errors():
            return str(normalizer.normalize_str(text))

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
                if len(full) - len(plain) > MAX_AROUND:
                    raise CheckpointError(f"it puts more than {MAX_AROUND} tokens around each text")
                return full[:start], full[start + len(plain) :]
        return [], []

    def token_bytes(self, id: int, *, first: bool = False) -> bytes | None:
        """The bytes of an id, maybe a part of a character; None if there is no such token.

        Some tokenizers drop the leading space of the ``first`` token of a text.
        """
        key = id, first and self._plan.drop_first
        if key not in self._bytes:
            token = self.id_to_token(id)
            self._bytes[key] = self._plan.convert(token, key[1]) if token is not None else None
        return self._bytes[key]


def _with_settings(raw: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `tokenizer.json` with the tokens that only `tokenizer_config.json` names."""
    try:
        added = raw.get("added_tokens") or []
        words = raw["model"]["vocab"]
        vocabulary = words if isinstance(words, dict) else {word: id for id, (word, _) in enumerate(words)}
        return {**raw, "added_tokens": merged(added, settings, vocabulary)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"its added tokens, or those of tokenizer_config.json, are no tokens ({error!r})"
        ) from None


def _valid(text: str) -> str:
    """`text` without the lone surrogates that JSON lets through."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
