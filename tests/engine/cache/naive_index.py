"""The prefix index without any search structure: it looks at every snapshot and every child."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from godwit.engine.cache.nodes import Node, Snapshot
from godwit.engine.cache.pools import BlockPool
from godwit.engine.cache.prefix import Hit, PrefixIndex


class NaiveIndex(PrefixIndex):
    """Must give the same hits and evict the same nodes as :class:`PrefixIndex`."""

    def __init__(self, pool: BlockPool, *, recurrent: bool, max_bytes: int) -> None:
        super().__init__(pool, recurrent=recurrent, max_bytes=max_bytes)
        self.kept: list[Node] = []

    def _resume(self, path: list[Node], ids: Sequence[int]) -> Hit:
        known = path[-1].position if path else 0
        for above in reversed(path):
            partial = sorted((n for n in above.children if not n.is_full), key=lambda n: -n.position)
            for node in (*partial, above):
                if node is not above and tuple(ids[above.position : node.position]) != node.tokens:
                    continue
                kept = node.snapshot
                if kept and (node.position < len(ids) or kept.logits is not None):
                    return Hit(node.position, node, "", known)
        return Hit(0, None, "", known)

    def _attach(self, node: Node, snapshot: Snapshot) -> bool:
        if not self._make_room(snapshot.nbytes):
            self._demote(node)
            return False
        node.snapshot = snapshot
        self.kept.append(node)
        self.stats.num_snapshots += 1
        self.stats.snapshot_bytes += snapshot.nbytes
        return True

    def _make_room(self, num_bytes: int) -> bool:
        if num_bytes > self.max_bytes:
            return False
        while self.stats.snapshot_bytes + num_bytes > self.max_bytes:
            node = min(self.kept, key=self._value)
            self._drop_snapshot(node)
            self.stats.num_evicted_snapshots += 1
            self._demote(node)
        return True

    def _value(self, node: Node) -> Fraction:
        assert node.snapshot is not None
        before = max((other.position for other in self.kept if begins(node, other)), default=0)
        return Fraction(
            node.position - before, max(1, node.snapshot.nbytes) * (1 + self._clock - node.last_used)
        )

    def _drop_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self.kept.remove(node)
            self.stats.num_snapshots -= 1
            self.stats.snapshot_bytes -= node.snapshot.nbytes
            node.snapshot = None


def begins(node: Node, other: Node) -> bool:
    """Whether the text of ``node`` begins with the shorter one of ``other``."""
    (*_, own_top), (*_, other_top) = node.ancestors(), other.ancestors()
    same_root = own_top.parent is other_top.parent
    text, start = whole(node), whole(other)
    return same_root and len(start) < len(text) and text[: len(start)] == start


def whole(node: Node) -> tuple[int, ...]:
    return tuple(token for each in [*node.ancestors()][::-1] for token in each.tokens)
