"""Pools of blocks and rows: who uses which, and how many bytes they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.batch import BLOCK_SIZE
from godwit.models.causal_lm import CausalLM


class BlockPool:
    """Reference-counted blocks, by number."""

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
        """Take ``count`` free blocks; each then has one user.

        Raises:
            MemoryBudgetError: fewer are free; none is taken.
        """
        if count > len(self._free):
            raise MemoryBudgetError(
                f"{count} more blocks of {BLOCK_SIZE} tokens are needed, but only {self.num_free} of "
                f"{self.num_blocks} are free; shorten the text or allow more memory"
            )
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def num_users(self, block: int) -> int:
        return self._users[block]

    def share(self, blocks: Iterable[int]) -> None:
        """Add a user to each of these blocks, which must be in use."""
        for block in blocks:
            self._refuse_free(block)
            self._users[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Remove a user from each of these blocks; without users, a block is free."""
        for block in blocks:
            self._refuse_free(block)
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Check that each block has as many users as it occurs in ``held``, and is free without any.

        Raises:
            RuntimeError: it does not, which is a bug.
        """
        counted = Counter(held)
        if sorted(self._free) != [block for block, users in enumerate(self._users) if not users]:
            raise RuntimeError("the list of free blocks does not match their users")
        for block, users in enumerate(self._users):
            if counted[block] != users:
                raise RuntimeError(f"block {block} counts {users} users, but {counted[block]} hold it")

    def _refuse_free(self, block: int) -> None:
        if not self._users[block]:
            raise UsageError(f"block {block} is already free")


class StatePool:
    """Rows by number, each with at most one owner."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """Take a free row.

        Raises:
            MemoryBudgetError: none is free.
        """
        if not self._free:
            raise MemoryBudgetError(f"all {self.num_rows} rows are in use; end a sequence first")
        return self._free.pop()

    def free(self, row: int) -> None:
        """Return a row."""
        if row in self._free:
            raise UsageError(f"row {row} is already free")
        self._free.append(row)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Check that each row is either free or occurs once in ``held``.

        Raises:
            RuntimeError: it does not, which is a bug.
        """
        if sorted([*self._free, *held]) != list(range(self.num_rows)):
            raise RuntimeError("a row of the state pool is lost, or has two owners")


@dataclass(frozen=True)
class CacheSize:
    """Bytes that the caches of a model take per block of 16 tokens and per sequence."""

    per_block: int
    per_row: int

    @staticmethod
    def of(model: CausalLM, max_rollback: int = 0) -> CacheSize:
        """The sizes for ``model``; each token that may be undone adds to the rows."""
        specs = model.cache_specs()
        return CacheSize(
            sum(spec.bytes_per_token for spec in specs) * BLOCK_SIZE,
            sum(spec.bytes_per_sequence + max_rollback * spec.journal_bytes for spec in specs),
        )

    def total(self, num_tokens: int, num_rows: int = 1) -> int:
        """Bytes for ``num_rows`` sequences of ``num_tokens`` tokens each."""
        return num_rows * (self.per_row + num_blocks(num_tokens) * self.per_block)

    def check(self, num_tokens: int, max_bytes: int | None) -> None:
        """Check that a sequence of ``num_tokens`` tokens fits ``max_bytes``; None is no limit.

        Raises:
            MemoryBudgetError: it does not.
        """
        needed = self.total(num_tokens)
        if max_bytes is not None and needed > max_bytes:
            fitting = self.tokens_within(max_bytes, num_tokens)
            raise MemoryBudgetError(
                f"{num_tokens} tokens of context take {needed / 2**20:.1f} MiB "
                f"({self.per_block / 2**10:.1f} KiB for {BLOCK_SIZE} tokens, {self.per_row / 2**10:.1f} KiB "
                f"a sequence), but {max_bytes / 2**20:.1f} MiB may be used: ask for {fitting} tokens or fewer"
            )

    def tokens_within(self, num_bytes: int, wanted: int) -> int:
        """How many of ``wanted`` tokens of one sequence fit, perhaps 0."""
        if self.total(wanted) <= num_bytes:
            return wanted
        return max(0, (num_bytes - self.per_row) // self.per_block) * BLOCK_SIZE if self.per_block else 0


def num_blocks(num_tokens: int) -> int:
    """Number of blocks for ``num_tokens`` tokens."""
    return -(-num_tokens // BLOCK_SIZE)
