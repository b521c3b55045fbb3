"""Fused attention equals the reference, and both equal the definition, at awkward shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from godwit.kernels import reference, sdpa

# (queries, keys) of each sequence: one token, whole prompts, pieces with a past, nothing at all
SHAPES = (
    ((1, 1),),
    ((1, 65),),
    ((7, 7),),
    ((7, 71),),
    ((64, 64), (1, 17), (2, 3), (63, 130)),
    ((0, 0), (3, 3), (0, 5)),
    (),
)


def random_inputs(
    shapes: tuple[tuple[int, int], ...], kv_heads: int, ratio: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor], list[int]]:
    lengths = [queries for queries, _ in shapes]
    return (
        torch.randn(sum(lengths), kv_heads * ratio, dim).to(dtype),
        [torch.randn(keys, kv_heads, dim).to(dtype) for _, keys in shapes],
        [torch.randn(keys, kv_heads, dim).to(dtype) for _, keys in shapes],
        lengths,
    )


@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-6)])
def test_equals_the_reference(
    shapes: tuple[tuple[int, int], ...], heads: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    """In bfloat16 the reference rounds probabilities and result, 2^-8 each, and values reach about 4."""
    inputs = random_inputs(shapes, *heads, 24, dtype)
    ours = sdpa.attention(*inputs, 24**-0.5)
    expected = reference.attention(*inputs, 24**-0.5)
    assert ours.shape == expected.shape and ours.dtype == expected.dtype == dtype
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", [reference, sdpa], ids=["reference", "sdpa"])
@pytest.mark.parametrize("shapes", [shapes for shapes in SHAPES if shapes])
def test_paged_attention_reads_through_block_tables(
    op: ModuleType, shapes: tuple[tuple[int, int], ...]
) -> None:
    """The same bits as with keys and values side by side; slots beyond a sequence hold NaN."""
    q, keys, values, lengths = random_inputs(shapes, 2, 3, 24, torch.float32)
    seq_lens, block = [len(key) for key in keys], 4
    counts = [-(-length // block) for length in seq_lens]
    order = torch.randperm(sum(counts) + 2)
    tables = torch.full((len(shapes), max(counts)), 10**6)  # unused entries point nowhere
    caches = torch.full((2, len(order), block, 2, 24), math.nan)
    for row, blocks in enumerate(torch.split(order[: sum(counts)], counts)):
        tables[row, : len(blocks)] = blocks
        slots = (blocks[:, None] * block + torch.arange(block)).flatten()[: seq_lens[row]]
        for cache, new in zip(caches, (keys[row], values[row]), strict=True):
            reference.store_kv(cache, new, slots)
    found = op.paged_attention(q, *caches, tables, lengths, seq_lens, 24**-0.5)
    assert torch.equal(found, op.attention(q, keys, values, lengths, 24**-0.5))


def test_reference_is_the_definition() -> None:
    """Query i of a piece at the end of L keys sees keys 0 .. L - n + i; head h reads kv head h // ratio."""
    q, (keys,), (values,), _ = random_inputs(((3, 8),), 2, 2, 5, torch.float64)
    out = reference.attention(q, [keys], [values], [3], 0.4)
    for i in range(3):
        for head in range(4):
            seen = 8 - 3 + i + 1
            scores = keys[:seen, head // 2] @ q[i, head] * 0.4
            expected = (scores - scores.logsumexp(0)).exp() @ values[:seen, head // 2]
            torch.testing.assert_close(out[i, head], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attend", [reference.attention, sdpa.attention])
def test_later_keys_may_hold_anything(attend: Callable[..., Tensor]) -> None:
    """A token's result does not depend on keys and values after it, however large."""
    q, (keys,), (values,), _ = random_inputs(((6, 9),), 2, 2, 8, torch.float32)
    expected = attend(q, [keys], [values], [6], 0.3)
    spoiled_keys, spoiled_values = keys.clone(), values.clone()
    spoiled_keys[-1], spoiled_values[-1] = 1e30, -1e30
    spoiled = attend(q, [spoiled_keys], [spoiled_values], [6], 0.3)
    assert torch.equal(spoiled[:-1], expected[:-1])
    assert math.isfinite(float(expected.sum()))
