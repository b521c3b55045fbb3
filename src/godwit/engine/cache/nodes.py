"""The nodes of the prefix index, and their keys."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from godwit.engine.cache.hybrid import StateSnapshot
from godwit.models.batch import BLOCK_SIZE


@dataclass(frozen=True)
class Resumable:
    """The state after a text, and the scores of the next token where the text was a whole prompt."""

    state: StateSnapshot
    logits: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + (0 if self.logits is None else self.logits.nbytes)


@dataclass(eq=False, slots=True)
class Node:
    """Some text, told by its end: ``tokens`` after those of the parent; a root stands for no text.

    There is one for every 16 tokens in the caches, so it is kept small: the tokens are packed.
    """

    key: bytes
    parent: Node | None
    packed: bytes
    block: int
    position: int
    children: dict[bytes, Node] = field(default_factory=dict)
    resumable: Resumable | None = None
    before: Node | None = None  # the last place to resume before this one, if this is one
    last_used: int = 0
    alive: bool = True

    @property
    def tokens(self) -> tuple[int, ...]:
        """Those after the parent's text."""
        return tuple(array("i", self.packed))

    @property
    def is_full(self) -> bool:
        return self.position % BLOCK_SIZE == 0

    @property
    def saves(self) -> int:
        """Tokens that need not be computed because one can resume here."""
        return self.position - (0 if self.before is None else self.before.position)

    def upwards(self) -> Iterator[Node]:
        """This node and those above it, without the root."""
        node: Node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def beginnings(self) -> Iterator[Node]:
        """All nodes whose text this one's text goes on, the longest first."""
        node: Node = self
        while node.parent is not None:
            partial = [child for child in node.parent.children.values() if not child.is_full]
            partial.sort(key=lambda child: -child.position)
            yield from (c for c in partial if c is not node and c.tokens == node.tokens[: len(c.tokens)])
            node = node.parent
            if node.parent is not None:
                yield node


def extend_chain(chain: list[bytes], ids: Sequence[int], salt: str) -> None:
    """Add the keys of the full blocks of ``ids`` that ``chain`` lacks."""
    for index in range(len(chain), len(ids) // BLOCK_SIZE):
        parent = chain[-1] if chain else root_key(salt)
        chain.append(node_key(parent, ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]))


def root_key(salt: str) -> bytes:
    """Of all texts with this salt."""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=20).digest()


def node_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Of the text that goes on from the one with the key ``parent``."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=20).digest()
