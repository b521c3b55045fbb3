"""A bounded cache of texts: verdicts on grammars and conversions of them, but nothing compiled."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from hashlib import sha256

MAX_ENTRIES = 2048
MAX_BYTES = 4 << 20
#: Bytes of an entry besides its text.
ENTRY_BYTES = 256


class TextCache:
    """Texts by the hash of their subject; the least recently used are dropped. Thread-safe.

    Args:
        max_entries, max_bytes: limits.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._texts: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, subject: str) -> str | None:
        """The text of a subject, or None."""
        with self._lock:
            key = _key(subject)
            text = self._texts.get(key)
            if text is not None:
                self._texts.move_to_end(key)
            return text

    def put(self, subject: str, text: str) -> None:
        """Store a text."""
        with self._lock:
            key = _key(subject)
            self.num_bytes -= _size(self._texts.pop(key, None))
            self._texts[key] = text
            self.num_bytes += _size(text)
            while len(self._texts) > self.max_entries or self.num_bytes > self.max_bytes:
                self.num_bytes -= _size(self._texts.popitem(last=False)[1])


def _key(subject: str) -> bytes:
    return sha256(subject.encode("utf-8", "surrogatepass")).digest()


def _size(text: str | None) -> int:
    return 0 if text is None else sys.getsizeof(text) + ENTRY_BYTES
