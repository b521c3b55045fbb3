"""Drafts from the text itself: what followed the last time that the newest tokens stood there."""

from __future__ import annotations

#: Lengths of the beginnings that are looked up, the longest first.
LONG, SHORT = 6, 3
#: Tokens that are compared at most to tell how long a match is.
MAX_MATCH = 16
#: Tokens that are indexed at most in one call, so that a long prompt holds nobody up.
MAX_INDEXED = 4096


class PromptLookup:
    """The n-grams of one sequence and where each stood last; work per token is bounded, and small."""

    def __init__(self) -> None:
        self._long: dict[tuple[int, ...], int] = {}
        self._short: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def match(self, ids: list[int]) -> tuple[int, int]:
        """Where a text like the end of ``ids`` went on, and how many tokens agree; (0, 0): nowhere."""
        if self._num_indexed < len(ids):
            self._index(ids)
        place = self._short.get(tuple(ids[-SHORT:]), 0)
        if not place:
            return 0, 0
        place = self._long.get(tuple(ids[-LONG:]), place)
        return place, _agreeing(ids, place)

    def _index(self, ids: list[int]) -> None:
        """Take in all but the newest n-grams, of which nothing is known to follow."""
        end = min(len(ids), self._num_indexed + MAX_INDEXED)
        short, long = self._short, self._long
        for place in range(max(SHORT, self._num_indexed), end):
            short[tuple(ids[place - SHORT : place])] = place
            if place >= LONG:
                long[tuple(ids[place - LONG : place])] = place
        self._num_indexed = end


def _agreeing(ids: list[int], place: int) -> int:
    """How many tokens before ``place`` are those at the end of ``ids``."""
    most = min(place, MAX_MATCH)
    newest, earlier = ids[-most:], ids[place - most : place]
    if newest == earlier:
        return most
    return next(i for i in range(most) if newest[-1 - i] != earlier[-1 - i])


def continuation(ids: list[int], place: int, count: int) -> list[int]:
    """``count`` tokens from ``place`` on; where they reach the end of ``ids``, they repeat."""
    drafts = ids[place : place + count]
    while len(drafts) < count:
        drafts.append(drafts[place + len(drafts) - len(ids)])
    return drafts
