from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from godwit.engine.cache import BlockPool, StateSnapshot, prefix
from godwit.engine.cache.eviction import EvictionOrder
from godwit.engine.cache.nodes import Node, Snapshot, extend_chain, node_key, root_key
from godwit.engine.cache.prefix import PrefixIndex
from godwit.models.batch import BLOCK_SIZE
from tests.engine.cache.naive_index import NaiveIndex

TEXT = list(range(100))
LOGITS = torch.zeros(2)


def state(num_bytes: int = 100) -> StateSnapshot:
    return StateSnapshot((torch.zeros(num_bytes, dtype=torch.uint8),))


class Books:
    """An index, its pool, and who computed what."""

    def __init__(
        self,
        total: int = 64,
        *,
        recurrent: bool = True,
        max_bytes: int = 10**6,
        kind: type[PrefixIndex] = PrefixIndex,
    ) -> None:
        self.pool = BlockPool(total)
        self.index = kind(self.pool, recurrent=recurrent, max_bytes=max_bytes)
        self.own: list[int] = []

    def compute(
        self, ids: list[int], *, salt: str = "", size: int = 100, logits: bool = False, end: bool = True
    ) -> list[int]:
        """A sequence comes, computes ``ids``, leaves its state, and goes if it is at its ``end``."""
        chain: list[bytes] = []
        blocks = self.pool.allocate(-(-len(ids) // BLOCK_SIZE))
        for place, block in self.index.commit(ids, salt, chain, blocks, 0, len(ids) // BLOCK_SIZE):
            self.pool.share([block])
            self.pool.free([blocks[place]])
            blocks[place] = block
        if self.index.recurrent:
            self.index.add_snapshot(ids, salt, chain, blocks, lambda: state(size), LOGITS if logits else None)
        if end:
            self.pool.free(blocks)
        else:
            self.own += blocks
        return blocks

    def found(self, ids: list[int], salt: str = "") -> int:
        hit = self.index.match(ids, salt, [])
        self.index.use(hit)
        return hit.position

    def check(self) -> None:
        self.index.check_integrity()
        self.pool.check_integrity([*self.index.held(), *self.own])


def test_attention_reuses_whole_blocks_but_the_last_token() -> None:
    books = Books(recurrent=False)
    books.compute(TEXT[:40])
    assert [books.found(TEXT[:n]) for n in (8, 16, 17, 32, 33, 100)] == [0, 0, 16, 16, 32, 32]
    assert books.found([*TEXT[:20], 7, *TEXT[21:]]) == 16
    books.check()


@pytest.mark.parametrize("length", [5, 16, 40, 48])
def test_a_state_is_resumed_at_its_very_position(length: int) -> None:
    books = Books()
    books.compute(TEXT[:length])
    assert books.found(TEXT) == length
    assert books.found([*TEXT[:length], 7]) == length
    assert books.found(TEXT[:length]) == 0  # what follows it is not known
    assert books.found([*TEXT[: length - 1], 7, 7]) == 0
    books.check()


def test_a_whole_prompt_is_resumed_where_its_scores_are_kept() -> None:
    books = Books()
    books.compute(TEXT[:40])
    books.compute(TEXT[:40], logits=True)
    assert books.found(TEXT[:40]) == 40
    assert books.index.stats.num_snapshots == 1
    books.check()


def test_the_deepest_state_is_taken_and_the_note_says_why_not_more() -> None:
    books = Books()
    for length in (20, 24, 64):
        books.compute(TEXT[:length])
    assert [books.found(TEXT[:n]) for n in (22, 30, 64, 65)] == [20, 24, 24, 64]
    hit = books.index.match([*TEXT[:63], 7, 7], "", [])
    assert (hit.position, hit.known) == (24, 48)
    assert hit.note == "the text is known up to token 48, but the last state to resume from is at token 24"
    assert books.index.match(TEXT, "", []).note == "what follows token 64 is new or was evicted"
    assert books.index.match([9, 9], "", []).note == "no text in the cache begins like this"
    assert books.index.match(TEXT[:65], "", []).note == ""


def test_salts_share_nothing() -> None:
    books = Books()
    books.compute(TEXT[:64], salt="a")
    assert (books.found(TEXT, "a"), books.found(TEXT, "b"), books.found(TEXT)) == (64, 0, 0)


def test_equal_blocks_are_kept_once() -> None:
    books = Books(recurrent=False)
    first = books.compute(TEXT[:48], end=False)
    second = books.compute(TEXT[:64], end=False)
    assert first[:3] == second[:3]
    assert books.pool.num_free == 60
    books.check()


def test_a_partial_block_outlives_its_sequence_and_goes_with_its_state() -> None:
    books = Books(max_bytes=250)
    books.compute(TEXT[:20])
    assert books.pool.num_free == 62
    books.compute([9] * 5, size=200)
    assert books.index.stats.num_evicted_snapshots == 1
    assert books.pool.num_free == 62 and books.found(TEXT) == 0
    books.check()


def test_of_the_snapshots_the_least_valuable_goes() -> None:
    books = Books(max_bytes=350)
    for length in (40, 44, 90):
        books.compute(TEXT[:length])
    books.compute([9] * 30)
    assert books.index.stats.num_evicted_snapshots == 1
    assert [books.found(TEXT[:n]) for n in (42, 60, 95)] == [40, 40, 90]  # 44 saved only four tokens
    for _ in range(50):
        books.found([9] * 31)
    books.compute([8] * 30)
    assert books.found([9] * 31) == 30
    books.check()


def test_a_snapshot_above_an_evicted_one_is_what_saves_then() -> None:
    books = Books(max_bytes=310)
    books.compute(TEXT[:90])
    books.compute(TEXT[:30])
    deep, shallow = books.index.match(TEXT, "", []).node, books.index.match(TEXT[:31], "", []).node
    assert (
        deep
        and shallow
        and (deep.saved_tokens, shallow.saved_tokens) == (60, 30)
        and deep.previous is shallow
    )
    books.index._drop_snapshot(shallow)
    books.index._demote(shallow)
    assert deep.saved_tokens == 90
    books.check()


def test_a_snapshot_larger_than_the_budget_is_not_kept() -> None:
    books = Books(max_bytes=99)
    books.compute(TEXT[:20])
    assert books.found(TEXT) == 0 and books.index.stats.num_snapshots == 0
    books.check()


def test_blocks_are_evicted_from_the_ends_of_what_is_longest_unused() -> None:
    books = Books(total=12, recurrent=False)
    books.compute(TEXT[:64])
    books.compute([9] * 64)
    books.found(TEXT)
    assert books.index.evict(3) == 3
    assert (books.found(TEXT), books.found([9] * 64)) == (64, 16)
    assert books.index.evict(4) == 4
    assert books.found([9] * 64) + books.found(TEXT) == 16
    books.check()
    assert books.index.evict(99) == 1 and books.pool.num_free == 12
    books.check()


def test_blocks_in_use_are_not_evicted() -> None:
    books = Books(total=8, recurrent=False)
    books.compute(TEXT[:64], end=False)
    books.compute([9] * 32)
    assert books.index.evict(99) == 2
    assert books.found(TEXT) == 64
    books.pool.free(books.own)
    books.own = []
    assert books.index.evict(99) == 4
    books.check()


def test_blocks_without_a_state_behind_them_go_first() -> None:
    books = Books(total=12, max_bytes=100)
    books.compute(TEXT[:32])
    books.compute([9] * 64)  # the only state that fits; the other is evicted
    books.found([9] * 65)
    for _ in range(3):
        books.found(TEXT)
    assert books.index.evict(2) == 2 and books.found([9] * 65) == 64
    books.check()


def test_faults_in_the_books_are_noticed() -> None:
    for harm in ("num_blocks", "snapshot_bytes"):
        books = Books()
        books.compute(TEXT[:20])
        setattr(books.index.stats, harm, 1000)
        with pytest.raises(RuntimeError, match="do not add up"):
            books.check()
    books = Books()
    books.compute(TEXT[:20])
    books.index.nodes()[0].children.clear()
    with pytest.raises(RuntimeError, match="unknown to its parent"):
        books.check()
    books = Books()
    books.compute(TEXT[:20])
    books.index._drop_snapshot(books.index.nodes()[1])
    with pytest.raises(RuntimeError, match="has no snapshot"):
        books.check()


def test_keys_depend_on_all_that_precedes() -> None:
    chains: list[list[bytes]] = [[], [], []]
    for chain, ids, salt in zip(chains, (TEXT, [7, *TEXT[1:]], TEXT), ("", "", "x"), strict=True):
        extend_chain(chain, ids[:50], salt)
        extend_chain(chain, ids, salt)
    assert [len(chain) for chain in chains] == [6, 6, 6]
    assert len({key for chain in chains for key in chain}) == 18


def test_blocks_whose_state_was_dropped_go_before_older_ones() -> None:
    books, texts = Books(max_bytes=260), [[number] * 32 for number in range(3)]
    for ids, size in zip(texts, (50, 200, 100), strict=True):
        books.compute(ids, size=size)
        books.found([*ids, 9])
    assert books.index.stats.num_evicted_snapshots == 1
    for left in (16, 0):
        assert books.index.evict(1) == 1
        hits = [books.index.match([*ids, 9], "", []) for ids in texts]
        assert [(hit.position, hit.known) for hit in hits] == [(32, 32), (0, left), (32, 32)]


def test_of_equal_values_the_oldest_goes_wherever_it_stands() -> None:
    order, nodes = EvictionOrder(), [Node(bytes([n]), None, b"", n, 16) for n in range(3)]
    for node in nodes:
        node.snapshot = Snapshot(state())
    order.put(nodes[0], 0)
    order.put(nodes[1], 0)
    order.remove(nodes[0], 0)
    order.put(nodes[2], 0)  # in the place of the first
    assert order.least(0) is nodes[1]


def test_a_block_of_two_nodes_is_free_only_without_both() -> None:
    books, chain = Books(), list[bytes]()
    blocks = books.pool.allocate(2)
    for length in (20, 32):
        books.index.commit(TEXT[:length], "", chain, blocks, length // 20 - 1, length // 16)
        books.index.add_snapshot(TEXT[:length], "", chain, blocks, state)
    books.pool.free(blocks)
    assert books.index.stats.num_blocks == 3 and books.pool.num_free == 62
    assert books.index.evict(1) == 1 and books.pool.num_free == 63
    books.check()


def test_what_comes_from_a_file_has_the_keys_of_its_tokens() -> None:
    books, root = Books(recurrent=False), root_key("")
    keys = [node_key(root, TEXT[:16])]
    keys.append(node_key(keys[0], TEXT[16:32]))
    tokens, blocks = [tuple(TEXT[:16]), tuple(TEXT[16:32])], books.pool.allocate(2)
    for wrong in ([keys[0], keys[0]], [b"x" * 20, keys[1]], keys[::-1]):
        with pytest.raises(ValueError, match="keys"):
            books.index.graft(root, root, tokens, wrong, blocks, None)
        assert books.index.stats.num_blocks == 0
    assert books.index.graft(root, root, tokens, keys, blocks, None)
    books.pool.free(blocks)
    assert books.found([*TEXT[:32], 9]) == 32
    books.check()


def test_part_of_a_block_without_a_state_is_of_no_use() -> None:
    books, root = Books(), root_key("")
    blocks = books.pool.allocate(1)
    assert not books.index.graft(root, root, [tuple(TEXT[:5])], [node_key(root, TEXT[:5])], blocks, None)
    books.pool.free(blocks)
    assert books.pool.num_free == 64
    books.check()


def test_keys_alone_are_not_believed() -> None:
    books, chain = Books(recurrent=False), list[bytes]()
    books.compute(TEXT[:64])
    extend_chain(chain, TEXT[:64], "")
    other = [*TEXT[:40], 7, *TEXT[41:]]  # as if the keys of its third block were the same
    assert books.index.match(other, "", chain).position == 32


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_books_balance_whatever_is_done(recurrent: bool) -> None:
    rng = random.Random(2)
    books = Books(total=40, recurrent=recurrent, max_bytes=1200)
    for _ in range(400):
        ids = [rng.randrange(2)] * rng.randrange(1, 50) + [rng.randrange(3)] * rng.randrange(1, 60)
        needed = -(-len(ids) // BLOCK_SIZE)
        if rng.random() < 0.2:
            books.pool.free(books.own)
            books.own = []
        if books.pool.num_free < needed:
            books.index.evict(needed - books.pool.num_free)
        if books.pool.num_free >= needed:
            books.compute(ids, salt=rng.choice("ab"), size=rng.randrange(50, 300), end=rng.random() < 0.8)
        assert 0 <= books.found(ids, "a") <= len(ids)
        books.check()
        assert len(books.index._leaves) <= 65 + 4 * books.index.stats.num_blocks
    books.pool.free(books.own)
    books.own = []
    books.index.evict(99)
    assert books.pool.num_free == 40 and not books.index._nodes
    assert books.index.stats.num_evicted_blocks > 100


def likely(rng: random.Random) -> list[int]:
    """A text that shares its beginning with others, and ends anywhere."""
    ids = [token for _ in range(rng.randrange(1, 6)) for token in [rng.randrange(2)] * rng.choice((3, 8, 16))]
    return [*ids, *(rng.randrange(2) for _ in range(rng.randrange(4)))]


@pytest.mark.parametrize("seed", range(3))
def test_hits_and_evictions_are_those_of_a_naive_index(seed: int) -> None:
    both = [Books(total=60, max_bytes=3000, kind=kind) for kind in (PrefixIndex, NaiveIndex)]
    fast, naive = both[0].index, both[1].index
    rng = random.Random(seed)
    for _ in range(200):
        ids, salt = likely(rng), rng.choice("ab")
        size, logits, choice = rng.choice((100, 100, 130, 500)), rng.random() < 0.3, rng.random()
        hits = [(books.found(ids, salt), books.index.match(ids, salt, []).known) for books in both]
        assert hits[0] == hits[1]
        for books in both:
            if choice < 0.1:
                books.index.evict(7)
            elif choice < 0.2:
                chain: list[bytes] = []
                extend_chain(chain, ids, salt)
                books.index.keep(chain)
            else:
                books.index.evict(max(0, -(-len(ids) // BLOCK_SIZE) - books.pool.num_free))
                books.compute(ids, salt=salt, size=size, logits=logits)
        states = [{(n.key, n.block, n.last_used, n.snapshot is None) for n in b.index.nodes()} for b in both]
        assert states[0] == states[1]
        assert fast.stats == naive.stats
        both[0].check()
    assert fast.stats.num_evicted_snapshots > 50 and fast.stats.num_evicted_blocks > 20


def test_equal_values_go_in_the_order_in_which_they_came() -> None:
    books = Books(max_bytes=400)
    for first in range(4):
        books.compute([first] * 32)
    books.compute([9] * 32, size=150)
    assert [books.index.match([first] * 33, "", []).position for first in range(4)] == [0, 0, 32, 32]


VISITED: set[int] = set()


class WatchedNode(Node):
    """Notes which nodes are looked at."""

    def __getattribute__(self, name: str) -> Any:
        VISITED.add(id(self))
        return super().__getattribute__(name)


@pytest.mark.parametrize("shared", [0, 64, 70])
def test_the_nodes_that_a_prompt_visits_do_not_grow_with_the_snapshots(
    monkeypatch: pytest.MonkeyPatch, shared: int
) -> None:
    monkeypatch.setattr(prefix, "Node", WatchedNode)
    common = [1] * shared
    books = Books(total=2000, max_bytes=30_000)

    def visited(number: int) -> int:
        """Nodes that are looked at for a new conversation of two turns."""
        VISITED.clear()
        ids = [*common, number + 2, *range(40)]
        books.found(ids)
        books.compute(ids)
        books.compute([*ids, *range(20)])
        return len(VISITED)

    if common:
        books.compute(common)
    counts = [visited(number) for number in range(240)]
    assert books.index.stats.num_evicted_snapshots > 50
    assert max(counts[-20:]) <= max(counts[20:40]) + 20
    books.check()
