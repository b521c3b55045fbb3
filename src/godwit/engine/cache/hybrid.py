"""HybridCache: which sequence owns which blocks of keys and values, and which row of recurrent state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from godwit.engine.cache.pools import BlockPool, StatePool, num_blocks
from godwit.errors import UsageError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM


@dataclass(frozen=True)
class StateSnapshot:
    """A host copy of the recurrent state of one sequence in all delta layers.

    Attributes:
        tensors: for each delta layer the last inputs of its convolution, its state, and its journal.
        pending: tokens in the journal.
    """

    tensors: tuple[Tensor, ...]
    pending: int = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass
class CachedSequence:
    """The row of a sequence, and its blocks for ``num_tokens`` tokens."""

    row: int
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0


class HybridCache:
    """The caches of a model, and the sequences that own parts of them.

    For each step call :meth:`extend` for each sequence, then run the model on :meth:`batch`. Sequences are
    identified by the numbers that :meth:`add_sequence` returns.

    Args:
        model: allocates the tensors.
        num_blocks: blocks of 16 tokens for all sequences together.
        num_rows: maximum number of sequences.
        max_rollback: with a recurrent state, how many tokens of a step may be undone.
    """

    def __init__(self, model: CausalLM, num_blocks: int, num_rows: int = 1, *, max_rollback: int = 0) -> None:
        self.caches = model.allocate_caches(num_blocks, num_rows, max_rollback)
        self.can_crop = not self.caches.recurrent()
        self.blocks = BlockPool(num_blocks)
        self.rows = StatePool(num_rows)
        self._device = model.device
        self._sequences: dict[int, CachedSequence] = {}
        self._next = 0

    def add_sequence(self) -> int:
        """Start an empty sequence and return its number.

        Raises:
            MemoryBudgetError: no row is free.
        """
        row = self.rows.allocate()
        self.caches.reset_row(row)
        self._next += 1
        self._sequences[self._next] = CachedSequence(row)
        return self._next

    def num_tokens(self, seq: int) -> int:
        """Number of tokens of ``seq`` in the caches."""
        return self._sequences[seq].num_tokens

    def blocks_of(self, seq: int) -> list[int]:
        """The blocks of ``seq`` in order."""
        return self._sequences[seq].blocks

    def sequences(self) -> list[int]:
        """The numbers of all sequences, ascending."""
        return sorted(self._sequences)

    def num_owned(self, besides: Iterable[int] = ()) -> int:
        """Number of blocks that a sequence uses or that are in ``besides``."""
        owned = {block for owner in self._sequences.values() for block in owner.blocks}
        return len(owned.union(besides))

    def adopt(self, seq: int, blocks: Sequence[int], num_tokens: int) -> None:
        """Start the empty ``seq`` with ``num_tokens`` tokens in shared ``blocks``."""
        owner = self._sequences[seq]
        if owner.blocks or len(blocks) != num_blocks(num_tokens):
            raise UsageError(f"a sequence cannot start with {num_tokens} tokens in {len(blocks)} blocks")
        self.blocks.share(blocks)
        owner.blocks, owner.num_tokens = list(blocks), num_tokens

    def replace_block(self, seq: int, index: int, block: int) -> None:
        """Replace the block of ``seq`` at ``index`` by ``block``, which has the same content."""
        owner = self._sequences[seq]
        self.blocks.share([block])
        self.blocks.free([owner.blocks[index]])
        owner.blocks[index] = block

    def copy_block(self, source: int, target: int) -> None:
        """Copy keys and values; not those of MTP layers, whose drafts start at a new block."""
        for layer in self.caches.paged():
            layer.k[target].copy_(layer.k[source])
            layer.v[target].copy_(layer.v[source])

    def snapshot(self, seq: int) -> StateSnapshot:
        """A copy of the recurrent state of ``seq``."""
        row = self._sequences[seq].row
        pending = self.caches.pending[row]
        state = self._state(row, pending)
        return StateSnapshot(tuple(tensor.to("cpu", copy=True) for tensor in state), pending)

    def accepts(self, snapshot: StateSnapshot) -> bool:
        """Whether a snapshot from elsewhere has the shapes and types of this model."""
        if not 0 <= snapshot.pending <= self.caches.max_rollback:
            return False
        wanted = [(tensor.shape, tensor.dtype) for tensor in self._state(0, snapshot.pending)]
        return wanted == [(tensor.shape, tensor.dtype) for tensor in snapshot.tensors]

    def restore(self, seq: int, snapshot: StateSnapshot) -> None:
        """Set the recurrent state of ``seq`` to a snapshot of the same tokens."""
        row = self._sequences[seq].row
        self.caches.pending[row] = snapshot.pending
        for tensor, saved in zip(self._state(row, snapshot.pending), snapshot.tensors, strict=True):
            tensor.copy_(saved)

    def _state(self, row: int, pending: int) -> list[Tensor]:
        """The recurrent state in a row whose journal has so many tokens; the tensors are views."""
        state = []
        for layer in self.caches.recurrent():
            state += [layer.conv[row, layer.conv.shape[1] - layer.history :], layer.state[row]]
            if pending:
                journal = (layer.journal_g, layer.journal_k, layer.journal_delta)
                state += [part[row, :pending] for part in journal]
        return state

    def extend(self, seq: int, count: int) -> None:
        """Make room for ``count`` more tokens of ``seq``.

        Raises:
            MemoryBudgetError: not enough free blocks; nothing changes.
        """
        owner = self._sequences[seq]
        owner.blocks += self.blocks.allocate(num_blocks(owner.num_tokens + count) - len(owner.blocks))
        owner.num_tokens += count

    def batch(
        self, pieces: Mapping[int, Sequence[int]], num_tentative: Sequence[int] | None = None
    ) -> ForwardBatch:
        """The batch that runs ``pieces``: sequence -> its last ids, for which it was extended."""
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
        """Remove the last ``count`` tokens of ``seq`` and free the blocks that held only them.

        Raises:
            UsageError: more tokens than it has or, with a recurrent state, than the last step can undo.
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
        """End ``seq`` and free all it owns."""
        owner = self._sequences.pop(seq)
        self.blocks.free(owner.blocks[::-1])
        self.rows.free(owner.row)

    def check_integrity(self, held: Iterable[int] = ()) -> None:
        """Check that every block and row is either free or owned, and that no sequence has spare blocks.

        Args:
            held: blocks that others hold, each as often as they do.

        Raises:
            RuntimeError: it is not, which is a bug.
        """
        owners = self._sequences.values()
        self.blocks.check_integrity([*held, *(block for owner in owners for block in owner.blocks)])
        self.rows.check_integrity(owner.row for owner in owners)
        for seq, owner in self._sequences.items():
            if len(owner.blocks) != num_blocks(owner.num_tokens):
                raise RuntimeError(
                    f"sequence {seq} of {owner.num_tokens} tokens owns {len(owner.blocks)} blocks"
                )
