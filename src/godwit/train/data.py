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

NO_TARGET = 4  # role code where a document ends and nothing is to be predicted
_POOL = 48  # documents looked at when a row's remainder is filled


def learned(roles: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where the model speaks: text and answers (code 0) and tool calls (3), not users (1) or the rest (2)."""
    mask: np.ndarray[Any, Any] = (roles == 0) | (roles == 3)
    return mask


@dataclass(frozen=True)
class TokenSource:
    """Documents of one source, memory-mapped: tokens, role codes and where each document begins."""

    name: str
    tokens: np.ndarray[Any, Any]
    roles: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]

    @staticmethod
    def open(directory: str | Path, name: str) -> TokenSource:
        """Raises: UsageError: files missing or not belonging together."""
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
                raise UsageError(f"{file}: not a whole array of NumPy; prepare the data again") from error
        source = TokenSource(name, *arrays)
        if not source._is_sound():
            raise UsageError(
                f"{directory}: the files of source {name!r} do not belong together; prepare them again"
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
    """A micro-batch: rows of packed documents, with what each token should predict.

    Attributes:
        input_ids: ``[rows * row_length]``.
        lengths: tokens of each document piece, none crossing a row.
        targets: the next token of each, and ``targets2`` the one after (for MTP); 0 where there is none.
        roles, roles2: role code of each target; NO_TARGET where there is none.
    """

    input_ids: Tensor
    lengths: list[int]
    targets: Tensor
    targets2: Tensor
    roles: Tensor
    roles2: Tensor


class RowSampler:
    """Draws documents by token share and packs them into rows; its state is small and exact."""

    def __init__(self, sources: Mapping[str, TokenSource], row_length: int, rows: int, seed: int) -> None:
        self.sources = dict(sources)
        self.row_length = row_length
        self.rows = rows
        self.seed = seed
        self.drawn = dict.fromkeys(self.sources, 0)  # documents taken of each source
        self.tokens = dict.fromkeys(self.sources, 0)  # tokens taken of each source in this stage
        self.pool: list[tuple[str, int]] = []  # documents waiting for a place: source and number
        self._orders: dict[tuple[str, int], np.ndarray[Any, Any]] = {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; plain numbers and strings."""
        return {"drawn": dict(self.drawn), "tokens": dict(self.tokens), "pool": [list(p) for p in self.pool]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state` was taken."""
        self.drawn.update({name: state["drawn"][name] for name in self.sources if name in state["drawn"]})
        self.tokens.update({name: state["tokens"][name] for name in self.sources if name in state["tokens"]})
        self.pool = [(str(name), int(index)) for name, index in state["pool"] if name in self.sources]

    def start_stage(self) -> None:
        """Forget waiting documents and shares, so that a new mix takes effect at once."""
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
        """The oldest waiting document while there is room, then the longest that fits, else the shortest."""
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
        """The next document of the source that is furthest behind its share."""
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
    """Targets and their roles for packed documents; the last token of a document has none."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    codes = torch.from_numpy(roles.astype(np.int64))
    ends = torch.tensor(lengths).cumsum(0)
    # tokens from each one to the end of its piece
    left = torch.repeat_interleave(ends, torch.tensor(lengths)) - torch.arange(len(ids))

    def shifted(step: int) -> tuple[Tensor, Tensor]:
        inside = left > step
        target = torch.where(inside, tokens.roll(-step), 0)
        return target, torch.where(inside, codes.roll(-step), NO_TARGET)

    targets, target_roles = shifted(1)
    targets2, target_roles2 = shifted(2)
    return PackedBatch(tokens, lengths, targets, targets2, target_roles, target_roles2)
