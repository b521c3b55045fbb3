"""Drafts of a model's multi-token-prediction (MTP) module."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate, islice

import torch
from torch import Tensor

from godwit.engine.cache import num_blocks
from godwit.engine.runner import ModelRunner
from godwit.engine.sampling import as_rows
from godwit.engine.scheduler import Sequence, Work
from godwit.engine.speculation.estimates import Acceptance
from godwit.engine.speculation.source import DraftSource
from godwit.models.batch import BLOCK_SIZE, ForwardBatch

#: Drafts for a sequence in a step; each is made from the one before.
MAX_MTP_DEPTH = 4
#: Trunk states kept of a sequence for which nothing is drafted; the module starts again from them.
MAX_PENDING = 64
#: Pending states that are usual while drafting: the tokens of a few steps.
_USUAL_PENDING = 16


@dataclass
class MTPWindow:
    """What the module has read of a sequence: its slots from ``start`` to ``filled``.

    Slot p combines the trunk's state of token p with token p + 1. Slots lie in the sequence's own blocks, so
    a window starts at a block boundary. The states of the slots from ``filled`` to ``end`` are ``pending``.
    Where states are missing (a reused prefix, steps that were not recorded) a new window starts: what the
    module has not read costs accepted drafts, but changes no answer.
    """

    acceptance: Acceptance
    start: int = 0
    filled: int = 0
    end: int = 0
    pending: deque[Tensor] = field(default_factory=lambda: deque(maxlen=MAX_PENDING))
    blocks: list[int] = field(default_factory=list)

    def add(self, states: Tensor, position: int) -> None:
        """Append the states ``[T, H]`` of the tokens from ``position`` on."""
        if position != self.end:
            self.pending.clear()
        self.pending.extend(states)
        self.end = position + len(states)
        if (first := self.end - len(self.pending)) != self.filled:
            self._restart(first)

    def is_ready(self, blocks: Seq[int]) -> bool:
        """Whether drafting can begin, of a sequence that has these blocks now."""
        first = self.start // BLOCK_SIZE
        if self.blocks and list(blocks[first : first + len(self.blocks)]) != self.blocks:
            self._restart(self.filled)  # the prefix index replaced blocks by others with the same tokens
        if self.start == self.filled:
            boundary = num_blocks(self.filled) * BLOCK_SIZE
            if self.end <= boundary:
                return False
            self._restart(boundary)
        return self.end > self.filled

    def fill(self, count: int, blocks: Seq[int]) -> None:
        """The first ``count`` pending states have been read."""
        for _ in range(count):
            self.pending.popleft()
        self.filled += count
        self.blocks = list(blocks[self.start // BLOCK_SIZE : num_blocks(self.filled)])

    def _restart(self, position: int) -> None:
        while self.end - len(self.pending) < position:
            self.pending.popleft()
        self.start = self.filled = position
        self.blocks = []


@dataclass(frozen=True)
class MTPSlots:
    """Slots of a sequence in one pass: ``count`` from ``first`` on, which see those from ``start`` on."""

    first: int
    count: int
    start: int
    blocks: Seq[int]


class MTPDrafts(DraftSource):
    """The MTP module of a runner's model, with a window on each sequence.

    It uses the paged cache that the model declares for it, in the blocks of the sequences. Drafts after the
    first are made from its own output; their slots are written again with true states later.

    Args:
        runner: whose model and caches are used.
        acceptance: what was learned from earlier sequences.
    """

    def __init__(self, runner: ModelRunner, acceptance: Acceptance) -> None:
        self.runner = runner
        self.windows: dict[Sequence, MTPWindow] = {}
        self._acceptance = acceptance

    def rates(self, seq: Sequence, limit: int) -> list[float]:
        window = self.windows.get(seq)
        if window is None or window.end != len(seq.ids) - 1 or not window.is_ready(self._blocks(seq)):
            return []
        return [window.acceptance.rate(0)] * min(limit, MAX_MTP_DEPTH)

    def catch_up(self, seqs: Iterable[Sequence]) -> bool:
        behind = [seq for seq in seqs if len(self.windows[seq].pending) > _USUAL_PENDING]
        if behind:
            with torch.inference_mode():
                self._read(behind, {seq: self._blocks(seq) for seq in behind}, leave=1)
        return bool(behind)

    def draft(self, depths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        borrowed = {seq: self._borrow(seq, depth) for seq, depth in depths.items()}
        try:
            with torch.inference_mode():
                return self._chains(depths, {seq: [*self._blocks(seq), *borrowed[seq]] for seq in depths})
        finally:
            for blocks in borrowed.values():
                self.runner.cache.blocks.free(blocks)

    def judge(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        if (window := self.windows.get(seq)) is not None:
            for number in range(min(num_drafts, num_accepted + 1)):
                window.acceptance.learn(0, number < num_accepted)

    def record(self, works: Seq[Work], kept: Seq[int], batch: ForwardBatch, hidden: Tensor) -> None:
        for work, count, start, end in zip(works, kept, batch.cu_seqlens, batch.seq_lens, strict=False):
            seq, skipped = work.sequence, max(0, count - MAX_PENDING)
            if seq.slot is None or not count:
                continue
            states = hidden[start + skipped : start + count]
            if len(hidden) > MAX_PENDING:  # a view would keep all of a long step alive
                states = states.clone()
            if seq not in self.windows:
                self.windows[seq] = MTPWindow(Acceptance(self._acceptance))
            self.windows[seq].add(states, end - len(work.tokens) + skipped)

    def forget(self, seq: Sequence) -> None:
        self.windows.pop(seq, None)

    def _chains(
        self, depths: Mapping[Sequence, int], tables: Mapping[Sequence, Seq[int]]
    ) -> dict[Sequence, list[int]]:
        active = list(depths)
        states, tokens = self._read(active, tables, leave=0)
        drafts = {seq: [token] for seq, token in zip(depths, tokens.tolist(), strict=True)}
        for depth in range(1, max(depths.values())):
            rows = [
                row
                for row, seq in enumerate(active)
                if depths[seq] > depth and len(seq.ids) - 1 + depth <= len(tables[seq]) * BLOCK_SIZE
            ]
            if not rows:
                break
            states, tokens, active = states[rows], tokens[rows], [active[row] for row in rows]
            slots = [
                MTPSlots(len(seq.ids) - 2 + depth, 1, self.windows[seq].start, tables[seq]) for seq in active
            ]
            states, tokens = self._run(states, tokens, slots)
            for seq, token in zip(active, tokens.tolist(), strict=True):
                drafts[seq].append(token)
        return drafts

    def _read(
        self, seqs: list[Sequence], tables: Mapping[Sequence, Seq[int]], leave: int
    ) -> tuple[Tensor, Tensor]:
        """Read all pending states but the last ``leave``: the output of :meth:`_run`."""
        windows = [self.windows[seq] for seq in seqs]
        counts = [len(window.pending) - leave for window in windows]
        states, next_ids, slots = list[Tensor](), list[int](), list[MTPSlots]()
        for seq, window, count in zip(seqs, windows, counts, strict=True):
            states += islice(window.pending, count)
            next_ids += seq.ids[window.filled + 1 : window.filled + 1 + count]
            slots.append(MTPSlots(window.filled, count, window.start, tables[seq]))
        result = self._run(torch.stack(states), torch.tensor(next_ids), slots)
        for seq, window, count in zip(seqs, windows, counts, strict=True):
            window.fill(count, self._blocks(seq))
        return result

    def _run(self, states: Tensor, next_ids: Tensor, slots: Seq[MTPSlots]) -> tuple[Tensor, Tensor]:
        """One pass: the output and the likeliest token after the last slot of each sequence."""
        model, batch = self.runner.model, _batch(next_ids, slots)
        out = model.forward_mtp(states, next_ids, batch, self.runner.cache.caches)
        if len(out) > len(slots):
            out = out[batch.last_rows]
        likeliest = as_rows(model.compute_logits(out)).argmax(-1)
        return out, torch.from_numpy(likeliest)

    def _borrow(self, seq: Sequence, depth: int) -> list[int]:
        """Free blocks for slots of drafts beyond the sequence's own; fewer if there are not enough."""
        blocks = self.runner.cache.blocks
        missing = num_blocks(len(seq.ids) - 2 + depth) - len(self._blocks(seq))
        if missing > blocks.num_free:
            self.runner.index.evict(missing - blocks.num_free)
        return blocks.allocate(max(0, min(missing, blocks.num_free)))

    def _blocks(self, seq: Sequence) -> list[int]:
        return [] if seq.slot is None else self.runner.cache.blocks_of(seq.slot)


def _batch(next_ids: Tensor, slots: Seq[MTPSlots]) -> ForwardBatch:
    """Slots in the blocks of their sequences, of which the module sees those of the window."""
    positions = [one.first + i for one in slots for i in range(one.count)]
    places = [
        one.blocks[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
        for one in slots
        for place in range(one.first, one.first + one.count)
    ]
    tables = [one.blocks[one.start // BLOCK_SIZE : num_blocks(one.first + one.count)] for one in slots]
    width = max(len(table) for table in tables)
    return ForwardBatch(
        next_ids,
        torch.tensor(positions),
        tuple(accumulate((one.count for one in slots), initial=0)),
        tuple(one.first + one.count - one.start for one in slots),
        torch.tensor(places),
        torch.tensor([[*table, *[0] * (width - len(table))] for table in tables]),
        tuple(range(len(slots))),
        (0,) * len(slots),
    )
