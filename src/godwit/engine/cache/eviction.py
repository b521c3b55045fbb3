"""EvictionOrder: which snapshot to drop first."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from godwit.engine.cache.nodes import Node


@dataclass(frozen=True, slots=True)
class _Entry:
    """A node as it was when it was entered; ``number`` breaks ties in favour of older snapshots."""

    node: Node
    number: int
    saved_tokens: int
    nbytes: int
    last_used: int

    @property
    def is_current(self) -> bool:
        return (self.node.last_used, self.node.saved_tokens) == (self.last_used, self.saved_tokens)


class EvictionOrder:
    """Finds the snapshot of least value: tokens saved per byte and per tick of the clock since its last use.

    Values decay at different rates, so their order changes as time passes. The nodes stand at the leaves of a
    tournament tree; each match keeps its winner (the lesser value) and the time at which the result changes,
    so that only changed matches are played again: O(log n) per change, amortized.

    An entry may be out of date only if the value has grown since: it then wins too early and is renewed.
    After a value has shrunk, call :meth:`put` again.
    """

    def __init__(self) -> None:
        self._num_leaves = 1
        self._winners: list[_Entry | None] = [None, None]  # of the match i: of those of 2i and 2i + 1
        self._changes: list[float] = [inf, inf]
        self._leaf_of: dict[Node, int] = {}
        self._free = [1]
        self._count = 0

    def __len__(self) -> int:
        return len(self._leaf_of)

    def put(self, node: Node, clock: int) -> None:
        """Enter a node that has a snapshot, or its new value."""
        leaf = self._leaf_of.get(node)
        if leaf is None:
            if not self._free:
                self._grow(clock)
            leaf = self._leaf_of[node] = self._free.pop()
            self._count += 1
        known = self._winners[leaf]
        number = self._count if known is None else known.number
        nbytes = 1 if node.snapshot is None else max(1, node.snapshot.nbytes)
        self._set(leaf, _Entry(node, number, node.saved_tokens, nbytes, node.last_used), clock)

    def remove(self, node: Node, clock: int) -> None:
        leaf = self._leaf_of.pop(node)
        self._set(leaf, None, clock)
        self._free.append(leaf)

    def least(self, clock: int) -> Node:
        """The node of least value.

        Raises:
            LookupError: there is none.
        """
        while True:
            self._update(1, clock)
            entry = self._winners[1]
            if entry is None:
                raise LookupError("there are no snapshots")
            if entry.is_current:
                return entry.node
            self.put(entry.node, clock)

    def _grow(self, clock: int) -> None:
        """Double the number of leaves."""
        first = self._num_leaves
        entries = self._winners[first:]
        self._num_leaves = 2 * first
        self._winners = [None] * self._num_leaves + entries + [None] * first
        self._changes = [inf] * (2 * self._num_leaves)
        self._leaf_of = {node: leaf + first for node, leaf in self._leaf_of.items()}
        self._free = list(range(self._num_leaves + first, 2 * self._num_leaves))[::-1]
        for match in range(self._num_leaves - 1, 0, -1):
            self._play(match, clock)

    def _set(self, leaf: int, entry: _Entry | None, clock: int) -> None:
        self._winners[leaf] = entry
        while leaf > 1:
            leaf //= 2
            self._play(leaf, clock)

    def _update(self, match: int, clock: int) -> None:
        """Play again what has changed by now."""
        if self._changes[match] <= clock:
            self._update(2 * match, clock)
            self._update(2 * match + 1, clock)
            self._play(match, clock)

    def _play(self, match: int, clock: int) -> None:
        left, right = 2 * match, 2 * match + 1
        winner, change = _compare(self._winners[left], self._winners[right], clock)
        self._winners[match] = winner
        self._changes[match] = min(change, self._changes[left], self._changes[right])


def _compare(one: _Entry | None, other: _Entry | None, clock: int) -> tuple[_Entry | None, float]:
    """The entry of lesser value, and the clock at which it will no longer be that.

    A value is ``saved_tokens / (nbytes * age)``; both are multiplied by all divisors, to compare integers.
    """
    if one is None or other is None:
        return one or other, inf
    a, b = one.saved_tokens * other.nbytes, other.saved_tokens * one.nbytes
    lead = (1 + clock - one.last_used) * b - (1 + clock - other.last_used) * a
    if lead < 0 or (lead == 0 and other.number < one.number):
        one, other, a, b, lead = other, one, b, a, -lead
    if b >= a:  # the lead never shrinks
        return one, inf
    ticks = lead // (a - b) + 1 if one.number < other.number else -(-lead // (a - b))
    return one, clock + ticks
