"""ModelRunner: the caches of all sequences, the prefix index, and forward passes."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from godwit.engine.cache import CacheSize, HybridCache, num_blocks
from godwit.engine.cache.disk import DiskCache
from godwit.engine.cache.prefix import Hit, PrefixIndex
from godwit.engine.scheduler import MIN_SHARED, Sequence, Work
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.models.causal_lm import CausalLM


class ModelRunner:
    """Runs steps. It is the scheduler's :class:`~godwit.engine.scheduler.Memory`.

    Args:
        model: whose steps are run.
        num_blocks, num_rows, max_rollback: of the caches, as for :class:`HybridCache`.
        snapshot_bytes: for snapshots of recurrent states.
        disk: keeps the prefix index across restarts.

    Attributes:
        hits: the prefix hit of each newly admitted sequence, until the core takes it.
        ready: scores of the next token of sequences that need no step for it.
    """

    def __init__(
        self,
        model: CausalLM,
        num_blocks: int,
        num_rows: int,
        max_rollback: int,
        snapshot_bytes: int,
        disk: DiskCache | None = None,
    ) -> None:
        self.model = model
        self.snapshot_bytes = snapshot_bytes
        self._sizes = (num_blocks, num_rows, max_rollback)
        self._allocate()
        self.recurrent = not self.cache.can_crop
        self.remembers = not self.recurrent or snapshot_bytes >= CacheSize.of(model).per_row
        self.disk = disk
        if disk is not None:
            disk.load(self.index, self.cache)

    def _allocate(self) -> None:
        num_blocks, num_rows, max_rollback = self._sizes
        self.cache = HybridCache(self.model, num_blocks, num_rows, max_rollback=max_rollback)
        recurrent = not self.cache.can_crop
        self.index = PrefixIndex(self.cache.blocks, recurrent=recurrent, max_bytes=self.snapshot_bytes)
        self.hits: dict[Sequence, Hit] = {}
        self.ready: dict[Sequence, Tensor] = {}

    def reset(self) -> None:
        """Start over with new, empty caches."""
        self.cache.caches.layers.clear()  # before the new ones are allocated
        self.cache.caches.mtp.clear()
        self._allocate()

    # what the scheduler asks for

    def admit(self, seq: Sequence, reserve: int, *, alone: bool) -> bool:
        if not self.cache.rows.num_free:
            return False
        hit = self.index.match(seq.ids, seq.salt, seq.chain)
        if seq.scored:
            hit = Hit(0, None, "the probabilities of the whole prompt were asked for")
        if not self._fits(seq, hit, reserve):
            # Copying a partial block takes one block more for a moment.
            hit = Hit(0, None, "the caches are too small to copy what is known of the text")
            if not alone or not self._fits(seq, hit, 0):
                return False
        self.index.use(hit)
        self._place(seq, hit)
        if hit.node is not None:
            # a state so close behind a kept one saves less than the extra step costs
            seq.cuts = [cut for cut in seq.cuts if cut - hit.position >= MIN_SHARED or cut <= hit.position]
        if self.recurrent and self.remembers and hit.known - hit.position >= MIN_SHARED:
            seq.add_cut(hit.known)  # texts diverge there, so others may share this prefix
        self.hits[seq] = hit
        return True

    def is_loading(self, seq: Sequence) -> bool:
        if self.disk is None or seq.scored or not (self.remembers and self.cache.rows.num_free):
            return False
        self.disk.receive(self.index, self.cache)
        position = self.index.match(seq.ids, seq.salt, seq.chain).position
        return self.disk.fetch(seq.ids, seq.salt, seq.chain, position, self.index, self.cache)

    def known(self, seq: Sequence) -> int:
        return self.index.match(seq.ids, seq.salt, seq.chain).position

    def extend(self, seq: Sequence, count: int) -> bool:
        slot = _slot(seq)
        wanted = num_blocks(self.cache.num_tokens(slot) + count) - len(self.cache.blocks_of(slot))
        missing = wanted - self.cache.blocks.num_free
        if missing > 0 and self.index.evict(missing) < missing:
            return False
        self.cache.extend(slot, count)
        return True

    def release(self, seq: Sequence, *, keep: bool = True, last: bool = False) -> None:
        """Free what ``seq`` has; it ends or waits.

        Args:
            seq: a running sequence.
            keep: keep what is computed of it in the prefix index.
            last: it has ended, so that it is written to disk, too.
        """
        if keep and seq.num_computed:
            self.remember(seq)
            if last and self.disk is not None and self.remembers:
                end = self.index.end_of(seq.ids[: seq.num_computed], seq.salt, seq.chain)
                if end is not None:
                    self.disk.save(end, self.cache)
        self.discard(seq)

    def discard(self, seq: Sequence) -> None:
        """Free what ``seq`` has, if it has anything, and keep nothing of it."""
        if seq.slot is not None:
            self.cache.free(seq.slot)
        self.hits.pop(seq, None)
        self.ready.pop(seq, None)
        seq.restart()

    def _fits(self, seq: Sequence, hit: Hit, reserve: int) -> bool:
        """Whether ``seq`` can resume at ``hit`` and reach its next token if all unused blocks are evicted."""
        shared = [] if hit.node is None else [node.block for node in hit.node.ancestors()]
        needed = num_blocks(len(seq.ids) + 1) - hit.position // BLOCK_SIZE
        return self.cache.num_owned(shared) + needed + reserve <= self.cache.blocks.num_blocks

    def _place(self, seq: Sequence, hit: Hit) -> None:
        slot = seq.slot = self.cache.add_sequence()
        seq.num_computed = hit.position
        seq.num_committed, rest = divmod(hit.position, BLOCK_SIZE)
        if hit.node is None:
            return
        blocks = [node.block for node in hit.node.ancestors()][::-1]
        self.cache.adopt(slot, blocks[: seq.num_committed], seq.num_committed * BLOCK_SIZE)
        if rest:
            self.cache.blocks.share(blocks[-1:])  # so that it is not evicted to make room for its copy
            try:
                if not self.extend(seq, rest):
                    raise RuntimeError("there is no block for a copy that was found to fit")
                self.cache.copy_block(blocks[-1], self.cache.blocks_of(slot)[-1])
            finally:
                self.cache.blocks.free(blocks[-1:])
        if hit.node.snapshot is not None:
            self.cache.restore(slot, hit.node.snapshot.state)
            if hit.node.snapshot.logits is not None and hit.position == len(seq.ids):
                self.ready[seq] = hit.node.snapshot.logits

    # steps

    def run(self, works: Seq[Work]) -> tuple[ForwardBatch, Tensor, Tensor, list[int | None]]:
        """One forward pass over sequences that were extended for it.

        Returns:
            The batch, its hidden states ``[T, H]``, scores ``[R, V]``, and for each work its first row of
            scores: that after the last known token; the rows after each draft follow. None where the step
            does not reach the last known token.
        """
        pieces = {_slot(work.sequence): work.tokens for work in works}
        tentative = [work.num_drafts if self.recurrent else 0 for work in works]
        batch = self.cache.batch(pieces, tentative)
        firsts, rows = list[int | None](), list[int]()
        for work, end in zip(works, batch.cu_seqlens[1:], strict=True):
            if work.reaches_end:
                firsts.append(len(rows))
                rows += range(end - 1 - work.num_drafts, end)
            else:
                firsts.append(None)
        with torch.inference_mode():
            hidden = self.model(batch, self.cache.caches)
            if len(rows) == len(hidden):
                logits = self.model.compute_logits(hidden)
            elif rows:
                index = torch.tensor(rows, dtype=torch.long, device=hidden.device)
                logits = self.model.compute_logits(hidden, index)
            else:
                logits = hidden[:0]
        return batch, hidden, logits, firsts

    def settle(self, work: Work, num_kept: int) -> None:
        """After a step: keep the first ``num_kept`` of the work's tokens and undo the others."""
        seq = work.sequence
        if num_kept < len(work.tokens):
            self.cache.rollback(_slot(seq), len(work.tokens) - num_kept)
        seq.num_computed += num_kept
        if self.remembers and seq.num_computed // BLOCK_SIZE > seq.num_committed:
            self._commit(seq)

    def remember(self, seq: Sequence, logits: Tensor | None = None) -> None:
        """Put what is computed of ``seq`` into the prefix index, after a whole prompt with its ``logits``."""
        if not self.remembers:
            return
        self._commit(seq)
        if self.recurrent:
            slot, done = _slot(seq), seq.ids[: seq.num_computed]
            blocks = self.cache.blocks_of(slot)
            self.index.add_snapshot(
                done, seq.salt, seq.chain, blocks, lambda: self.cache.snapshot(slot), logits
            )

    def _commit(self, seq: Sequence) -> None:
        slot, end = _slot(seq), seq.num_computed // BLOCK_SIZE
        blocks = self.cache.blocks_of(slot)
        better = self.index.commit(seq.ids, seq.salt, seq.chain, blocks, seq.num_committed, end)
        for place, block in better:
            self.cache.replace_block(slot, place, block)
        seq.num_committed = end

    def check_integrity(self, running: Seq[Sequence], works: Seq[Work] = ()) -> None:
        """Every block is free, a sequence's, or the index's; every row is free or a running sequence's.

        Args:
            running: all sequences that run.
            works: the step for which they were extended, if it has yet to run.

        Raises:
            RuntimeError: the books do not balance, which is a bug.
        """
        planned = {work.sequence: len(work.tokens) for work in works}
        self.cache.check_integrity(self.index.held())
        self.index.check_integrity()
        if sorted(_slot(seq) for seq in running) != self.cache.sequences():
            raise RuntimeError("the caches serve other sequences than those that run")
        for seq in running:
            if self.cache.num_tokens(_slot(seq)) != seq.num_computed + planned.get(seq, 0):
                raise RuntimeError(f"sequence {seq.number} has other tokens in the caches than it counts")


def _slot(seq: Sequence) -> int:
    if seq.slot is None:
        raise RuntimeError(f"sequence {seq.number} is not running")
    return seq.slot
