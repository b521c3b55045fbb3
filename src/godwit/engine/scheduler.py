"""Who runs in the next step: sequences that wait, run, or had to make room. Numbers only, no tensors."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from godwit.engine.cache import num_blocks
from godwit.models.batch import BLOCK_SIZE

#: A piece of a prompt is not cut smaller than this only to serve more prompts in the same step.
MIN_PIECE = 16
#: Fewer tokens than these are not worth waiting for until another sequence has read them, nor a cut.
MIN_SHARED = 64
#: Waiting sequences that are looked at in a step.
_MAX_LOOKED_AT = 32


@dataclass(eq=False)
class Sequence:
    """One request's tokens and how far they are computed.

    Attributes:
        number: place in the order of arrival.
        ids: prompt and answer so far.
        num_prompt: ids that are the prompt.
        limit: prompt and answer end here at the latest.
        cuts: positions, ascending, at which a step has to end because the state there is wanted.
        num_computed: ids that are in the caches; an answer's newest is not.
        slot: its number in the caches while it runs.
        chain: keys of its full blocks, as far as they were needed.
        num_committed: blocks of it that the prefix index knows.
        saved_seconds: how much sooner its tokens came thanks to drafts, as it is estimated; None: no basis.
        scored: its prompt is read from the start, whatever is cached: each of its tokens is to be judged.
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
        """Smaller is served first."""
        return -self.priority, self.number

    @property
    def remaining(self) -> int:
        return len(self.ids) - self.num_computed

    @property
    def blocks_to_come(self) -> int:
        """More blocks than it has, until it can give out its next token."""
        return num_blocks(len(self.ids) + 1) - num_blocks(self.num_computed)

    @property
    def longest_piece(self) -> int:
        """Tokens that one step may read at most."""
        place = bisect_right(self.cuts, self.num_computed)
        end = min([*self.cuts[place : place + 1], len(self.ids)])
        return end - self.num_computed

    def add_cut(self, position: int) -> None:
        """Let a step end at ``position``."""
        if position not in self.cuts:
            insort(self.cuts, position)

    def is_cut(self, position: int) -> bool:
        place = bisect_left(self.cuts, position)
        return self.cuts[place : place + 1] == [position]

    def shared_with(self, other: Sequence) -> int:
        """Tokens with which both begin, as far as their keys were needed."""
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
    """Where sequences get their rows and blocks from; ``remembers``: later ones profit from earlier ones."""

    remembers: bool

    def admit(self, seq: Sequence, reserve: int, *, alone: bool) -> bool:
        """Give ``seq`` a row and what is known of its beginning.

        It is refused if, besides the blocks that it will need, fewer than ``reserve`` could be had. For one
        that is ``alone`` less reuse is better than waiting.
        """
        ...

    def is_loading(self, seq: Sequence) -> bool:
        """Whether the beginning of ``seq`` is still being read from a file; admit it afterwards."""
        ...

    def known(self, seq: Sequence) -> int:
        """Tokens of ``seq`` that would need no work now."""
        ...

    def extend(self, seq: Sequence, count: int) -> bool:
        """Room for ``count`` more tokens, if there is any."""
        ...

    def release(self, seq: Sequence) -> None:
        """Take back all it has; what is computed may be remembered."""
        ...


@dataclass(frozen=True)
class Work:
    """What a step does with one sequence: run ``tokens``, of which the last ``num_drafts`` are guesses."""

    sequence: Sequence
    tokens: list[int]
    num_drafts: int = 0

    @property
    def reaches_end(self) -> bool:
        """Whether the step tells the token after all that are known."""
        seq = self.sequence
        return seq.num_computed + len(self.tokens) - self.num_drafts == len(seq.ids)


@dataclass
class Plan:
    """A step: its works, and who came and went for it."""

    works: list[Work] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


Draft = Callable[[Sequence], list[int]]


