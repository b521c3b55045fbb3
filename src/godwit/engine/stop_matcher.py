"""Stop texts: what of an answer can be shown before one of them."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on up to the first stop text, and holds back what may still become one.

    The stop text that is complete first ends the answer, and of several that end at the same character the
    longest; so the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now; nothing more once :attr:`matched` is set."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops]
        found = [(place + len(stop), place, stop) for place, stop in places if place >= 0]
        if found:
            _, place, self.matched = min(found)
            shown, self._held = self._held[:place], ""
            return shown
        return self._release(len(self._held) - open_end(self._held, self._stops))

    def flush(self) -> str:
        """The rest, when no more text comes."""
        return self._release(len(self._held))

    def _release(self, size: int) -> str:
        shown, self._held = self._held[:size], self._held[size:]
        return shown


def open_end(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which one of the tags begins."""
    sizes = [size for tag in tags for size in range(1, len(tag)) if text.endswith(tag[:size])]
    return max(sizes, default=0)
