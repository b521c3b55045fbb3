"""ForwardBatch: the tokens of a forward pass, and the location of each sequence's caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from godwit.errors import UsageError

BLOCK_SIZE = 16  # tokens of paged KV in a block


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of S sequences packed on one axis of T.

    Training on packed documents, prefill, chunked prefill, decode and draft verification all take this form.

    Attributes:
        input_ids: ``[T]`` int64.
        positions: ``[T]`` int64, position of each token in its sequence.
        cu_seqlens: S + 1 boundaries on the packed axis, the first is 0.
        seq_lens: S context lengths, this step's tokens included.
        slot_mapping: ``[T]`` int64, flat slot in the paged KV of each token; None without caches.
        block_tables: ``[S, blocks]`` int64, blocks of each sequence in order; None without caches.
        state_indices: S rows in the state pool; empty without caches.
        num_tentative: how many of each sequence's last tokens may be rolled back after this step.
        row_length: training only: the packed axis consists of rows of this many tokens, and no sequence spans
            two rows; otherwise 0.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    slot_mapping: Tensor | None = None
    block_tables: Tensor | None = None
    state_indices: tuple[int, ...] = ()
    num_tentative: tuple[int, ...] = ()
    row_length: int = 0

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence in this step."""
        return [end - start for start, end in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)]

    @cached_property
    def last_rows(self) -> Tensor | None:
        """Index of the last token of each sequence, ``[S]``; None if every token is a last one."""
        if len(self.seq_lens) == len(self.input_ids):
            return None
        return torch.tensor([end - 1 for end in self.cu_seqlens[1:]], device=self.input_ids.device)

    @staticmethod
    def packed(input_ids: Tensor, lengths: Sequence[int], row_length: int = 0) -> ForwardBatch:
        """Whole sequences without caches: training, scoring."""
        if sum(lengths) != input_ids.shape[0]:
            raise UsageError(
                f"{input_ids.shape[0]} tokens cannot be split into sequences of total {sum(lengths)}"
            )
        counts = torch.tensor(lengths, dtype=torch.long)
        starts = counts.cumsum(0) - counts
        positions = torch.arange(int(counts.sum())) - torch.repeat_interleave(starts, counts)
        ends = tuple(accumulate(lengths, initial=0))
        return ForwardBatch(
            input_ids, positions.to(input_ids.device), ends, tuple(lengths), row_length=row_length
        )

    @staticmethod
    def cached(
        pieces: Sequence[Sequence[int]],
        past: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        state_indices: Sequence[int],
        num_tentative: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> ForwardBatch:
        """The next tokens of sequences with ``past`` tokens in the caches."""
        lengths = [len(piece) for piece in pieces]
        positions = [start + i for start, length in zip(past, lengths, strict=True) for i in range(length)]
        slots = [
            table[(start + i) // BLOCK_SIZE] * BLOCK_SIZE + (start + i) % BLOCK_SIZE
            for table, start, length in zip(block_tables, past, lengths, strict=True)
            for i in range(length)
        ]
        width = max((len(table) for table in block_tables), default=0)
        padded = [list(table) + [0] * (width - len(table)) for table in block_tables]
        flat = [token for piece in pieces for token in piece]

        def tensor(data: object) -> Tensor:
            return torch.tensor(data, dtype=torch.long, device=device)

        return ForwardBatch(
            tensor(flat),
            tensor(positions),
            tuple(accumulate(lengths, initial=0)),
            tuple(start + length for start, length in zip(past, lengths, strict=True)),
            tensor(slots),
            tensor(padded),
            tuple(state_indices),
            tuple(num_tentative) if num_tentative is not None else (0,) * len(lengths),
        )
