"""Tokenise chats and texts in worker processes, and write the token files."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from godwit.text.tokenizer import Tokenizer
from godwit.train.data import learned
from recipes.default.common import Chat

MAX_TOKENS = 2048
CALL = 3  # role code of tool calls; the tokenizer assigns the others
Doc = tuple["NDArray[np.uint16]", "NDArray[np.uint8]", int]


@dataclass(frozen=True)
class Stats:
    """Statistics of one source written."""

    docs: int
    tokens: int
    learned: int
    text_bytes: int


class Encoder:
    """Tokenises documents so that each has at most `max_tokens` tokens."""

    def __init__(self, folder: Path, max_tokens: int = MAX_TOKENS) -> None:
        self.tokenizer = Tokenizer.from_dir(folder)
        self.max_tokens = max_tokens
        end = self.tokenizer.token_to_id("<|endoftext|>")
        if end is None:
            raise ValueError(f"{folder}: the tokenizer has no <|endoftext|>")
        self.end = end
        self.call = tuple(self.tokenizer.token_to_id(mark) for mark in ("<tool_call>", "</tool_call>"))
        # In a byte-level vocabulary each character of a token's spelling stands for one byte.
        spelling = [self.tokenizer.id_to_token(id) or "" for id in range(self.tokenizer.vocab_size)]
        self.num_bytes = np.asarray([len(text) for text in spelling], np.int64)
        self.num_bytes[list(self.tokenizer.special_ids)] = 0

    def chat(self, chat: Chat) -> list[Doc]:
        """The conversation as one document; if too long, first without spare tools, then without its last turns.

        Empty if even its first exchange does not fit.
        """
        messages, tools, spare = list(chat.messages), list(chat.tools), list(chat.spare)
        while True:
            ids, roles = self.tokenizer.encode_chat_with_roles(messages, tools=tools or None)
            if len(ids) <= self.max_tokens:
                return [self._doc(ids, self._mark_calls(ids, roles))]
            if spare:
                name = spare.pop()
                tools = [tool for tool in tools if tool["function"]["name"] != name]
            elif not cut(messages):
                return []

    def _mark_calls(self, ids: Sequence[int], roles: Sequence[int]) -> list[int]:
        """``roles`` with code 3 for the assistant's tokens after `<tool_call>` up to `</tool_call>`."""
        marked, inside = list(roles), False
        for index, token in enumerate(ids):
            if roles[index] != 0:
                inside = False
            elif inside:
                marked[index] = CALL
            if roles[index] == 0 and token in self.call:
                inside = token == self.call[0]
        return marked

    def text(self, text: str) -> list[Doc]:
        """Plain text as one or more documents, split between paragraphs; each ends with `<|endoftext|>`."""
        lines = [line + "\n" for line in text.split("\n")]
        lines[-1] = lines[-1].rstrip("\n")
        encoded = [ids for line in lines for ids in self._pieces(self.tokenizer.encode(line))]
        docs: list[Doc] = []
        current: list[int] = []
        for ids in encoded:
            if current and len(current) + len(ids) >= self.max_tokens:
                docs.append(self._doc([*current, self.end], [0] * (len(current) + 1)))
                current = []
            current += ids
        return [*docs, self._doc([*current, self.end], [0] * (len(current) + 1))]

    def _pieces(self, ids: list[int]) -> list[list[int]]:
        step = self.max_tokens - 1
        return [ids[start : start + step] for start in range(0, len(ids), step)]

    def _doc(self, ids: Sequence[int], roles: Sequence[int]) -> Doc:
        tokens, codes = np.asarray(ids, np.uint16), np.asarray(roles, np.uint8)
        return tokens, codes, int(self.num_bytes[tokens[learned(codes)]].sum())


def cut(messages: list[dict[str, object]]) -> bool:
    """Drop messages from the end up to an earlier answer that is not a call; False if there is none."""
    for index in range(len(messages) - 2, 0, -1):
        if messages[index]["role"] == "assistant" and not messages[index].get("tool_calls"):
            del messages[index + 1 :]
            return True
    return False


_encoder: list[Encoder] = []


def _start(folder: Path, max_tokens: int) -> None:
    _encoder[:] = [Encoder(folder, max_tokens)]


def _work(item: Chat | str) -> list[Doc]:
    return _encoder[0].chat(item) if isinstance(item, Chat) else _encoder[0].text(item)


class Workers:
    """Two processes that tokenise."""

    def __init__(self, folder: Path, max_tokens: int = MAX_TOKENS, processes: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = context.Pool(processes, _start, (folder, max_tokens))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.terminate()
        self.pool.join()

    def encode(self, items: Iterable[Chat | str]) -> Iterator[list[Doc]]:
        """The documents of each item, in order."""
        return self.pool.imap(_work, items, chunksize=32)


def write(out: Path, name: str, docs: Iterable[Doc], *, with_bytes: bool = False) -> Stats:
    """Write `<name>.tokens.npy` (uint16), `.roles.npy` (uint8) and `.offsets.npy` (int64, one more than documents).

    With `with_bytes` also `.bytes.npy` (int64): the UTF-8 bytes of each document's learned tokens, without special ones.
    """
    kept = list(docs)
    tokens = np.concatenate([doc[0] for doc in kept]) if kept else np.zeros(0, np.uint16)
    roles = np.concatenate([doc[1] for doc in kept]) if kept else np.zeros(0, np.uint8)
    sizes = np.asarray([doc[2] for doc in kept], np.int64)
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum([len(doc[0]) for doc in kept], out=offsets[1:])
    for part, array in (("tokens", tokens), ("roles", roles), ("offsets", offsets)):
        np.save(out / f"{name}.{part}.npy", array)
    if with_bytes:
        np.save(out / f"{name}.bytes.npy", sizes)
    return Stats(len(kept), len(tokens), int(learned(roles).sum()), int(sizes.sum()))