class Scheduler:
    """Plans steps: first a token for every running answer, then pieces of prompts in what the budget leaves.

    Prompts share the budget evenly, and what short ones leave goes to the others. When blocks run out, the
    youngest sequence makes room; it waits at its old place in the order and is computed again. Nobody
    overtakes a request that waits for memory, except by priority. A request whose beginning another one is
    just reading waits for that.
    """

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._turn = 0

    def add(self, seq: Sequence) -> None:
        """Let ``seq`` wait for its turn."""
        insort(self.waiting, seq, key=lambda waiting: waiting.rank)

    def remove(self, seq: Sequence) -> None:
        """Forget ``seq``, wherever it is."""
        (self.running if seq in self.running else self.waiting).remove(seq)

    def plan(self, memory: Memory, budget: int, draft: Draft | None = None) -> Plan:
        """The next step.

        Args:
            memory: gives and takes rows and blocks.
            budget: tokens that the step should have at most; answers come first, and prompts get some in any
                case.
            draft: guesses how the ids of a sequence go on.
        """
        plan = Plan()
        for seq in [seq for seq in self.running if seq.remaining == 1]:
            if not plan.preempted or seq in self.running:
                self._decode(seq, memory, plan, draft)
        if self.waiting and not plan.preempted:
            self._admit(memory, plan)
        if len(plan.works) == len(self.running):
            return plan
        used = sum(len(work.tokens) for work in plan.works)
        for seq, count in self._shares(max(budget - used, min(budget, MIN_PIECE)), plan):
            if seq in self.running and self._make_room(seq, count, memory, plan):
                plan.works.append(Work(seq, seq.ids[seq.num_computed : seq.num_computed + count]))
        return plan

    def _decode(self, seq: Sequence, memory: Memory, plan: Plan, draft: Draft | None) -> None:
        drafts = draft(seq) if draft is not None and len(seq.ids) > seq.num_prompt else []
        if drafts and not memory.extend(seq, 1 + len(drafts)):
            drafts = []
        if drafts or self._make_room(seq, 1, memory, plan):
            plan.works.append(Work(seq, [seq.ids[-1], *drafts], len(drafts)))

    def _make_room(self, seq: Sequence, count: int, memory: Memory, plan: Plan) -> bool:
        """Extend ``seq``, at the cost of younger ones; False if it had to go itself."""
        while not memory.extend(seq, count):
            victim = self.running[-1]
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
        plan.works = [work for work in plan.works if work.sequence is not seq]
        plan.preempted.append(seq)

    def _admit(self, memory: Memory, plan: Plan) -> None:
        place = 0
        while place < min(len(self.waiting), _MAX_LOOKED_AT) and len(self.running) < self.max_running:
            head = self.waiting[place]
            if self._is_being_read(head, memory) or memory.is_loading(head):
                place += 1
                continue
            # What those who run will need before they give out tokens, and a block for each to go on with.
            reserve = sum(seq.blocks_to_come for seq in self.running) + len(self.running)
            if not memory.admit(head, reserve, alone=not self.running):
                return
            self.waiting.pop(place)
            insort(self.running, head, key=lambda running: running.rank)
            plan.admitted.append(head)

    def _is_being_read(self, seq: Sequence, memory: Memory) -> bool:
        """Whether a running sequence is about to compute much of what ``seq`` begins with."""
        if not memory.remembers or not self.running or seq.scored:
            return False
        known = memory.known(seq)
        for other in self.running:
            target = seq.shared_with(other)
            if target == len(seq.ids) != other.num_prompt:
                target -= 1  # what follows the last token is not kept there
            if other.num_computed >= target or target - known < MIN_SHARED:
                continue
            other.add_cut(target)
            return True
        return False

    def _shares(self, budget: int, plan: Plan) -> list[tuple[Sequence, int]]:
        """Prompts and how many of their tokens to read; in turns where the budget is too small for all."""
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
