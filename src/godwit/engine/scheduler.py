"""The scheduler: which sequences run in the next step. It handles numbers only, no tensors."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from godwit.engine.cache import num_blocks
from godwit.models.batch import BLOCK_SIZE

#: Prompts are not split into smaller pieces than this just to serve more of them in one step.
MIN_PIECE = 16
#: A shared prefix shorter than this is not worth waiting for, nor a cut.
MIN_SHARED = 64
#: Waiting sequences considered for admission in one step.
_MAX_CONSIDERED = 32


@dataclass(eq=False)
class Sequence:
    """One request's tokens and how far they are computed.

    Attributes:
        number: order of arrival.
        ids: prompt and answer so far.
        num_prompt: length of the prompt.
        limit: maximum length of prompt and answer together.
        cuts: positions, ascending, at which a step must end because the state there is kept.
        num_computed: ids that are in the caches; the newest id of an answer is not.
        slot: its number in the caches while it runs.
        chain: keys of its full blocks, as many as were needed so far.
        num_committed: its blocks that are in the prefix index.
        saved_seconds: estimated time saved by drafts; None if there is no estimate.
        scored: the whole prompt is read, cached or not, to score each of its tokens.
    """

    number: int
    ids: list[int]
    num_prompt: int
    limit: int
    salt: str = ""
    priority: int = 0
    cuts: list[int] = field(default_factory=list)
    num_computed: int = 0
    slot: int | None = None
    chain: list[bytes] = field(default_factory=list)
    num_committed: int = 0
    num_preemptions: int = 0
    saved_seconds: float | None = None
    scored: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Sequences of lower rank are served first."""
        return -self.priority, self.number

    @property
    def remaining(self) -> int:
        return len(self.ids) - self.num_computed

    @property
    def blocks_to_come(self) -> int:
        """Blocks it still needs to produce its next token."""
        return num_blocks(len(self.ids) + 1) - num_blocks(self.num_computed)

    @property
    def longest_piece(self) -> int:
        """The most tokens that one step may read."""
        place = bisect_right(self.cuts, self.num_computed)
        end = min([*self.cuts[place : place + 1], len(self.ids)])
        return end - self.num_computed

    def add_cut(self, position: int) -> None:
        """Make a step end at ``position``."""
        if position not in self.cuts:
            insort(self.cuts, position)

    def is_cut(self, position: int) -> bool:
        place = bisect_left(self.cuts, position)
        return self.cuts[place : place + 1] == [position]

    def restart(self) -> None:
        """Nothing of it is in the caches any more."""
        self.slot = None
        self.num_computed = self.num_committed = 0

    def shared_with(self, other: Sequence) -> int:
        """Length of the common prefix, as far as both chains are known."""
        if self.salt != other.salt:
            return 0
        low, high = 0, min(len(self.chain), len(other.chain))
        while low < high:
            middle = (low + high + 1) // 2
            if self.chain[middle - 1] == other.chain[middle - 1]:
                low = middle
            else:
                high = middle - 1
        start, end = low * BLOCK_SIZE, min(len(self.ids), len(other.ids), (low + 1) * BLOCK_SIZE)
        return next((i for i in range(start, end) if self.ids[i] != other.ids[i]), end)


