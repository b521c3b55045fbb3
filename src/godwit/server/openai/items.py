"""Items of recent responses, so that a request can reference them instead of sending them back."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

MAX_BYTES = 32 << 20


class ItemStore:
    """Items by client and id. The least recently used are dropped. Not thread-safe.

    Args:
        max_bytes: of all items together, as JSON.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._items: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._size = 0

    def put(self, owner: str, item: Mapping[str, Any]) -> None:
        """Keep an item, which has an ``id``, for requests of the same owner."""
        data = json.dumps(item, ensure_ascii=False).encode("utf-8", "replace")
        self._drop((owner, item["id"]))
        self._items[owner, item["id"]] = data
        self._size += len(data)
        while self._size > self._max_bytes:
            self._drop(next(iter(self._items)))

    def get(self, owner: str, id: str) -> dict[str, Any] | None:
        """The item, if it is still there."""
        data = self._items.get((owner, id))
        if data is None:
            return None
        self._items.move_to_end((owner, id))
        found: dict[str, Any] = json.loads(data)
        return found

    def _drop(self, place: tuple[str, str]) -> None:
        self._size -= len(self._items.pop(place, b""))
