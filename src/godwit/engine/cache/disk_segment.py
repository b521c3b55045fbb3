"""Segments of texts between the caches and the files of the disk cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from godwit.engine.cache.disk_file import SegmentHeader
from godwit.engine.cache.hybrid import HybridCache, StateSnapshot
from godwit.engine.cache.nodes import Node, Snapshot
from godwit.engine.cache.prefix import PrefixIndex


@dataclass(frozen=True)
class Segment:
    """A part of a text in memory.

    Attributes:
        tensors: keys and values ``[nodes, 16, heads, D]`` of each attention layer, the state, the logits.
    """

    header: SegmentHeader
    tensors: list[Tensor]


def bytes_per_block(cache: HybridCache) -> int:
    """What a segment takes for each of its nodes."""
    return sum(part[0].nbytes for part in _paged(cache))


def copy_segment(nodes: list[Node], snapshot: Snapshot | None, cache: HybridCache) -> Segment:
    """A copy of what the caches hold of ``nodes``, each the child of the one before."""
    blocks = [node.block for node in nodes]
    tensors = [part[blocks].cpu() for part in _paged(cache)]
    *_, top = nodes[0].ancestors()
    if top.parent is None or nodes[0].parent is None:
        raise RuntimeError("a node has no root")
    header = SegmentHeader(
        top.parent.key, nodes[0].parent.key, [node.key for node in nodes], [node.tokens for node in nodes]
    )
    if snapshot is None:
        return Segment(header, tensors)
    state, logits = snapshot.state, [] if snapshot.logits is None else [snapshot.logits]
    header = replace(
        header,
        num_state=len(state.tensors),
        pending=state.pending,
        has_logits=bool(logits),
        state_bytes=snapshot.nbytes,
    )
    return Segment(header, [*tensors, *state.tensors, *logits])


def graft_segment(segment: Segment, vocab_size: int, index: PrefixIndex, cache: HybridCache) -> bool:
    """Put a segment into the caches and the index; whether texts can be resumed at its end.

    Raises:
        ValueError: it is not of this model.
        MemoryBudgetError: there are not enough free blocks.
    """
    header, paged, count = segment.header, _paged(cache), len(segment.header.keys)
    saved, kept = segment.tensors[: len(paged)], segment.tensors[len(paged) :]
    if [(one.shape, one.dtype) for one in saved] != [((count, *p.shape[1:]), p.dtype) for p in paged]:
        raise ValueError("its blocks are not those of this model")
    snapshot = _snapshot(header, kept, vocab_size, cache)
    blocks = cache.blocks.allocate(count)
    try:
        for part, one in zip(paged, saved, strict=True):
            part[blocks] = one.to(part.device)
        return index.graft(header.root, header.parent, header.tokens, header.keys, blocks, snapshot)
    finally:
        cache.blocks.free(blocks)


def _snapshot(
    header: SegmentHeader, tensors: list[Tensor], vocab_size: int, cache: HybridCache
) -> Snapshot | None:
    if len(tensors) != (header.num_state or 0) + header.has_logits:
        raise ValueError("it has too few or too many tensors")
    if header.num_state is None:
        return None
    logits = tensors[-1] if header.has_logits else None
    if logits is not None and (logits.shape != (vocab_size,) or not logits.is_floating_point()):
        raise ValueError("its logits are not those of this model")
    state = StateSnapshot(tuple(tensors[: header.num_state]), header.pending)
    if not cache.accepts(state):
        raise ValueError("its state is not that of this model")
    return Snapshot(state, logits)


def _paged(cache: HybridCache) -> list[Tensor]:
    """Keys and values of the attention layers, without MTP: drafts never read those of a reused prefix."""
    return [part for layer in cache.caches.paged() for part in (layer.k, layer.v)]
