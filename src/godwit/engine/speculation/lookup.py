"""Drafts from the text itself: what followed when the newest tokens last occurred."""

from __future__ import annotations

from collections.abc import Mapping

from godwit.engine.scheduler import Sequence
from godwit.engine.speculation.estimates import Acceptance
from godwit.engine.speculation.source import DraftSource

#: Tokens that have to agree before what followed them is drafted.
NGRAM = 3
#: Drafts are told apart by how many in a row were right before, up to this many.
MAX_STREAK = 4
#: Tokens indexed at most in one call, so that a long prompt does not delay a step.
MAX_INDEXED = 4096


class TextIndex:
    """The n-grams of one sequence and where each last occurred.

    While its predictions are right it follows the same earlier passage; after a wrong one it looks up the
    newest n-gram. Every token of an answer is compared with its prediction, whether it was drafted or not.
    """

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self.streak = 0
        self.num_indexed = 0
        self._places: dict[tuple[int, ...], int] = {}
        self._next: int | None = None

    def predict(self, ids: list[int], num_prompt: int) -> int | None:
        """The position in ``ids`` whose token is expected to follow next; None: no earlier passage agrees."""
        end = min(len(ids), self.num_indexed + MAX_INDEXED)
        for position in range(self.num_indexed, end):
            if position >= num_prompt:
                self._compare(ids, position)
            if position >= NGRAM:
                self._places[tuple(ids[position - NGRAM : position])] = position
        self.num_indexed = end
        return self._find(ids, len(ids)) if end == len(ids) else None

    def rates(self, count: int) -> list[float]:
        """Probabilities of the next ``count`` predictions, each if those before it are right."""
        return [self.acceptance.rate(min(self.streak + i, MAX_STREAK)) for i in range(count)]

    def _find(self, ids: list[int], end: int) -> int | None:
        if self._next is not None:
            return self._next
        return self._places.get(tuple(ids[end - NGRAM : end])) if end >= NGRAM else None

    def _compare(self, ids: list[int], position: int) -> None:
        place = self._find(ids, position)
        if place is None:
            return
        right = ids[place] == ids[position]
        self.acceptance.learn(min(self.streak, MAX_STREAK), right)
        self.streak = self.streak + 1 if right else 0
        self._next = place + 1 if right else None


def continuation(ids: list[int], place: int, count: int) -> list[int]:
    """``count`` tokens from ``place`` on; where they reach the end of ``ids``, they repeat."""
    period = len(ids) - place
    return [ids[place + i % period] for i in range(count)]


class LookupDrafts(DraftSource):
    """Prompt lookup for all sequences.

    Args:
        acceptance: what was learned from earlier sequences.
    """

    def __init__(self, acceptance: Acceptance) -> None:
        self._acceptance = acceptance
        self.indexes: dict[Sequence, TextIndex] = {}

    def rates(self, seq: Sequence, limit: int) -> list[float]:
        index = self.indexes.get(seq)
        if index is None:
            index = self.indexes[seq] = TextIndex(Acceptance(self._acceptance))
        return [] if index.predict(seq.ids, seq.num_prompt) is None else index.rates(limit)

    def draft(self, depths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        drafts = {}
        for seq, depth in depths.items():
            place = self.indexes[seq].predict(seq.ids, seq.num_prompt)
            if place is not None:
                drafts[seq] = continuation(seq.ids, place, depth)
        return drafts

    def forget(self, seq: Sequence) -> None:
        self.indexes.pop(seq, None)
