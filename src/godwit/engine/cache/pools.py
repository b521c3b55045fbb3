"""Blocks and rows by number, who uses them, and how many bytes they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.batch import BLOCK_SIZE
from godwit.models.caches import PagedKVSpec, RecurrentSpec
from godwit.models.causal_lm import CausalLM


class BlockPool:
    """Blocks by number; a block is free again when nobody uses it any more."""

    def __init__(self, num_blocks: int) -> None:
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks))[::-1]

    @property
    def num_blocks(self) -> int:
        return len(self._users)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` free blocks, now with one user each.

        Raises:
            MemoryBudgetError: there are fewer; then none is taken.
        """
        if count > len(self._free):
            raise MemoryBudgetError(
                f"{count} more blocks of {BLOCK_SIZE} tokens are needed, and of {self.num_blocks} only "
                f"{self.num_free} are free; shorten the text or allow more memory"
            )
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def num_users(self, block: int) -> int:
        return self._users[block]

    def share(self, blocks: Iterable[int]) -> None:
        """Give each of these used blocks one more user."""
        for block in blocks:
            self._refuse_free(block)
            self._users[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take one user from each of these blocks."""
        for block in blocks:
            self._refuse_free(block)
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Every block is either free or has as many users as ``held`` names it.

        Raises:
            RuntimeError: it is not so, which is a fault of the program.
        """
        counted = Counter(held)
        if sorted(self._free) != [block for block, users in enumerate(self._users) if not users]:
            raise RuntimeError("the list of free blocks contradicts their users")
        for block, users in enumerate(self._users):
            if counted[block] != users:
                raise RuntimeError(f"block {block} counts {users} users but is held {counted[block]} times")

    def _refuse_free(self, block: int) -> None:
        if not self._users[block]:
            raise UsageError(f"block {block} is free already")


class StatePool:
    """Rows by number; each has at most one owner."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A free row.

        Raises:
            MemoryBudgetError: all are taken.
        """
        if not self._free:
            raise MemoryBudgetError(f"all {self.num_rows} sequences that fit are in use; end one first")
        return self._free.pop()

    def free(self, row: int) -> None:
        """Give a row back."""
        if row in self._free:
            raise UsageError(f"row {row} is free already")
        self._free.append(row)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Every row is free or named once in ``held``.

        Raises:
            RuntimeError: it is not so, which is a fault of the program.
        """
        if sorted([*self._free, *held]) != list(range(self.num_rows)):
            raise RuntimeError("a row of the state pool is lost, or has two owners")


@dataclass(frozen=True)
class CacheSize:
    """Bytes that the caches of a model take: per block of 16 tokens, and per sequence."""

    per_block: int
    per_row: int

    @staticmethod
    def of(model: CausalLM, max_rollback: int = 0) -> CacheSize:
        """The sizes for ``model``; each token that can be undone takes room in the rows."""
        per_block = per_row = 0
        for spec in model.cache_specs():
            if isinstance(spec, PagedKVSpec):
                per_block += spec.bytes_per_token * BLOCK_SIZE
            else:
                per_row += spec.bytes_per_sequence + max_rollback * _journal_bytes(spec)
        return CacheSize(per_block, per_row)

    def total(self, num_tokens: int, num_rows: int = 1) -> int:
        """Bytes for ``num_rows`` sequences of ``num_tokens`` tokens each."""
        return num_rows * (self.per_row + num_blocks(num_tokens) * self.per_block)

    def tokens_within(self, num_bytes: int, num_rows: int, wanted: int) -> int:
        """How many of ``wanted`` tokens fit for each of ``num_rows`` sequences; may be 0."""
        if self.total(wanted, num_rows) <= num_bytes:
            return wanted
        left = num_bytes - num_rows * self.per_row
        return max(0, left // (num_rows * self.per_block)) * BLOCK_SIZE if self.per_block else 0


def _journal_bytes(spec: RecurrentSpec) -> int:
    written = spec.num_heads * (1 + spec.head_k_dim + spec.head_v_dim) * 4
    return written + spec.conv_dim * spec.conv_dtype.itemsize


def num_blocks(num_tokens: int) -> int:
    """Blocks that hold ``num_tokens`` tokens."""
    return -(-num_tokens // BLOCK_SIZE)
