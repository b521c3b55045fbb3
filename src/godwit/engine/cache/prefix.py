"""PrefixIndex: what is computed already for the beginnings of texts.

A tree: each node stands for a full block of 16 tokens after its parent's text and holds the pool's block with
their keys and values. A recurrent state cannot be cut, so it is copied at chosen positions, and a text can be
resumed only where there are both. Such a position may lie inside a block; then a leaf of fewer than 16 tokens
holds the block that begins with them. Whoever resumes there copies it, since others write on in it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from torch import Tensor

from godwit.engine.cache.hybrid import StateSnapshot
from godwit.engine.cache.nodes import Node, Resumable, extend_chain, node_key, root_key
from godwit.engine.cache.pools import BlockPool
from godwit.models.batch import BLOCK_SIZE


@dataclass(frozen=True)
class Hit:
    """What is known of a text.

    Attributes:
        position: tokens after which it can be resumed, at ``node``.
        note: why not more.
        known: tokens whose keys and values are known; a state there would have saved more.
    """

    position: int
    node: Node | None
    note: str
    known: int = 0


@dataclass
class PrefixStats:
    """How much the index holds."""

    num_blocks: int = 0
    num_snapshots: int = 0
    snapshot_bytes: int = 0
    num_evicted_blocks: int = 0
    num_evicted_snapshots: int = 0


class PrefixIndex:
    """Finds and keeps computed beginnings of texts. It gives blocks back when they are wanted elsewhere.

    Args:
        pool: of the blocks; the index is one user of each block that a node holds.
        recurrent: texts can only be resumed where there is a snapshot.
        max_bytes: for all snapshots together.
    """

    def __init__(self, pool: BlockPool, *, recurrent: bool, max_bytes: int) -> None:
        self.pool = pool
        self.recurrent = recurrent
        self.max_bytes = max_bytes
        self.stats = PrefixStats()
        self._nodes: dict[bytes, Node] = {}
        self._held: Counter[int] = Counter()
        self._resumable: dict[bytes, Node] = {}
        self._leaves: list[tuple[int, int, Node]] = []  # a heap; some entries are out of date
        self._pushes = 0
        self._clock = 0

    def match(self, ids: Sequence[int], salt: str, chain: list[bytes]) -> Hit:
        """The longest beginning of ``ids`` that can be resumed; ``chain`` keeps keys for the next time."""
        extend_chain(chain, ids, salt)
        path = self._known(chain, ids, salt)
        return self._resume(path, ids) if self.recurrent else self._whole_blocks(path, ids)

    def use(self, hit: Hit) -> None:
        """Count a hit, or that there was none."""
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
        # The last token has to be read again for what follows from it.
        usable = path[: 1 + (len(ids) - 1) // BLOCK_SIZE]
        if len(usable) < 2:
            return Hit(0, None, _reason(0, 0, len(ids), BLOCK_SIZE))
        position = usable[-1].position
        return Hit(position, usable[-1], _reason(position, position, len(ids), BLOCK_SIZE))

    def _resume(self, path: list[Node], ids: Sequence[int]) -> Hit:
        known = path[-1].position if path else 0
        for node in reversed(path):
            places = [child for child in node.children.values() if not child.is_full]
            places.sort(key=lambda place: -place.position)
            for place in (*places, node):
                fits = tuple(ids[node.position : place.position]) == place.tokens or place is node
                ready = place.resumable
                if ready and fits and (place.position < len(ids) or ready.logits is not None):
                    note = _reason(place.position, known, len(ids), 1)
                    return Hit(place.position, place, note, known)
        return Hit(0, None, _reason(0, known, len(ids), 1), known)

    def commit(
        self, ids: Sequence[int], salt: str, chain: list[bytes], blocks: list[int], first: int, end: int
    ) -> list[tuple[int, int]]:
        """Make the full blocks ``first`` to ``end`` of a sequence known.

        Returns:
            (place, block): where another block with the same content is known already, to be used instead.
        """
        extend_chain(chain, ids, salt)
        better = []
        for index in range(first, end):
            node = self._nodes.get(chain[index])
            if node is None:
                tokens = tuple(ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
                parent = self._nodes[chain[index - 1]] if index else self._root(salt)
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
        """Keep the state after ``ids``, whose full blocks are committed; ``take`` copies it if it is new.

        Returns:
            whether it is kept.
        """
        full, rest = divmod(len(ids), BLOCK_SIZE)
        node = self._nodes[chain[full - 1]] if full else self._root(salt)
        if rest:
            tail = tuple(ids[full * BLOCK_SIZE :])
            key = node_key(node.key, tail)
            node = self._nodes.get(key) or self._insert(key, node, tail, blocks[full])
        self._touch(node)
        known = node.resumable
        if known is None or (known.logits is None and logits is not None):
            kept = None if logits is None else logits.to("cpu", copy=True)
            self._drop_resumable(node)
            return self._attach(node, Resumable(take() if known is None else known.state, kept))
        return True

    def end_of(self, ids: Sequence[int], salt: str, chain: Sequence[bytes]) -> Node | None:
        """The last node of ``ids`` at which a longer text could be resumed."""
        path = self._known(chain, ids, salt)
        if self.recurrent:
            return self._resume(path, [*ids, -1]).node
        return path[-1] if len(path) > 1 else None

    def knows(self, keys: Iterable[bytes]) -> bool:
        """Whether all these nodes are there."""
        return all(key in self._nodes for key in keys)

    def keep(self, chain: Sequence[bytes]) -> None:
        """Let what is known of a text be the last to be evicted."""
        self._clock += 1
        for key in reversed(chain):
            if key in self._nodes:
                return self._touch(self._nodes[key])

    def can_graft(self, root: bytes, parent: bytes) -> bool:
        """Whether the node ``parent``, or the root itself, is there to go on from."""
        return parent == root or parent in self._nodes

    def graft(
        self,
        root: bytes,
        parent: bytes,
        tokens: Sequence[tuple[int, ...]],
        keys: Sequence[bytes],
        blocks: Sequence[int],
        resumable: Resumable | None,
    ) -> None:
        """Add nodes one below the other that were kept elsewhere, the last with what is resumable.

        Raises:
            ValueError: the keys are not those of the tokens.
        """
        expected = parent
        for key, piece in zip(keys, tokens, strict=True):
            expected = node_key(expected, piece)
            if key != expected or not 0 < len(piece) <= BLOCK_SIZE:
                raise ValueError("its keys are not those of its tokens")
        if any(len(piece) < BLOCK_SIZE for piece in tokens[:-1]):
            raise ValueError("a partial block is not at its end")
        node = self._nodes.get(parent) or self._root_of(root)
        for key, piece, block in zip(keys, tokens, blocks, strict=True):
            node = self._nodes.get(key) or self._insert(key, node, piece, block)
        if resumable is not None and node.resumable is None:
            self._attach(node, resumable)
        elif not node.is_full and node.resumable is None:
            self._remove(node)

    def _attach(self, node: Node, resumable: Resumable) -> bool:
        if not self._make_bytes(resumable.nbytes):
            self._forget_useless(node)
            return False
        node.before = next((above for above in node.beginnings() if above.resumable), None)
        for other in self._resumable.values():
            if other.before is node.before and node in other.beginnings():
                other.before = node
        node.resumable = resumable
        self._resumable[node.key] = node
        self.stats.num_snapshots += 1
        self.stats.snapshot_bytes += resumable.nbytes
        return True

    def _make_bytes(self, count: int) -> bool:
        """Drop the snapshots of least value, until ``count`` more bytes fit."""
        if count > self.max_bytes:
            return False
        while self.stats.snapshot_bytes + count > self.max_bytes:
            node = min(self._resumable.values(), key=self._value)
            self._drop_resumable(node)
            self.stats.num_evicted_snapshots += 1
            self._forget_useless(node)
        return True

    def _value(self, node: Node) -> float:
        """Tokens that a hit saves, for each byte and each use of the index since the last one."""
        size = node.resumable.nbytes if node.resumable else 1
        return node.saves / max(1, size) / (1 + self._clock - node.last_used)

    def _drop_resumable(self, node: Node) -> None:
        if node.resumable is not None:
            del self._resumable[node.key]
            self.stats.num_snapshots -= 1
            self.stats.snapshot_bytes -= node.resumable.nbytes
            node.resumable = None
            for other in self._resumable.values():
                if other.before is node:
                    other.before = node.before

    def _forget_useless(self, node: Node) -> None:
        """A node that lost its snapshot: one of a partial block goes, a leaf is the first to go later."""
        if not node.is_full:
            self._remove(node)
        elif self.recurrent and not node.children and node.parent is not None:
            node.last_used = 0
            self._push(node)

    def evict(self, count: int) -> int:
        """Free up to ``count`` blocks that no sequence uses, leaves first, of these the longest unused."""
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
                self._drop_resumable(node)
                self._remove(node)
                self.stats.num_evicted_blocks += 1
        for node in in_use:
            self._push(node)
        return freed

    def held(self) -> Iterator[int]:
        """The blocks of all nodes, each as often as it is held."""
        return self._held.elements()

    def nodes(self) -> list[Node]:
        """All nodes but the roots, parents before children."""
        return sorted((n for n in self._nodes.values() if n.parent is not None), key=lambda n: n.position)

    def _root(self, salt: str) -> Node:
        return self._root_of(root_key(salt))

    def _root_of(self, key: bytes) -> Node:
        if key not in self._nodes:
            self._nodes[key] = Node(key, None, b"", -1, 0)
        return self._nodes[key]

    def _insert(self, key: bytes, parent: Node, tokens: tuple[int, ...], block: int) -> Node:
        packed = array("i", tokens).tobytes()
        node = Node(key, parent, packed, block, parent.position + len(tokens), last_used=self._clock)
        self.pool.share([block])
        self._held[block] += 1
        self._nodes[key] = parent.children[key] = node
        self.stats.num_blocks += 1
        self._push(node)
        return node

    def _push(self, leaf: Node) -> None:
        self._pushes += 1
        heappush(self._leaves, (leaf.last_used, self._pushes, leaf))
        if len(self._leaves) > 64 + 4 * self.stats.num_blocks:  # mostly entries that are out of date
            leaves = {node for _, _, node in self._leaves if node.alive and not node.children}
            self._leaves = sorted((node.last_used, i, node) for i, node in enumerate(leaves))
            self._pushes += len(leaves)

    def _touch(self, node: Node) -> None:
        for each in node.upwards():
            each.last_used = self._clock

    def _remove(self, node: Node) -> None:
        """Take a leaf out of the tree; its parent may be the next leaf."""
        parent = node.parent
        if parent is None:
            return
        node.alive = False
        del self._nodes[node.key], parent.children[node.key]
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
        if self.recurrent and parent.resumable is None:
            parent.last_used = 0
        self._push(parent)

    def check_integrity(self) -> None:
        """The tree hangs together, and the bytes of the snapshots add up.

        Raises:
            RuntimeError: it is not so, which is a fault of the program.
        """
        nodes = self.nodes()
        for node in nodes:
            parent = node.parent
            if parent is None or self._nodes.get(parent.key) is not parent or not parent.is_full:
                raise RuntimeError(f"a node at {node.position} lost its parent")
            if parent.children.get(node.key) is not node or not node.alive:
                raise RuntimeError(f"a node at {node.position} is unknown to its parent")
            if not node.is_full and (node.children or node.resumable is None):
                raise RuntimeError(f"the partial block at {node.position} serves nothing")
        if Counter(node.block for node in nodes) != self._held or len(nodes) != self.stats.num_blocks:
            raise RuntimeError("the blocks that the prefix index holds do not add up")
        kept = [node.resumable for node in nodes if node.resumable]
        if sum(one.nbytes for one in kept) != self.stats.snapshot_bytes or len(kept) != len(self._resumable):
            raise RuntimeError("the bytes of the snapshots do not add up")
        if self.stats.snapshot_bytes > self.max_bytes:
            raise RuntimeError("the snapshots are larger than their budget")


def _reason(position: int, known: int, length: int, step: int) -> str:
    """Why no more than ``position`` of ``length`` tokens are reused, ``known`` being in cached blocks."""
    if length - position <= step:
        return ""
    if known > position:
        state = f"the last state to resume from is at token {position}" if position else "no state was kept"
        return f"the text is known up to token {known}, but {state}"
    if not position:
        return "no text in the cache begins like this"
    return f"what follows token {position} is new or was evicted"
