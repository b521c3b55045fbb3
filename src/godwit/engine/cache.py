"""Who owns which part of the caches: blocks of paged keys and values, and rows of recurrent state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
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


@dataclass
class CachedSequence:
    """What one sequence owns: a row, and blocks for ``num_tokens`` tokens."""

    row: int
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0


class HybridCache:
    """The caches of a model and who owns them.

    A step is: :meth:`extend` each sequence, run the model on :meth:`batch`. Sequences go by the numbers that
    :meth:`add_sequence` gives.

    Args:
        model: allocates the tensors.
        num_blocks: blocks of 16 tokens, for all sequences together.
        num_rows: sequences at a time.
        max_rollback: how many tokens of a step may be undone where the model has a recurrent state.
    """

    def __init__(self, model: CausalLM, num_blocks: int, num_rows: int = 1, *, max_rollback: int = 0) -> None:
        self.caches = model.allocate_caches(num_blocks, num_rows, max_rollback)
        self.can_crop = not self.caches.recurrent()
        self.blocks = BlockPool(num_blocks)
        self.rows = StatePool(num_rows)
        self._device = model.device
        self._sequences: dict[int, CachedSequence] = {}
        self._next = 0

    @staticmethod
    def sized(
        model: CausalLM,
        max_tokens: int,
        *,
        max_bytes: int | None = None,
        num_sequences: int = 1,
        max_rollback: int = 0,
    ) -> HybridCache:
        """Caches for ``num_sequences`` sequences of ``max_tokens`` tokens, within ``max_bytes`` where given.

        Raises:
            MemoryBudgetError: they do not fit.
        """
        size = CacheSize.of(model, max_rollback)
        needed = size.total(max_tokens, num_sequences)
        if max_bytes is not None and needed > max_bytes:
            fitting = size.tokens_within(max_bytes, num_sequences, max_tokens)
            raise MemoryBudgetError(
                f"{num_sequences} x {max_tokens} tokens of context take {needed / 2**20:.1f} MiB "
                f"({size.per_block / 2**10:.1f} KiB for {BLOCK_SIZE} tokens, {size.per_row / 2**10:.1f} KiB "
                f"a sequence), but {max_bytes / 2**20:.1f} MiB may be used: ask for {fitting} tokens or fewer"
            )
        blocks = num_sequences * num_blocks(max_tokens)
        return HybridCache(model, blocks, num_sequences, max_rollback=max_rollback)

    def add_sequence(self) -> int:
        """A new, empty sequence.

        Raises:
            MemoryBudgetError: all rows are taken.
        """
        row = self.rows.allocate()
        self.caches.reset_row(row)
        self._next += 1
        self._sequences[self._next] = CachedSequence(row)
        return self._next

    def num_tokens(self, seq: int) -> int:
        """Tokens of ``seq`` that have a place in the caches."""
        return self._sequences[seq].num_tokens

    def extend(self, seq: int, count: int) -> None:
        """Make room for ``count`` more tokens of ``seq``.

        Raises:
            MemoryBudgetError: not enough free blocks; then nothing changes.
        """
        owner = self._sequences[seq]
        owner.blocks += self.blocks.allocate(num_blocks(owner.num_tokens + count) - len(owner.blocks))
        owner.num_tokens += count

    def batch(
        self, pieces: Mapping[int, Sequence[int]], num_tentative: Sequence[int] | None = None
    ) -> ForwardBatch:
        """The step that runs ``pieces``: sequence -> its newest ids, for which it was extended."""
        owners = [self._sequences[seq] for seq in pieces]
        return ForwardBatch.cached(
            list(pieces.values()),
            [owner.num_tokens - len(piece) for owner, piece in zip(owners, pieces.values(), strict=True)],
            [owner.blocks for owner in owners],
            [owner.row for owner in owners],
            num_tentative,
            self._device,
        )

    def rollback(self, seq: int, count: int) -> None:
        """Forget the last ``count`` tokens of ``seq`` and return the blocks that held only them.

        Raises:
            UsageError: more than there are or, with a recurrent state, more than the last step left undoable.
        """
        owner = self._sequences[seq]
        if not 0 <= count <= owner.num_tokens:
            raise UsageError(f"cannot undo {count} tokens: the sequence has {owner.num_tokens}")
        if not self.can_crop:
            self.caches.rollback(owner.row, count)
        owner.num_tokens -= count
        kept = num_blocks(owner.num_tokens)
        dropped, owner.blocks = owner.blocks[kept:], owner.blocks[:kept]
        self.blocks.free(dropped[::-1])

    def free(self, seq: int) -> None:
        """End ``seq`` and return all it owns."""
        owner = self._sequences.pop(seq)
        self.blocks.free(owner.blocks[::-1])
        self.rows.free(owner.row)

    def check_integrity(self) -> None:
        """Every block and row is free or owned exactly once, and sequences own just the blocks they fill.

        Raises:
            RuntimeError: it is not so, which is a fault of the program.
        """
        owners = self._sequences.values()
        self.blocks.check_integrity(block for owner in owners for block in owner.blocks)
        self.rows.check_integrity(owner.row for owner in owners)
        for seq, owner in self._sequences.items():
            if len(owner.blocks) != num_blocks(owner.num_tokens):
                raise RuntimeError(
                    f"sequence {seq} of {owner.num_tokens} tokens owns {len(owner.blocks)} blocks"
                )
