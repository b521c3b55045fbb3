"""Layers as one op: the bits of the single ops, and refusals before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from godwit import _native
from tests.kernels.packed import ints
from tests.kernels.test_native_layers import (
    HIDDEN,
    attention_layer,
    batch,
    delta_layer,
    ffn_layer,
    paged,
    recurrent,
)

Cache = _native.PagedCache | _native.RecurrentCache


def random_weight(rows: int, cols: int) -> _native.Weight:
    data = torch.randn(
        _native.weight_bytes("bf16", rows, cols) // 2, generator=torch.Generator().manual_seed(3)
    )
    return _native.Weight("bf16", rows, cols, data.bfloat16().view(torch.uint8))


DELTA = delta_layer(qkvz=random_weight(64, HIDDEN), out=random_weight(HIDDEN, 24), conv=torch.ones(40, 4))
ATTENTION = attention_layer(in_proj=random_weight(96, HIDDEN), out_proj=random_weight(HIDDEN, 32))
FFN = ffn_layer(
    shared=_native.Mlp(random_weight(48, HIDDEN), random_weight(HIDDEN, 24)), router=random_weight(2, HIDDEN)
)


def stack(**changed: Any) -> _native.Stack:
    arguments: dict[str, Any] = {
        "mixers": [DELTA, ATTENTION],
        "ffns": [FFN, FFN],
        "norm": torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)),
        "eps": 1e-6,
        **changed,
    }
    return _native.Stack(**arguments)


def caches() -> list[Cache]:
    return [recurrent(), paged(3)]


def hidden_rows() -> torch.Tensor:
    return torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(2))


def test_a_stack_has_the_bits_of_its_ops() -> None:
    norm = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1))
    one_by_one, together = hidden_rows(), hidden_rows()
    first, second = recurrent(), paged(3)
    logits = [torch.full((4, 2), float("nan")) for _ in range(4)]
    _native.gated_delta_net(DELTA, batch(), first, one_by_one)
    _native.ffn(FFN, one_by_one, logits[0])
    _native.attention(ATTENTION, batch(), second, one_by_one)
    _native.ffn(FFN, one_by_one, logits[1])
    _native.rms_norm(one_by_one, norm, 1e-6, one_by_one)
    stack().run(batch(), caches(), together, logits[2:])
    assert torch.equal(one_by_one, together)
    assert not torch.equal(together, hidden_rows())
    assert torch.equal(torch.stack(logits[:2]), torch.stack(logits[2:]))


def test_a_batch_from_lists_is_that_from_arrays() -> None:
    arrays, lists = hidden_rows(), hidden_rows()
    stack().run(batch(), caches(), arrays)
    listed = _native.Batch(
        ints(14, 15, 16, 0), (0, 3, 4), [17, 1], ints(14, 15, 32, 16), ints(0, 2, 1, 0).view(2, 2), [1, 0],
        (2, 0), [0, 1],
    )  # fmt: skip
    stack().run(listed, caches(), lists)
    assert torch.equal(arrays, lists)


@pytest.mark.parametrize(
    ("place", "values", "message"),
    [
        (1, [0, 3], r"cu_seqlens must have shape \[3\], not \[2\]"),
        (5, [1, 0, 2], r"state_rows must have shape \[2\], not \[3\]"),
        (2, [17, 1.5], "seq_lens must hold integers"),
        (7, [2**70, 0], "pending must hold integers"),
    ],
)
def test_a_batch_refuses_lists(place: int, values: Sequence[Any], message: str) -> None:
    arguments: list[Any] = [
        ints(14, 15, 16, 0), ints(0, 3, 4), ints(17, 1), ints(14, 15, 32, 16), ints(0, 2, 1, 0).view(2, 2),
        ints(1, 0), ints(2, 0), ints(0, 1),
    ]  # fmt: skip
    arguments[place] = values
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        _native.Batch(*arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ffns": [ffn_layer()]}, "Every layer needs a mixer and a feed-forward part"),
        ({"mixers": [delta_layer(), ffn_layer()]}, "A mixer is neither a GatedDeltaNet nor an Attention"),
        ({"norm": torch.ones(2 * HIDDEN)}, "All layers and the norm must have the same width"),
    ],
)
def test_a_stack_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}\\.$"):
        stack(**changed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([recurrent()], "There must be one cache for each layer"),
        ([recurrent(), recurrent()], "An attention layer needs a paged cache"),
        ([paged(3), paged(3)], "A delta layer needs a recurrent cache"),
        ([recurrent(), None], "A cache is neither a RecurrentCache nor a PagedCache"),
        ([recurrent(), paged(2)], "slot_mapping or block_tables names a block beyond the paged cache"),
    ],
)
def test_a_run_refuses_before_it_writes(given: list[Any], message: str) -> None:
    x = hidden_rows()
    with pytest.raises(ValueError, match=f"^{message}\\.$"):
        stack().run(batch(), given, x)
    assert torch.equal(x, hidden_rows())
