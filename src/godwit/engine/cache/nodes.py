"""The nodes of the prefix index and their keys."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from godwit.engine.cache.hybrid import StateSnapshot
from godwit.models.batch import BLOCK_SIZE

_TOKEN_BYTES = 4
_AFTER_ALL = b"\xff" * _TOKEN_BYTES * BLOCK_SIZE  # sorts after every text


@dataclass(frozen=True)
class Snapshot:
    """The state after a text and, if the text was a whole prompt, the logits of the next token."""

    state: StateSnapshot
    logits: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + (0 if self.logits is None else self.logits.nbytes)


@dataclass(eq=False, slots=True)
class Node:
    """The text of the parent followed by ``tokens``; a root stands for the empty text.

    There is a node for every 16 cached tokens, so nodes are kept small: tokens are packed.

    Attributes:
        key: hash of the whole text and its salt.
        packed: the tokens after the parent's text, 4 bytes each.
        block: the block that holds their keys and values.
        position: length of the text in tokens.
        children: sorted by ``packed``.
        previous: with a snapshot, the longest proper prefix of the text that also has one.
        last_used: clock of the index at the last use.
    """

    key: bytes
    parent: Node | None
    packed: bytes
    block: int
    position: int
    children: list[Node] = field(default_factory=list)
    snapshot: Snapshot | None = None
    previous: Node | None = None
    last_used: int = 0
    alive: bool = True

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(array("i", self.packed))

    @property
    def is_full(self) -> bool:
        """Whether its block is full; only then it can have children."""
        return self.position % BLOCK_SIZE == 0

    @property
    def saved_tokens(self) -> int:
        """Tokens that need no computation thanks to this snapshot."""
        return self.position - (0 if self.previous is None else self.previous.position)

    def add_child(self, child: Node) -> None:
        insort(self.children, child, key=_packed)

    def remove_child(self, child: Node) -> None:
        del self.children[bisect_left(self.children, child.packed, key=_packed)]

    def child(self, packed: bytes) -> Node | None:
        """The child with exactly these tokens."""
        index = bisect_left(self.children, packed, key=_packed)
        if index < len(self.children) and self.children[index].packed == packed:
            return self.children[index]
        return None

    def partial_prefixes(self, packed: bytes) -> Iterator[Node]:
        """Children of fewer than 16 tokens that are a prefix of these tokens, the longest first."""
        longest = min(len(packed) // _TOKEN_BYTES, BLOCK_SIZE - 1) * _TOKEN_BYTES
        for length in range(longest if self.children else 0, 0, -_TOKEN_BYTES):
            if (child := self.child(packed[:length])) is not None:
                yield child

    def ancestors(self) -> Iterator[Node]:
        """This node and those above it, without the root."""
        node: Node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def prefixes(self) -> Iterator[Node]:
        """All nodes whose text is a proper prefix of this one's, the longest first."""
        node: Node = self
        while node.parent is not None:
            yield from node.parent.partial_prefixes(node.packed[:-1])
            node = node.parent
            if node.parent is not None:
                yield node

    def next_snapshots(self) -> Iterator[Node]:
        """Nodes with a snapshot that extend this node's text, but for those behind another of the same path.

        Visits only nodes that extend this node's text.
        """
        pending = self.children[:] if self.is_full else self._longer_siblings()
        while pending:
            node = pending.pop()
            if node.snapshot is None:
                pending += node.children
            else:
                yield node

    def _longer_siblings(self) -> list[Node]:
        siblings = [] if self.parent is None else self.parent.children
        first = bisect_left(siblings, self.packed, key=_packed)
        last = bisect_left(siblings, self.packed + _AFTER_ALL, lo=first, key=_packed)
        return [node for node in siblings[first:last] if node is not self]


def _packed(node: Node) -> bytes:
    return node.packed


def pack(tokens: Sequence[int]) -> bytes:
    """Tokens as a node holds them."""
    return array("i", tokens).tobytes()


def extend_chain(chain: list[bytes], ids: Sequence[int], salt: str) -> None:
    """Append the keys of the full blocks of ``ids`` that ``chain`` lacks."""
    for index in range(len(chain), len(ids) // BLOCK_SIZE):
        parent = chain[-1] if chain else root_key(salt)
        chain.append(node_key(parent, ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]))


def root_key(salt: str) -> bytes:
    """The key of the empty text with this salt."""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=20).digest()


def node_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the text with key ``parent`` followed by ``tokens``."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=20).digest()
