"""Who owns which part of the caches: blocks of paged keys and values, and rows of recurrent state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.models.caches import PagedKV, PagedKVSpec, RecurrentSpec
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

    def check(self, num_tokens: int, num_rows: int, max_bytes: int | None) -> None:
        """Check that ``num_rows`` sequences of ``num_tokens`` tokens fit ``max_bytes``; None is no limit.

        Raises:
            MemoryBudgetError: they do not.
        """
        needed = self.total(num_tokens, num_rows)
        if max_bytes is not None and needed > max_bytes:
            fitting = self.tokens_within(max_bytes, num_rows, num_tokens)
            raise MemoryBudgetError(
                f"{num_rows} x {num_tokens} tokens of context take {needed / 2**20:.1f} MiB "
                f"({self.per_block / 2**10:.1f} KiB for {BLOCK_SIZE} tokens, {self.per_row / 2**10:.1f} KiB "
                f"a sequence), but {max_bytes / 2**20:.1f} MiB may be used: ask for {fitting} tokens or fewer"
            )

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


@dataclass(frozen=True)
class StateSnapshot:
    """A copy of the row of one sequence in all delta layers, on the host; an attention layer has none.

    Attributes:
        tensors: for each delta layer the newest inputs of its convolution, its state, and its journal.
        pending: tokens in the journal.
    """

    tensors: tuple[Tensor, ...]
    pending: int = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


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
        size.check(max_tokens, num_sequences, max_bytes)
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

    def blocks_of(self, seq: int) -> list[int]:
        """The blocks of ``seq`` in order."""
        return self._sequences[seq].blocks

    def sequences(self) -> list[int]:
        """The numbers of all sequences, ascending."""
        return sorted(self._sequences)

    def num_owned(self, besides: Iterable[int] = ()) -> int:
        """Blocks that at least one sequence uses, or that are among ``besides``."""
        owned = {block for owner in self._sequences.values() for block in owner.blocks}
        return len(owned.union(besides))

    def adopt(self, seq: int, blocks: Sequence[int], num_tokens: int) -> None:
        """Begin the empty ``seq`` with ``num_tokens`` tokens in ``blocks``, as one more user of them."""
        owner = self._sequences[seq]
        if owner.blocks or len(blocks) != num_blocks(num_tokens):
            raise UsageError(f"{len(blocks)} blocks of {num_tokens} tokens cannot begin a sequence")
        self.blocks.share(blocks)
        owner.blocks, owner.num_tokens = list(blocks), num_tokens

    def replace_block(self, seq: int, index: int, block: int) -> None:
        """Let ``seq`` use ``block`` instead of its own at ``index``, which holds the same."""
        owner = self._sequences[seq]
        self.blocks.share([block])
        self.blocks.free([owner.blocks[index]])
        owner.blocks[index] = block

    def copy_block(self, source: int, target: int) -> None:
        """Give ``target`` the keys and values of ``source``."""
        for layer in (*self.caches.layers, *self.caches.mtp):
            if isinstance(layer, PagedKV):
                layer.k[target].copy_(layer.k[source])
                layer.v[target].copy_(layer.v[source])

    def snapshot(self, seq: int) -> StateSnapshot:
        """The recurrent state of ``seq`` as it is now."""
        row = self._sequences[seq].row
        pending = self.caches.pending[row]
        tensors = []
        for layer in self.caches.recurrent():
            window = layer.conv[row, layer.conv.shape[1] - layer.history :]
            tensors += [window, layer.state[row]]
            if pending:
                journal = (layer.journal_g, layer.journal_k, layer.journal_delta)
                tensors += [part[row, :pending] for part in journal]
        return StateSnapshot(tuple(tensor.to("cpu", copy=True) for tensor in tensors), pending)

    def accepts(self, snapshot: StateSnapshot) -> bool:
        """Whether a snapshot that came from elsewhere has the form of this model's."""
        if not 0 <= snapshot.pending <= self.caches.max_rollback:
            return False
        wanted = []
        for layer in self.caches.recurrent():
            parts = [layer.conv[0, layer.conv.shape[1] - layer.history :], layer.state[0]]
            if snapshot.pending:
                parts += [
                    p[0, : snapshot.pending] for p in (layer.journal_g, layer.journal_k, layer.journal_delta)
                ]
            wanted += [(part.shape, part.dtype) for part in parts]
        return wanted == [(tensor.shape, tensor.dtype) for tensor in snapshot.tensors]

    def restore(self, seq: int, snapshot: StateSnapshot) -> None:
        """Set the recurrent state of ``seq`` to that of a sequence of equal tokens."""
        row = self._sequences[seq].row
        saved = iter(snapshot.tensors)
        self.caches.pending[row] = snapshot.pending
        for layer in self.caches.recurrent():
            layer.conv[row, layer.conv.shape[1] - layer.history :] = next(saved)
            layer.state[row] = next(saved)
            if snapshot.pending:
                for part in (layer.journal_g, layer.journal_k, layer.journal_delta):
                    part[row, : snapshot.pending] = next(saved)

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

    def check_integrity(self, held: Iterable[int] = ()) -> None:
        """Every block and row is free or known to its owners, and sequences own just the blocks they fill.

        Args:
            held: blocks that others hold, each as often as they do.

        Raises:
            RuntimeError: it is not so, which is a fault of the program.
        """
        owners = self._sequences.values()
        self.blocks.check_integrity([*held, *(block for owner in owners for block in owner.blocks)])
        self.rows.check_integrity(owner.row for owner in owners)
        for seq, owner in self._sequences.items():
            if len(owner.blocks) != num_blocks(owner.num_tokens):
                raise RuntimeError(
                    f"sequence {seq} of {owner.num_tokens} tokens owns {len(owner.blocks)} blocks"
                )
