"""Speculation: drafts a few tokens ahead, which the model verifies in one step. Answers stay the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from time import perf_counter

from torch import Tensor

from godwit.engine.cache import CacheSize, num_blocks
from godwit.engine.core import divide
from godwit.engine.runner import ModelRunner
from godwit.engine.scheduler import Sequence, Work
from godwit.engine.speculation.controller import BatchKind, Controller, TimedStep
from godwit.engine.speculation.estimates import Acceptance
from godwit.engine.speculation.lookup import LookupDrafts
from godwit.engine.speculation.mtp import MAX_PENDING, MTPDrafts
from godwit.engine.speculation.source import DraftSource
from godwit.errors import MemoryBudgetError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM

#: Drafts for a sequence in a step; each needs room in the rows of recurrent states.
MAX_DEPTH = 6
#: With more sequences nothing is drafted: there, a draft costs about what it gains.
MAX_SEQUENCES = 4
#: Share of the context that has to remain when drafts get their room.
_MIN_CONTEXT = 0.95


class Speculator:
    """Drafts for all sequences of an engine; its :class:`~godwit.engine.core.Drafter`.

    What was learned of costs and acceptance outlives the sequences.

    Args:
        max_depth: drafts for a sequence in a step.
        controller: decides when to draft; None makes one.
        clock: the time in seconds.
        max_sequences: with more of them nothing is drafted.
    """

    def __init__(
        self,
        max_depth: int = MAX_DEPTH,
        controller: Controller | None = None,
        clock: Callable[[], float] = perf_counter,
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        self.max_depth = max_depth
        self.max_sequences = max_sequences
        self.controller = controller or Controller()
        self.sources: list[DraftSource] = []
        self._clock = clock
        self._lookup_acceptance, self._mtp_acceptance = Acceptance(), Acceptance()
        self._recording: list[DraftSource] = []
        self._size = self._length = self._num_rests = self._num_untimed = 0
        self._began = 0.0
        self._step: TimedStep | None = None

    # the drafter of a core

    def start(self, runner: ModelRunner) -> None:
        self.sources = [LookupDrafts(self._lookup_acceptance)]
        if runner.model.mtp is not None:
            self.sources.append(MTPDrafts(runner, self._mtp_acceptance))
        self._recording = self.sources

    def wants(self, num_sequences: int) -> bool:
        same, self._size, self._step = num_sequences == self._size, num_sequences, None
        if num_sequences > self.max_sequences:
            self._num_rests, self._recording = 0, []
            return False
        if same and self._num_rests:
            self._num_rests -= 1
            self._num_untimed += 1
            return False
        self._num_rests = 0
        self._began = self._clock()
        self._step = TimedStep(BatchKind(num_sequences, self._length), num_untimed=self._num_untimed)
        return self.controller.wants_drafts(self._step.kind)

    def propose(self, limits: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        step = self._step
        if step is None:
            return {}
        rates = [
            [source.rates(seq, min(limit, self.max_depth)) for seq, limit in limits.items()]
            if self.controller.may_draft(number)
            else []
            for number, source in enumerate(self.sources)
        ]
        choice = self.controller.choose(step.kind.size, rates)
        if choice is None:
            step.search_seconds = self._clock() - self._began
            return {}
        step.source, step.num_drafts = choice.source, sum(choice.depths)
        depths = {seq: depth for seq, depth in zip(limits, choice.depths, strict=True) if depth}
        source, began = self.sources[choice.source], self._clock()
        if source.catch_up(depths):
            step.catch_up_seconds = self._clock() - began
        return source.draft(depths)

    def observe(self, works: Seq[Work], kept: Seq[int], batch: ForwardBatch, hidden: Tensor) -> None:
        for source in self._recording:
            source.record(works, kept, batch, hidden)
        step = self._step
        if step is None:
            return
        for work, count in zip(works, kept, strict=True):
            if work.num_drafts:
                self.sources[step.source].judge(work.sequence, work.num_drafts, count - 1)
        self._length = sum(len(work.sequence.ids) for work in works).bit_length() // 2
        proposed, step.num_drafts = step.num_drafts, sum(work.num_drafts for work in works)
        step.kind, step.num_tokens = BatchKind(len(works), self._length), sum(kept)
        decoded = all(len(work.tokens) == 1 + work.num_drafts for work in works)
        if decoded and bool(proposed) == bool(step.num_drafts):  # otherwise there was no room for the drafts
            self._learn(step, works, kept)
        self._recording = [
            source
            for number, source in enumerate(self.sources)
            if self.controller.may_draft(number, MAX_PENDING)
        ]

    def forget(self, seq: Sequence) -> None:
        for source in self.sources:
            source.forget(seq)

    def _learn(self, step: TimedStep, works: Seq[Work], kept: Seq[int]) -> None:
        step.seconds = self._clock() - self._began
        plain = self.controller.plain_seconds(step.kind)
        self._num_rests, self._num_untimed = self.controller.learn(step), 0
        if step.num_drafts and plain is not None:
            for work, count in zip(works, kept, strict=True):
                saved = work.sequence.saved_seconds or 0.0
                work.sequence.saved_seconds = saved + count * plain - step.seconds


def leaves_room(model: CausalLM, max_context: int, max_bytes: int | None, max_sequences: int) -> bool:
    """Whether nearly as long texts fit ``max_bytes`` when drafts get their room."""
    try:
        plain, _ = divide(CacheSize.of(model), max_context, max_bytes, max_sequences)
        drafting, _ = divide(CacheSize.of(model, MAX_DEPTH), max_context, max_bytes, max_sequences)
    except MemoryBudgetError:
        return False
    return drafting >= _MIN_CONTEXT * min(plain, num_blocks(max_context))
