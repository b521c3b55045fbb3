"""PrefixIndex: prefixes of texts whose keys, values and states are cached.

A tree: a node stands for a full block of 16 tokens after its parent's text and holds the pool's block with
their keys and values. A recurrent state cannot be cropped, so it is copied at chosen positions (a snapshot),
and a text can only be resumed where there is both. A snapshot may lie inside a block; then a leaf of fewer
than 16 tokens holds that block. A sequence that resumes there copies the block, since it writes to the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import takewhile

from torch import Tensor

from godwit.engine.cache.eviction import EvictionOrder
from godwit.engine.cache.hybrid import StateSnapshot
from godwit.engine.cache.nodes import Node, Snapshot, extend_chain, node_key, pack, root_key
from godwit.engine.cache.pools import BlockPool
from godwit.models.batch import BLOCK_SIZE


@dataclass(frozen=True)
class Hit:
    """The cached prefix of a text.

    Attributes:
        position: its length in tokens: where the text can be resumed, at ``node``.
        note: why it is not longer.
        known: tokens whose keys and values are cached; with a snapshot there, more could be reused.
    """

    position: int
    node: Node | None
    note: str
    known: int = 0


@dataclass
class PrefixStats:
    """What the index holds, and what it has evicted since the start."""

    num_blocks: int = 0
    num_snapshots: int = 0
    snapshot_bytes: int = 0
    num_evicted_blocks: int = 0
    num_evicted_snapshots: int = 0


class PrefixIndex:
    """Finds and keeps cached prefixes. Its blocks can be evicted when sequences need them.

    Args:
        pool: the blocks; the index counts as one user of each block that a node holds.
        recurrent: whether texts can only be resumed at a snapshot.
        max_bytes: for all snapshots together.
    """

    def __init__(self, pool: BlockPool, *, recurrent: bool, max_bytes: int) -> None:
        self.pool = pool
        self.recurrent = recurrent
        self.max_bytes = max_bytes
        self.stats = PrefixStats()
        self._nodes: dict[bytes, Node] = {}
        self._held: Counter[int] = Counter()
        self._snapshots = EvictionOrder()
        self._leaves: list[tuple[int, int, Node]] = []  # a heap; some entries are out of date
        self._pushes = 0
        self._clock = 0

    # looking up

    def match(self, ids: Sequence[int], salt: str, chain: list[bytes]) -> Hit:
        """The longest prefix of ``ids`` that can be resumed; missing keys are appended to ``chain``."""
        extend_chain(chain, ids, salt)
        path = self._known(chain, ids, salt)
        return self._resume(path, ids) if self.recurrent else self._whole_blocks(path, ids)

    def use(self, hit: Hit) -> None:
        """Advance the clock and, if there was a hit, mark its nodes as used."""
        self._clock += 1
        if hit.node is not None:
            self._touch(hit.node)

    def _known(self, chain: Sequence[bytes], ids: Sequence[int], salt: str) -> list[Node]:
        root = self._nodes.get(root_key(salt))
        path = [root] if root is not None else []
        for index, key in enumerate(chain):
            node = self._nodes.get(key)
            tokens = tuple(ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            if node is None or node.tokens != tokens:
                break
            path.append(node)
        return path

    def _whole_blocks(self, path: list[Node], ids: Sequence[int]) -> Hit:
        # The last token has to be computed again, for its logits.
        usable = path[: 1 + (len(ids) - 1) // BLOCK_SIZE]
        if len(usable) < 2:
            return Hit(0, None, _reason(0, 0, len(ids), BLOCK_SIZE))
        position = usable[-1].position
        return Hit(position, usable[-1], _reason(position, position, len(ids), BLOCK_SIZE))

    def _resume(self, path: list[Node], ids: Sequence[int]) -> Hit:
        known = path[-1].position if path else 0
        for above in reversed(path):
            following = pack(ids[above.position : above.position + BLOCK_SIZE])
            for node in (*above.partial_prefixes(following), above):
                kept = node.snapshot
                if kept and (node.position < len(ids) or kept.logits is not None):
                    return Hit(node.position, node, _reason(node.position, known, len(ids), 1), known)
        return Hit(0, None, _reason(0, known, len(ids), 1), known)

    def end_of(self, ids: Sequence[int], salt: str, chain: Sequence[bytes]) -> Node | None:
        """The last node of ``ids`` at which a longer text could be resumed."""
        path = self._known(chain, ids, salt)
        if self.recurrent:
            return self._resume(path, [*ids, -1]).node
        return path[-1] if len(path) > 1 else None

    def contains(self, keys: Iterable[bytes]) -> bool:
        """Whether all these nodes are in the index."""
        return all(key in self._nodes for key in keys)

    def blocks_of(self, chain: Iterable[bytes]) -> list[int]:
        """The blocks of the nodes with these keys, up to the first that is missing."""
        nodes = takewhile(lambda node: node is not None, map(self._nodes.get, chain))
        return [node.block for node in nodes if node is not None]

    # adding

    def commit(
        self, ids: Sequence[int], salt: str, chain: list[bytes], blocks: list[int], first: int, end: int
    ) -> list[tuple[int, int]]:
        """Add the full blocks ``first`` to ``end`` of a sequence.

        Returns:
            (index, block): where the index already holds another block with the same content, to use instead.
        """
        extend_chain(chain, ids, salt)
        better = []
        for index in range(first, end):
            node = self._nodes.get(chain[index])
            if node is None:
                tokens = ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
                parent = self._nodes[chain[index - 1]] if index else self._root(root_key(salt))
                self._insert(chain[index], parent, tokens, blocks[index])
            elif node.block != blocks[index]:
                better.append((index, node.block))
        return better

    def add_snapshot(
        self,
        ids: Sequence[int],
        salt: str,
        chain: Sequence[bytes],
        blocks: Sequence[int],
        take: Callable[[], StateSnapshot],
        logits: Tensor | None = None,
    ) -> bool:
        """Keep the state after ``ids`` (at least one), whose full blocks are committed.

        Args:
            take: copies the state; called if there is no snapshot at this position yet.

        Returns:
            Whether there is a snapshot at this position now.
        """
        full, rest = divmod(len(ids), BLOCK_SIZE)
        node = self._nodes[chain[full - 1]] if full else self._root(root_key(salt))
        if rest:
            tail = ids[full * BLOCK_SIZE :]
            key = node_key(node.key, tail)
            node = self._nodes.get(key) or self._insert(key, node, tail, blocks[full])
        self._touch(node)
        old = node.snapshot
        if old is not None and (old.logits is not None or logits is None):
            return True
        self._drop_snapshot(node)
        kept = None if logits is None else logits.to("cpu", copy=True)
        return self._attach(node, Snapshot(take() if old is None else old.state, kept))

    def keep(self, chain: Sequence[bytes]) -> None:
        """Mark the known part of a text as used."""
        self._clock += 1
        for key in reversed(chain):
            if key in self._nodes:
                return self._touch(self._nodes[key])

    def can_graft(self, root: bytes, parent: bytes) -> bool:
        """Whether the node ``parent`` is in the index, or is the root itself."""
        return parent == root or parent in self._nodes

    def graft(
        self,
        root: bytes,
        parent: bytes,
        tokens: Sequence[tuple[int, ...]],
        keys: Sequence[bytes],
        blocks: Sequence[int],
        snapshot: Snapshot | None,
    ) -> bool:
        """Add a chain of nodes from elsewhere below ``parent``, with a snapshot at the last one.

        Returns:
            Whether texts can be resumed at the last one now.

        Raises:
            ValueError: the keys do not match the tokens.
        """
        expected = parent
        for key, part in zip(keys, tokens, strict=True):
            expected = node_key(expected, part)
            if key != expected or not 0 < len(part) <= BLOCK_SIZE:
                raise ValueError("its keys do not match its tokens")
        if any(len(part) < BLOCK_SIZE for part in tokens[:-1]):
            raise ValueError("a partial block is not the last one")
        node = self._nodes.get(parent) or self._root(root)
        for key, part, block in zip(keys, tokens, blocks, strict=True):
            node = self._nodes.get(key) or self._insert(key, node, part, block)
        if snapshot is not None and node.snapshot is None:
            self._attach(node, snapshot)
        elif not node.is_full and node.snapshot is None:
            self._remove(node)
        return node.alive and (node.snapshot is not None or not self.recurrent)

    def _root(self, key: bytes) -> Node:
        if key not in self._nodes:
            self._nodes[key] = Node(key, None, b"", -1, 0)
        return self._nodes[key]

    def _insert(self, key: bytes, parent: Node, tokens: Sequence[int], block: int) -> Node:
        node = Node(key, parent, pack(tokens), block, parent.position + len(tokens), last_used=self._clock)
        self.pool.share([block])
        self._held[block] += 1
        self._nodes[key] = node
        parent.add_child(node)
        self.stats.num_blocks += 1
        self._push(node)
        return node

    def _touch(self, node: Node) -> None:
        for each in node.ancestors():
            each.last_used = self._clock

    # snapshots

    def _attach(self, node: Node, snapshot: Snapshot) -> bool:
        if not self._make_room(snapshot.nbytes):
            self._demote(node)
            return False
        node.previous = next((prefix for prefix in node.prefixes() if prefix.snapshot), None)
        node.snapshot = snapshot
        self._snapshots.put(node, self._clock)
        for longer in node.next_snapshots():
            if longer.previous is node.previous:
                longer.previous = node
                self._snapshots.put(longer, self._clock)
        self.stats.num_snapshots += 1
        self.stats.snapshot_bytes += snapshot.nbytes
        return True

    def _make_room(self, num_bytes: int) -> bool:
        """Drop the snapshots of least value until ``num_bytes`` more fit."""
        if num_bytes > self.max_bytes:
            return False
        while self.stats.snapshot_bytes + num_bytes > self.max_bytes:
            node = self._snapshots.least(self._clock)
            self._drop_snapshot(node)
            self.stats.num_evicted_snapshots += 1
            self._demote(node)
        return True

    def _drop_snapshot(self, node: Node) -> None:
        if node.snapshot is None:
            return
        self._snapshots.remove(node, self._clock)
        self.stats.num_snapshots -= 1
        self.stats.snapshot_bytes -= node.snapshot.nbytes
        node.snapshot = None
        for longer in node.next_snapshots():
            if longer.previous is node:
                longer.previous = node.previous
        node.previous = None

    def _demote(self, node: Node) -> None:
        """After a node lost its snapshot: remove a partial block; let a leaf be evicted first."""
        if not node.is_full:
            self._remove(node)
        elif self.recurrent and not node.children and node.parent is not None:
            node.last_used = 0
            self._push(node)

    # eviction of blocks

    def evict(self, count: int) -> int:
        """Free up to ``count`` blocks that no sequence uses: leaves first, the least recently used first."""
        freed, in_use = 0, list[Node]()
        while freed < count and self._leaves:
            used, _, node = heappop(self._leaves)
            if not node.alive or node.children:
                continue
            if node.last_used > used:
                self._push(node)
            elif self.pool.num_users(node.block) > self._held[node.block]:
                in_use.append(node)
            else:
                freed += self._held[node.block] == 1
                self._drop_snapshot(node)
                self._remove(node)
                self.stats.num_evicted_blocks += 1
        for node in in_use:
            self._push(node)
        return freed

    def _push(self, leaf: Node) -> None:
        self._pushes += 1
        heappush(self._leaves, (leaf.last_used, self._pushes, leaf))
        if len(self._leaves) > 64 + 4 * self.stats.num_blocks:  # most entries are out of date
            leaves = {node for _, _, node in self._leaves if node.alive and not node.children}
            self._leaves = sorted((node.last_used, i, node) for i, node in enumerate(leaves))
            self._pushes += len(leaves)

    def _remove(self, node: Node) -> None:
        """Remove a leaf from the tree; its parent may become one."""
        parent = node.parent
        if parent is None:
            return
        node.alive = False
        del self._nodes[node.key]
        parent.remove_child(node)
        self.pool.free([node.block])
        self._held[node.block] -= 1
        if not self._held[node.block]:
            del self._held[node.block]
        self.stats.num_blocks -= 1
        if parent.children:
            return
        if parent.parent is None:
            del self._nodes[parent.key]
            return
        if self.recurrent and parent.snapshot is None:
            parent.last_used = 0
        self._push(parent)

    # checks

    def held(self) -> Iterator[int]:
        """The blocks of all nodes, each as often as it is held."""
        return self._held.elements()

    def nodes(self) -> list[Node]:
        """All nodes but the roots, parents before children."""
        return sorted((n for n in self._nodes.values() if n.parent is not None), key=lambda n: n.position)

    def check_integrity(self) -> None:
        """Check that the tree is consistent and that the counts of blocks and bytes are right.

        Raises:
            RuntimeError: it is not, which is a bug.
        """
        nodes = self.nodes()
        nearest = dict[Node, Node | None]()
        for node in nodes:
            self._check(node, nearest)
        if Counter(node.block for node in nodes) != self._held or len(nodes) != self.stats.num_blocks:
            raise RuntimeError("the blocks that the prefix index holds do not add up")
        kept = [node.snapshot for node in nodes if node.snapshot]
        if sum(one.nbytes for one in kept) != self.stats.snapshot_bytes or len(kept) != len(self._snapshots):
            raise RuntimeError("the bytes of the snapshots do not add up")
        if self.stats.snapshot_bytes > self.max_bytes:
            raise RuntimeError("the snapshots are larger than their budget")

    def _check(self, node: Node, nearest: dict[Node, Node | None]) -> None:
        """Check one node; ``nearest``: the last snapshot before each of those above it."""
        parent = node.parent
        if parent is None or self._nodes.get(parent.key) is not parent or not parent.is_full:
            raise RuntimeError(f"a node at {node.position} lost its parent")
        if parent.child(node.packed) is not node or not node.alive:
            raise RuntimeError(f"a node at {node.position} is unknown to its parent")
        if not node.is_full and (node.children or node.snapshot is None):
            raise RuntimeError(f"the partial block at {node.position} has no snapshot")
        above = parent if parent.snapshot else nearest.get(parent)
        nearest[node] = next(parent.partial_prefixes(node.packed[:-1]), above)
        if node.snapshot and node.previous is not nearest[node]:
            raise RuntimeError(f"the snapshot at {node.position} names the wrong one before it")


def _reason(position: int, known: int, length: int, step: int) -> str:
    """Why only ``position`` of ``length`` tokens are reused, with blocks of the first ``known`` cached."""
    if length - position <= step:
        return ""
    if known > position:
        state = f"the last state to resume from is at token {position}" if position else "no state was kept"
        return f"the text is known up to token {known}, but {state}"
    if not position:
        return "no text in the cache begins like this"
    return f"what follows token {position} is new or was evicted"