class Memory(Protocol):
    """Allocates rows and blocks for sequences; ``remembers``: later sequences can reuse earlier ones."""

    remembers: bool

    def admit(self, seq: Sequence, reserve: int, *, alone: bool) -> bool:
        """Give ``seq`` a row and the cached part of its prefix.

        Returns False unless ``reserve`` blocks would remain besides those that it needs. A sequence that is
        ``alone`` gives up reuse rather than wait.
        """
        ...

    def is_loading(self, seq: Sequence) -> bool:
        """Whether the beginning of ``seq`` is still being read from a file; admit it afterwards."""
        ...

    def known(self, seq: Sequence) -> int:
        """Tokens of ``seq`` that are cached now."""
        ...

    def extend(self, seq: Sequence, count: int) -> bool:
        """Allocate room for ``count`` more tokens; False if there is none."""
        ...

    def release(self, seq: Sequence) -> None:
        """Free all it has; what is computed may be kept for reuse."""
        ...


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step: run ``tokens``, of which the last ``num_drafts`` are drafts."""

    sequence: Sequence
    tokens: list[int]
    num_drafts: int = 0

    @property
    def reaches_end(self) -> bool:
        """Whether the step yields the scores of the next unknown token."""
        seq = self.sequence
        return seq.num_computed + len(self.tokens) - self.num_drafts == len(seq.ids)


@dataclass
class Plan:
    """A step: its works, and the sequences that came and went.

    Attributes:
        failed: sequences for which the memory raised an error. The scheduler has dropped them; what they
            still hold is the caller's to free.
    """

    works: list[Work] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)

    def drop(self, seq: Sequence) -> None:
        """Take its work out of the step."""
        self.works = [work for work in self.works if work.sequence is not seq]


Draft = Callable[[Sequence], list[int]]


class Scheduler:
    """Plans steps: one token for every running answer, then pieces of prompts within the rest of the budget.

    Prompts share the budget evenly; what short ones leave goes to the others. When blocks run out, the
    youngest sequence is preempted: it waits in its old place and is computed again. No request overtakes one
    that waits for memory, except by priority. A request waits while another one reads the prefix they share.
    """

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._turn = 0

    def add(self, seq: Sequence) -> None:
        """Queue ``seq``."""
        insort(self.waiting, seq, key=lambda waiting: waiting.rank)

    def remove(self, seq: Sequence) -> None:
        """Drop ``seq``, running or waiting."""
        (self.running if seq in self.running else self.waiting).remove(seq)

    def plan(self, memory: Memory, budget: int, draft: Draft | None = None) -> Plan:
        """The next step.

        Args:
            memory: allocates rows and blocks. Where it raises an error, only the sequence concerned fails.
            budget: the step's tokens. Answers come first; prompts get at least a few tokens even beyond it.
            draft: guesses the next ids of a sequence.
        """
        plan = Plan()
        for seq in [seq for seq in self.running if seq.remaining == 1]:
            if not (plan.preempted or plan.failed) or seq in self.running:
                with self._guard(seq, plan):
                    self._decode(seq, memory, plan, draft)
        if self.waiting and not plan.preempted:
            self._admit(memory, plan)
        if len(plan.works) == len(self.running):
            return plan
        used = sum(len(work.tokens) for work in plan.works)
        for seq, count in self._shares(max(budget - used, min(budget, MIN_PIECE)), plan):
            if seq not in self.running:
                continue
            with self._guard(seq, plan):
                if self._make_room(seq, count, memory, plan):
                    plan.works.append(Work(seq, seq.ids[seq.num_computed : seq.num_computed + count]))
        return plan

    @contextmanager
    def _guard(self, seq: Sequence, plan: Plan) -> Iterator[None]:
        """An error inside fails ``seq`` alone."""
        try:
            yield
        except Exception as error:
            self.remove(seq)
            plan.drop(seq)
            plan.failed.append((seq, error))

    def _decode(self, seq: Sequence, memory: Memory, plan: Plan, draft: Draft | None) -> None:
        drafts = draft(seq) if draft is not None and len(seq.ids) > seq.num_prompt else []
        if drafts and not memory.extend(seq, 1 + len(drafts)):
            drafts = []
        if drafts or self._make_room(seq, 1, memory, plan):
            plan.works.append(Work(seq, [seq.ids[-1], *drafts], len(drafts)))

    def _make_room(self, seq: Sequence, count: int, memory: Memory, plan: Plan) -> bool:
        """Extend ``seq``, preempting younger ones if need be; False if it was preempted itself."""
        while not memory.extend(seq, count):
            victim = self.running[-1]
            with self._guard(victim, plan):
                self._preempt(victim, memory, plan)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence, memory: Memory, plan: Plan) -> None:
        memory.release(seq)
        self.running.remove(seq)
        self.add(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        plan.drop(seq)
        plan.preempted.append(seq)

    def _admit(self, memory: Memory, plan: Plan) -> None:
        place = 0
        while place < min(len(self.waiting), _MAX_CONSIDERED) and len(self.running) < self.max_running:
            head = self.waiting[place]
            with self._guard(head, plan):
                if self._is_being_read(head, memory) or memory.is_loading(head):
                    place += 1
                    continue
                # What running sequences need for their next tokens, and one more block for each.
                reserve = sum(seq.blocks_to_come for seq in self.running) + len(self.running)
                if not memory.admit(head, reserve, alone=not self.running):
                    return
                self.waiting.pop(place)
                insort(self.running, head, key=lambda running: running.rank)
                plan.admitted.append(head)

    def _is_being_read(self, seq: Sequence, memory: Memory) -> bool:
        """Whether a running sequence is about to compute much of the prefix of ``seq``."""
        if not memory.remembers or not self.running or seq.scored:
            return False
        known = memory.known(seq)
        for other in self.running:
            target = seq.shared_with(other)
            if target == len(seq.ids) != other.num_prompt:
                target -= 1  # the scores after the last token are not kept there
            if other.num_computed >= target or target - known < MIN_SHARED:
                continue
            other.add_cut(target)
            return True
        return False

    def _shares(self, budget: int, plan: Plan) -> list[tuple[Sequence, int]]:
        """Prompts and how many of their tokens to read, in turns if the budget is too small for all."""
        planned = {work.sequence for work in plan.works}
        reading = [seq for seq in self.running if seq.remaining and seq not in planned]
        room = max(1, budget // MIN_PIECE)
        if len(reading) > room:
            first = self._turn % len(reading)
            reading = (reading + reading)[first : first + room]
            self._turn += room
        shares = list[tuple[Sequence, int]]()
        for seq in sorted(reading, key=lambda seq: seq.longest_piece):
            count = min(seq.longest_piece, max(1, budget // (len(reading) - len(shares))))
            shares.append((seq, count))
            budget -= count
        return sorted(shares, key=lambda share: share[0].rank)
