"""Speculation: tokens guessed ahead, which the model verifies several at a time. Answers stay the same.

Guesses come from the text itself or from the model's multi-token-prediction module, whichever promises more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from godwit.engine.cache import CacheSize, num_blocks
from godwit.engine.core import divide
from godwit.engine.runner import ModelRunner
from godwit.engine.scheduler import Sequence, Work
from godwit.engine.speculation.controller import Controller, Measured, Option
from godwit.engine.speculation.estimates import Acceptance
from godwit.engine.speculation.lookup import MAX_MATCH, PromptLookup, continuation
from godwit.engine.speculation.mtp import MAX_PENDING, MTPDrafts
from godwit.errors import MemoryBudgetError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM

#: Drafts for a sequence in a step; each takes room in the rows of recurrent states.
MAX_DEPTH = 6
#: Drafts of the MTP module, which come one after the other.
MAX_MTP_DEPTH = 4
#: Kinds of drafts whose acceptance is measured apart: MTP drafts by their number, then lengths of matches.
_LENGTH_KINDS = [
    MAX_MTP_DEPTH + min(length, 8) // 2 + (length >= MAX_MATCH) for length in range(MAX_MATCH + 1)
]
#: With more sequences than these nothing is drafted: there rows cost about what they give, and looking after
#: drafts costs more than their gains.
MAX_SEQUENCES = 4
#: Share of the context that has to be left with room for drafts.
_LEAST_CONTEXT = 0.95


@dataclass
class History:
    """What is known of one sequence.

    Attributes:
        guess: a draft that was not verified: where its token will stand, its kind, and the token.
        mtp: how likely its MTP drafts are, until more is known.
    """

    acceptance: Acceptance
    lookup: PromptLookup = field(default_factory=PromptLookup)
    guess: tuple[int, int, int] | None = None
    mtp: list[float] = field(default_factory=list)


@dataclass
class Drafted:
    """What the next step verifies of a sequence."""

    kinds: list[int]
    tokens: list[int]


class Speculator:
    """Drafts for all sequences of an engine; its :class:`~godwit.engine.core.Drafter`.

    What was learned of costs and acceptance outlives the sequences.

    Args:
        max_depth: drafts for a sequence in a step.
        controller: chooses how many; None makes one.
        clock: tells seconds.
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
        self.controller = controller or Controller(max_depth)
        self._clock = clock
        self._acceptance = Acceptance()
        self._mtp: MTPDrafts | None = None
        self._histories: dict[Sequence, History] = {}
        self._size = self._num_rests = self._num_slept = 0
        self._resting, self._recording = False, True
        self._reset()

    def _reset(self) -> None:
        self._began = self._clock()
        self._drafted: dict[Sequence, Drafted] = {}
        self._draft_depth = 0
        self._draft_seconds: float | None = 0.0

    # the drafter of a core

    def start(self, runner: ModelRunner) -> None:
        self._mtp = MTPDrafts(runner) if runner.model.mtp is not None else None
        self._histories.clear()
        self._reset()

    def wants(self, num_sequences: int) -> bool:
        if num_sequences > self.max_sequences:
            self._num_rests, self._size, self._resting, self._recording = 0, num_sequences, True, False
            self._drafted = {}
            return False
        if self._num_rests and num_sequences == self._size:
            self._num_rests -= 1
            self._num_slept += 1
            return False
        self._num_rests, self._size, self._resting = 0, num_sequences, False
        self._reset()
        return self.controller.wants(num_sequences)

    def propose(self, limits: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        limits = {seq: min(limit, self.max_depth) for seq, limit in limits.items() if limit > 0}
        if not limits:
            return {}
        places = {seq: self._look_up(seq) for seq in limits}
        mtp = self._mtp is not None and self.controller.allows_mtp(len(limits))
        if not mtp and not any(length for _, length in places.values()):
            self.controller.looked(len(limits), self._clock() - self._began)
            return {}
        options = [self._option(seq, limits[seq], places[seq][1], mtp) for seq in limits]
        choices = dict(zip(limits, self.controller.choose(options), strict=True))
        for seq, choice in choices.items():
            if choice.depth and not choice.mtp:
                place, length = places[seq]
                tokens = continuation(seq.ids, place, choice.depth)
                kinds = [_LENGTH_KINDS[min(length + i, MAX_MATCH)] for i in range(choice.depth)]
                self._drafted[seq] = Drafted(kinds, tokens)
                self._histories[seq].guess = None
        self._draft({seq: choice.depth for seq, choice in choices.items() if choice.mtp and choice.depth})
        if not self._drafted:
            self.controller.looked(len(limits), self._clock() - self._began)
        return {seq: drafted.tokens for seq, drafted in self._drafted.items()}

    def observe(self, works: Seq[Work], kept: Seq[int], batch: ForwardBatch, hidden: Tensor) -> None:
        if self._recording and self._mtp is not None:
            self._mtp.record(works, kept, batch, hidden)
        if self._resting:
            return
        for work, count in zip(works, kept, strict=True) if self._drafted else ():
            if work.num_drafts:
                self._compare(work, count - 1)
        num_drafts = len(hidden) - len(works)
        if not num_drafts or (self._drafted and all(len(w.tokens) == 1 + w.num_drafts for w in works)):
            self._measure(works, kept, num_drafts, self._clock() - self._began)
        size = len(works)
        self._num_rests, self._num_slept = self.controller.rest(size) if size == self._size else 0, 0
        self._resting = self._num_rests > 0
        self._recording = self.controller.allows_mtp(size, MAX_PENDING)

    def forget(self, seq: Sequence) -> None:
        self._histories.pop(seq, None)
        if self._mtp is not None:
            self._mtp.forget(seq)

    # drafts

    def _look_up(self, seq: Sequence) -> tuple[int, int]:
        history = self._histories.get(seq)
        if history is None:
            history = self._histories[seq] = History(Acceptance(self._acceptance))
        elif history.guess is not None:
            position, kind, token = history.guess
            if position < len(seq.ids):
                history.acceptance.learn(kind, seq.ids[position] == token)
        place, length = history.lookup.match(seq.ids)
        history.guess = (len(seq.ids), _LENGTH_KINDS[length], seq.ids[place]) if length else None
        return place, length

    def _option(self, seq: Sequence, limit: int, match: int, mtp: bool) -> Option:
        history = self._histories[seq]
        estimate, lookup = history.acceptance.estimate, list[float]()
        if match:
            lookup = [estimate(_LENGTH_KINDS[min(match + i, MAX_MATCH)]) for i in range(limit)]
        if not mtp:
            return Option(lookup)
        if not history.mtp:
            history.mtp = [estimate(number) for number in range(MAX_MTP_DEPTH)]
        return Option(lookup, history.mtp[:limit])

    def _draft(self, depths: Mapping[Sequence, int]) -> None:
        if self._mtp is None or not depths:
            return
        began = self._clock()
        ready = self._mtp.catch_up(depths)
        usual = sum(map(self._mtp.num_pending, ready)) <= len(ready) * (self.max_depth + 1)
        drafts = self._mtp.draft({seq: depths[seq] for seq in ready}) if ready else {}
        for seq, tokens in drafts.items():
            self._drafted[seq] = Drafted(list(range(len(tokens))), tokens)
        self._draft_depth = max(map(len, drafts.values()), default=0)
        self._draft_seconds = self._clock() - began if usual else None

    # what came of them

    def _compare(self, work: Work, num_accepted: int) -> None:
        drafted, history = self._drafted.get(work.sequence), self._histories.get(work.sequence)
        if drafted is None or history is None:  # it has ended, for whatever reason
            return
        history.mtp = []
        for number, kind in enumerate(drafted.kinds[: work.num_drafts]):
            history.acceptance.learn(kind, number < num_accepted)
            if number >= num_accepted:
                return

    def _measure(self, works: Seq[Work], kept: Seq[int], num_drafts: int, seconds: float) -> None:
        if self._drafted and not num_drafts:  # there was no room for them
            return
        plain = self.controller.plain_seconds(len(works))
        self.controller.learn(
            Measured(
                len(works),
                num_drafts,
                sum(kept),
                seconds,
                self._draft_depth,
                self._draft_seconds,
                self._num_slept,
            )
        )
        if num_drafts and plain is not None:
            for work, count in zip(works, kept, strict=True):
                seq = work.sequence
                seq.saved_seconds = (seq.saved_seconds or 0.0) + count * plain - seconds


def leaves_room(model: CausalLM, max_context: int, max_bytes: int | None, max_sequences: int) -> bool:
    """Whether nearly as long texts fit ``max_bytes`` with room in the rows for drafts as without."""
    try:
        plain, _ = divide(CacheSize.of(model), max_context, max_bytes, max_sequences)
        drafting, _ = divide(CacheSize.of(model, MAX_DEPTH), max_context, max_bytes, max_sequences)
    except MemoryBudgetError:
        return False
    return drafting >= _LEAST_CONTEXT * min(plain, num_blocks(max_context))
