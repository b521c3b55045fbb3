"""Drafts of a model's multi-token-prediction module."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from godwit.engine.cache import num_blocks
from godwit.engine.runner import ModelRunner
from godwit.engine.sampling import as_rows
from godwit.engine.scheduler import Sequence, Work
from godwit.models.batch import BLOCK_SIZE, ForwardBatch

#: Trunk states that are kept of a sequence for which nothing is drafted; the module begins anew with them.
MAX_PENDING = 64
#: Tokens of a sequence in a step that answers.
MAX_USUAL = 16
#: States that the module reads in a step at most, in all sequences together.
MAX_FILLED = 512


#: A sequence, states of some of its tokens, and the position of the first.
Part = tuple[Sequence, Tensor, int]


@dataclass
class Window:
    """What the module has seen of a sequence: its slots from ``start`` to ``filled``.

    Slot p joins the trunk's state of token p with token p + 1. Slots lie in the sequence's own blocks, so the
    window begins with a block. States of the slots from ``filled`` to ``end`` wait in ``pending``. Where
    states are missing (a reused prefix, a time without drafts) a new window begins: what the module does not
    see costs accepted drafts, never an answer.
    """

    start: int = 0
    filled: int = 0
    end: int = 0
    pending: deque[Tensor] = field(default_factory=deque)
    blocks: list[int] = field(default_factory=list)

    def add(self, states: Tensor, position: int) -> None:
        """Take in the states of the tokens from ``position`` on."""
        if position != self.end:
            self.pending.clear()
            self.filled = self.end = position
            self._begin()
        self.pending.append(states)
        self.end += len(states)
        if self.end - self.filled > MAX_PENDING:
            self.shorten(MAX_PENDING)

    def shorten(self, most: int) -> None:
        """Let at most ``most`` states wait."""
        if self.end - self.filled <= most:
            return
        while (excess := self.end - self.filled - most) > 0:
            self._drop(excess)
        self._begin()

    def is_ready(self, blocks: Seq[int]) -> bool:
        """Whether drafts can begin, of a sequence that has these blocks now."""
        first = self.start // BLOCK_SIZE
        if self.blocks and list(blocks[first : first + len(self.blocks)]) != self.blocks:
            self._begin()  # equal blocks of other sequences took their place
        if self.start == self.filled:
            missing = -self.filled % BLOCK_SIZE
            if self.end - self.filled <= missing:
                return False
            while missing:
                missing -= self._drop(missing)
            self._begin()
        return self.end > self.filled

    def fill(self, blocks: Seq[int]) -> None:
        """All states that waited have been read."""
        self.pending.clear()
        self.filled = self.end
        self.blocks = list(blocks[self.start // BLOCK_SIZE : num_blocks(self.filled)])

    def _begin(self) -> None:
        self.start, self.blocks = self.filled, []

    def _drop(self, most: int) -> int:
        states = self.pending.popleft()
        count = min(most, len(states))
        if count < len(states):
            self.pending.appendleft(states[count:].clone())
        self.filled += count
        return count


@dataclass(frozen=True)
class Rows:
    """Slots of one sequence in one pass of the module."""

    first: int
    count: int
    start: int
    blocks: Seq[int]


class MTPDrafts:
    """The MTP module of a runner's model, with a window on each sequence.

    It runs through the paged cache that the model declares for it, in the blocks of the sequences. Further
    drafts feed its own output back; their slots are written again with true states later.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.windows: dict[Sequence, Window] = {}
        self._steps: deque[list[Part] | Callable[[], Iterator[Part]]] = deque(maxlen=MAX_PENDING)

    def record(self, works: Seq[Work], kept: Seq[int], batch: ForwardBatch, hidden: Tensor) -> None:
        """Note a step, with the trunk's states ``hidden [T, H]``, of which so many were true of each work.

        Where few tokens ran that costs nothing by sequence: :meth:`catch_up` sorts the states out if anybody
        wants them.
        """
        step = partial(_parts, works, kept, batch, hidden)
        if len(hidden) > len(works) * MAX_USUAL:  # the whole of it would be kept alive for a small part
            self._steps.append([_shortened(part) for part in step()])
        else:
            self._steps.append(step)

    def catch_up(self, seqs: Iterable[Sequence]) -> list[Sequence]:
        """Sort out what was recorded, and tell which of ``seqs`` can be drafted for."""
        for step in self._steps:
            for seq, states, position in step if isinstance(step, list) else step():
                if seq.slot is not None and len(states):
                    self.windows.setdefault(seq, Window()).add(states, position)
        self._steps.clear()
        return [seq for seq in seqs if self.is_ready(seq)]

    def forget(self, seq: Sequence) -> None:
        self.windows.pop(seq, None)

    def is_ready(self, seq: Sequence) -> bool:
        """Whether it can draft for ``seq``, all tokens of which but the newest are computed."""
        window = self.windows.get(seq)
        return window is not None and window.end == len(seq.ids) - 1 and window.is_ready(self._blocks(seq))

    def num_pending(self, seq: Sequence) -> int:
        window = self.windows[seq]
        return window.end - window.filled

    def draft(self, depths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Up to so many drafts for sequences that are ready."""
        share = max(BLOCK_SIZE, MAX_FILLED // len(depths))
        for seq in depths:
            self.windows[seq].shorten(share)
        seqs = [seq for seq in depths if self.is_ready(seq)]
        if not seqs:
            return {}
        borrowed = {seq: self._borrow(seq, depths[seq]) for seq in seqs}
        try:
            with torch.inference_mode():
                return self._chains({seq: depths[seq] for seq in seqs}, borrowed)
        finally:
            for blocks in borrowed.values():
                self.runner.cache.blocks.free(blocks)

    def _chains(
        self, depths: dict[Sequence, int], borrowed: Mapping[Sequence, list[int]]
    ) -> dict[Sequence, list[int]]:
        tables = {seq: [*self._blocks(seq), *borrowed[seq]] for seq in depths}
        states, tokens = self._first(list(depths), tables)
        drafts = {seq: [token] for seq, token in zip(depths, tokens.tolist(), strict=True)}
        active = list(depths)
        for depth in range(1, max(depths.values())):
            rows = [
                row
                for row, seq in enumerate(active)
                if depths[seq] > depth and len(seq.ids) - 1 + depth <= len(tables[seq]) * BLOCK_SIZE
            ]
            if not rows:
                break
            if len(rows) < len(active):
                states, tokens, active = states[rows], tokens[rows], [active[row] for row in rows]
            parts = [
                Rows(len(seq.ids) - 2 + depth, 1, self.windows[seq].start, tables[seq]) for seq in active
            ]
            states, tokens = self._run(states, tokens, parts)
            for seq, token in zip(active, tokens.tolist(), strict=True):
                drafts[seq].append(token)
        return drafts

    def _first(self, seqs: list[Sequence], tables: Mapping[Sequence, list[int]]) -> tuple[Tensor, Tensor]:
        """Fill all slots whose states wait; the last of each sequence gives its first draft."""
        windows = [self.windows[seq] for seq in seqs]
        states = torch.cat([part for window in windows for part in window.pending])
        next_ids = [
            token
            for seq, window in zip(seqs, windows, strict=True)
            for token in seq.ids[window.filled + 1 : window.end + 1]
        ]
        parts = [
            Rows(window.filled, window.end - window.filled, window.start, tables[seq])
            for seq, window in zip(seqs, windows, strict=True)
        ]
        result = self._run(states, torch.tensor(next_ids), parts)
        for seq, window in zip(seqs, windows, strict=True):
            window.fill(self._blocks(seq))
        return result

    def _run(self, states: Tensor, next_ids: Tensor, parts: Seq[Rows]) -> tuple[Tensor, Tensor]:
        """One pass: the output and the likeliest token of the last slot of each sequence."""
        model, batch = self.runner.model, _batch(next_ids, parts)
        out = model.forward_mtp(states, next_ids, batch, self.runner.cache.caches)
        if len(out) > len(parts):
            out = out[batch.last_rows]
        likeliest = as_rows(model.compute_logits(out)).argmax(-1)
        return out, torch.from_numpy(likeliest)

    def _borrow(self, seq: Sequence, depth: int) -> list[int]:
        """Blocks for guessed slots beyond the sequence's own, as far as there are any."""
        blocks = self.runner.cache.blocks
        missing = num_blocks(len(seq.ids) - 2 + depth) - len(self._blocks(seq))
        if missing > blocks.num_free:
            self.runner.index.evict(missing - blocks.num_free)
        return blocks.allocate(max(0, min(missing, blocks.num_free)))

    def _blocks(self, seq: Sequence) -> list[int]:
        return [] if seq.slot is None else self.runner.cache.blocks_of(seq.slot)


def _parts(works: Seq[Work], kept: Seq[int], batch: ForwardBatch, hidden: Tensor) -> Iterator[Part]:
    for work, count, start, end in zip(works, kept, batch.cu_seqlens, batch.seq_lens, strict=False):
        yield work.sequence, hidden[start : start + count], end - len(work.tokens)


def _shortened(part: Part) -> Part:
    seq, states, position = part
    excess = max(0, len(states) - MAX_PENDING)
    return seq, states[excess:].clone(), position + excess


def _batch(next_ids: Tensor, parts: Seq[Rows]) -> ForwardBatch:
    """Slots in the blocks of their sequences, of which the module sees those of the window."""
    positions = [part.first + i for part in parts for i in range(part.count)]
    slots = [
        part.blocks[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
        for part in parts
        for place in range(part.first, part.first + part.count)
    ]
    tables = [part.blocks[part.start // BLOCK_SIZE : num_blocks(part.first + part.count)] for part in parts]
    width = max(len(table) for table in tables)
    return ForwardBatch(
        next_ids,
        torch.tensor(positions),
        tuple(accumulate((part.count for part in parts), initial=0)),
        tuple(part.first + part.count - part.start for part in parts),
        torch.tensor(slots),
        torch.tensor([[*table, *[0] * (width - len(table))] for table in tables]),
        tuple(range(len(parts))),
        (0,) * len(parts),
    )
