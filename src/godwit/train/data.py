"""Packed batches from pre-tokenised sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from godwit.errors import UsageError

NO_TARGET = 4  # role code at the end of a document, where there is nothing to predict
_POOL = 48  # documents considered when filling the rest of a row


def learned(roles: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mask of the tokens to learn: text and answers (code 0) and tool calls (3)."""
    mask: np.ndarray[Any, Any] = (roles == 0) | (roles == 3)
    return mask


@dataclass(frozen=True)
class TokenSource:
    """Documents of one source, memory-mapped: tokens, role codes and document offsets."""

    name: str
    tokens: np.ndarray[Any, Any]
    roles: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]

    @staticmethod
    def open(directory: str | Path, name: str) -> TokenSource:
        """Raises: UsageError: a file is missing, or the files do not match."""
        arrays = []
        for part in ("tokens", "roles", "offsets"):
            file = Path(directory) / f"{name}.{part}.npy"
            if not file.is_file():
                raise UsageError(
                    f"{file}: no such file; prepare the data first or fix the recipe's data directory"
                )
            try:
                arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
            except (ValueError, EOFError, OSError) as error:
                raise UsageError(f"{file}: not a complete NumPy array; prepare the data again") from error
        source = TokenSource(name, *arrays)
        if not source._is_sound():
            raise UsageError(
                f"{directory}: the files of source {name!r} do not match; prepare the data again"
            )
        return source

    def _is_sound(self) -> bool:
        ends = self.offsets
        whole = len(ends) >= 2 and len(self.tokens) == len(self.roles) == int(ends[-1]) and int(ends[0]) == 0
        return whole and bool((np.diff(ends) > 0).all()) and int(self.roles.max()) < NO_TARGET

    @property
    def num_docs(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Tokens and role codes of one document."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.roles[span]


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch: rows of packed documents, with the targets of each token.

    Attributes:
        input_ids: ``[rows * row_length]``.
        lengths: tokens of each piece of a document; no piece crosses a row.
        targets, targets2: the next token, and the one after it (for MTP); 0 if there is none.
        roles, roles2: role code of each target; NO_TARGET if there is none.
    """

    input_ids: Tensor
    lengths: list[int]
    targets: Tensor
    targets2: Tensor
    roles: Tensor
    roles2: Tensor


class RowSampler:
    """Draws documents by token share and packs them into rows; it can resume exactly from a small state."""

    def __init__(self, sources: Mapping[str, TokenSource], row_length: int, rows: int, seed: int) -> None:
        self.sources = dict(sources)
        self.row_length = row_length
        self.rows = rows
        self.seed = seed
        self.drawn = dict.fromkeys(self.sources, 0)  # documents drawn from each source
        self.tokens = dict.fromkeys(self.sources, 0)  # tokens drawn from each source in this stage
        self.pool: list[tuple[str, int]] = []  # documents waiting to be packed: source and index
        self._orders: dict[tuple[str, int], np.ndarray[Any, Any]] = {}

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs, as plain numbers and strings."""
        return {"drawn": dict(self.drawn), "tokens": dict(self.tokens), "pool": [list(p) for p in self.pool]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        self.drawn.update({name: state["drawn"][name] for name in self.sources if name in state["drawn"]})
        self.tokens.update({name: state["tokens"][name] for name in self.sources if name in state["tokens"]})
        self.pool = [(str(name), int(index)) for name, index in state["pool"] if name in self.sources]

    def start_stage(self) -> None:
        """Discard the pool and the token counts, so that a new mix takes effect at once."""
        self.tokens = dict.fromkeys(self.tokens, 0)
        self.pool = []

    def batch(self, mix: Mapping[str, float]) -> PackedBatch:
        """The next micro-batch under ``mix``."""
        ids, roles, lengths = [], [], []
        for _ in range(self.rows):
            left = self.row_length
            while left:
                tokens, codes = self._next(mix, left)
                piece = min(left, len(tokens))
                ids.append(tokens[:piece])
                roles.append(codes[:piece])
                lengths.append(piece)
                left -= piece
        return finish_batch(np.concatenate(ids), np.concatenate(roles), lengths)

    def _next(self, mix: Mapping[str, float], left: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The oldest waiting document if it fits, else the longest that fits, else the shortest."""
        while len(self.pool) < _POOL:
            self.pool.append(self._draw(mix))
        sizes = [self._size(name, index) for name, index in self.pool]
        fitting = [i for i, size in enumerate(sizes) if size <= left]
        if sizes[0] <= left:
            pick = 0
        elif fitting:
            pick = max(fitting, key=sizes.__getitem__)
        else:
            pick = min(range(len(sizes)), key=sizes.__getitem__)
        name, index = self.pool.pop(pick)
        tokens, roles = self.sources[name].document(index)
        return tokens[: self.row_length], roles[: self.row_length]

    def _size(self, name: str, index: int) -> int:
        offsets = self.sources[name].offsets
        return min(int(offsets[index + 1] - offsets[index]), self.row_length)

    def _draw(self, mix: Mapping[str, float]) -> tuple[str, int]:
        """The next document of the source furthest behind its share."""
        name = min((n for n in mix if mix[n] > 0), key=lambda n: self.tokens[n] / mix[n])
        epoch, place = divmod(self.drawn[name], self.sources[name].num_docs)
        index = int(self._order(name, epoch)[place])
        self.drawn[name] += 1
        self.tokens[name] += self._size(name, index)
        return name, index

    def _order(self, name: str, epoch: int) -> np.ndarray[Any, Any]:
        key = (name, epoch)
        if key not in self._orders:
            label = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
            rng = np.random.default_rng([self.seed, label, epoch])
            self._orders = {k: v for k, v in self._orders.items() if k[0] != name}
            self._orders[key] = rng.permutation(self.sources[name].num_docs)
        return self._orders[key]


def finish_batch(ids: np.ndarray[Any, Any], roles: np.ndarray[Any, Any], lengths: list[int]) -> PackedBatch:
    """Add targets and their roles to packed documents; the last token of a document has no target."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    codes = torch.from_numpy(roles.astype(np.int64))
    ends = torch.tensor(lengths).cumsum(0)
    # tokens left in the piece, from each token on
    left = torch.repeat_interleave(ends, torch.tensor(lengths)) - torch.arange(len(ids))

    def shifted(step: int) -> tuple[Tensor, Tensor]:
        inside = left > step
        target = torch.where(inside, tokens.roll(-step), 0)
        return target, torch.where(inside, codes.roll(-step), NO_TARGET)

    targets, target_roles = shifted(1)
    targets2, target_roles2 = shifted(2)
    return PackedBatch(tokens, lengths, targets, targets2, target_roles, target_roles2)
