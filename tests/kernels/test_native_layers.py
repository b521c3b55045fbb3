"""Steps, caches and layers that the native ops refuse, in one sentence and before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from godwit import _native
from tests.kernels.packed import ints, weight, zeros

HIDDEN, HEADS, KV_HEADS, DIM = 32, 4, 2, 8


def batch(**changed: Tensor) -> _native.Batch:
    """Two sequences: 3 new tokens after 14, and one at the start."""
    arguments: dict[str, Tensor] = {
        "positions": ints(14, 15, 16, 0),
        "cu_seqlens": ints(0, 3, 4),
        "seq_lens": ints(17, 1),
        "slot_mapping": ints(14, 15, 32, 16),
        "block_tables": ints(0, 2, 1, 0).view(2, 2),
        "state_rows": ints(1, 0),
        "num_tentative": ints(2, 0),
        "pending": ints(0, 1),
        **changed,
    }
    return _native.Batch(*arguments.values())


BATCHES: dict[str, tuple[dict[str, Tensor], str]] = {
    "dtype": ({"positions": torch.zeros(4, dtype=torch.int32)}, "positions must hold int64"),
    "slots": ({"slot_mapping": ints(0)}, r"slot_mapping must have shape \[4\], not \[1\]"),
    "start": (
        {"cu_seqlens": ints(1, 3, 4)},
        "cu_seqlens must begin with 0 and end with the number of tokens",
    ),
    "end": ({"cu_seqlens": ints(0, 3, 5)}, "cu_seqlens must begin with 0 and end with the number of tokens"),
    "descending": ({"cu_seqlens": ints(0, 5, 4)}, "cu_seqlens must not descend|seq_lens|num_tentative"),
    "context": ({"seq_lens": ints(2, 1)}, "seq_lens must count the tokens of this step too"),
    "tentative": ({"num_tentative": ints(4, 0)}, "num_tentative must lie between 0 and"),
    "fewer than none": ({"num_tentative": ints(0, -1)}, "num_tentative must lie between 0 and"),
    "pending": ({"pending": ints(-1, 0)}, "pending must not be negative"),
    "position": ({"positions": ints(14, -15, 16, 0)}, "positions must not be negative"),
    "slot": ({"slot_mapping": ints(14, -15, 32, 16)}, "slot_mapping must not be negative"),
    "block": ({"block_tables": ints(0, -2, 1, 0).view(2, 2)}, "block_tables must not be negative"),
    "row": ({"state_rows": ints(0, -1)}, "state_rows must not be negative"),
    "shared row": ({"state_rows": ints(3, 3)}, "Two sequences must not share one of state_rows"),
    "sequences": ({"state_rows": ints(3)}, r"state_rows must have shape \[2\], not \[1\]"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batch_refuses(case: str) -> None:
    changed, message = BATCHES[case]
    with pytest.raises(ValueError, match=f"^({message}).*\\.$"):
        batch(**changed)


def attention_layer(**changed: Any) -> _native.Attention:
    rows = (2 * HEADS + 2 * KV_HEADS) * DIM
    arguments: dict[str, Any] = {
        "norm": torch.ones(HIDDEN),
        "in_proj": weight(rows, HIDDEN),
        "out_proj": weight(HIDDEN, HEADS * DIM),
        "in_bias": None,
        "out_bias": None,
        "q_norm": torch.ones(DIM),
        "k_norm": None,
        "inv_freq": torch.ones(2),
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "dim": DIM,
        "gate": True,
        "eps": 1e-6,
        "rope_scale": 1.0,
        **changed,
    }
    return _native.Attention(**arguments)


ATTENTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no gate": ({"gate": False}, r"in_proj must have shape \[64, 32\], not \[96, 32\]"),
    "head": ({"dim": 7}, "Heads must be a multiple of key-value heads, the head's width even"),
    "heads": ({"num_kv_heads": 3}, "Heads must be a multiple of key-value heads"),
    "none": ({"num_heads": 0}, "Heads must be a multiple of key-value heads"),
    "huge": ({"num_heads": 2**60}, "Heads must be a multiple of key-value heads"),
    "out": ({"out_proj": weight(HIDDEN, 16)}, r"out_proj must have shape \[32, 32\], not \[32, 16\]"),
    "norm": ({"norm": torch.ones(16)}, r"in_proj must have shape \[96, 16\], not \[96, 32\]"),
    "q_norm": ({"q_norm": torch.ones(4)}, r"q_norm must have shape \[8\], not \[4\]"),
    "angles": ({"inv_freq": torch.ones(5)}, "inv_freq must have at most half as many entries"),
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_layer_refuses(case: str) -> None:
    changed, message = ATTENTIONS[case]
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        attention_layer(**changed)


def paged(blocks: int, heads: int = KV_HEADS, dim: int = DIM) -> _native.PagedCache:
    shape = (blocks, 16, heads, dim)
    return _native.PagedCache(
        torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize(
    ("changed", "cache", "message"),
    [
        ({}, paged(2), "slot_mapping or block_tables names a block beyond the paged cache"),
        (
            {"slot_mapping": ints(14, 15, 48, 16)},
            paged(3),
            "slot_mapping or block_tables names a block beyond",
        ),
        ({}, paged(3, heads=1), "The paged cache was made for a layer of another shape"),
        ({}, paged(3, dim=16), "The paged cache was made for a layer of another shape"),
        (
            {"block_tables": ints(0, 1).view(2, 1)},
            paged(3),
            "block_tables must have a block for every 16 tokens",
        ),
    ],
)
def test_attention_refuses_a_cache_that_does_not_fit(
    changed: dict[str, Tensor], cache: _native.PagedCache, message: str
) -> None:
    x = torch.ones(4, HIDDEN)
    with pytest.raises(ValueError, match=message):
        _native.attention(attention_layer(), batch(**changed), cache, x)
    assert (x == 1).all()


def test_paged_cache_refuses_other_arrays() -> None:
    k = torch.zeros(2, 16, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="k must hold bfloat16"):
        _native.PagedCache(k.half(), k)
    with pytest.raises(ValueError, match=r"v must have shape \[2, 16, 2, 8\], not \[1, 16, 2, 8\]"):
        _native.PagedCache(k, k[:1])
    with pytest.raises(ValueError, match=r"k must have shape \[any, 16, any, any\]"):
        _native.PagedCache(k[:, :8], k)


def delta_layer(kernel: int = 4, **changed: Any) -> _native.GatedDeltaNet:
    arguments: dict[str, Any] = {
        "norm": torch.ones(HIDDEN),
        "qkvz": weight(2 * 8 + 2 * 4 * 6, HIDDEN),
        "ba": weight(8, HIDDEN),
        "out": weight(HIDDEN, 4 * 6),
        "conv": torch.zeros(2 * 8 + 4 * 6, kernel),
        "decay": torch.zeros(4),
        "dt_bias": torch.zeros(4),
        "out_norm": torch.zeros(6),
        "num_k_heads": 2,
        "num_v_heads": 4,
        "dk": 4,
        "dv": 6,
        "eps": 1e-6,
        **changed,
    }
    return _native.GatedDeltaNet(**arguments)


def recurrent(rows: int = 2, history: int = 3, rollback: int = 2, dv: int = 6) -> _native.RecurrentCache:
    return _native.RecurrentCache(
        torch.zeros(rows, 3 + rollback, 2 * 8 + 4 * 6),
        torch.zeros(rows, 4, 4, dv),
        torch.zeros(rows, rollback, 4),
        torch.zeros(rows, rollback, 4, 4),
        torch.zeros(rows, rollback, 4, dv),
        history,
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_k_heads": 3}, "Value heads must be a multiple of key heads"),
        ({"dv": 0}, "Value heads must be a multiple of key heads, and all sizes positive"),
        ({"ba": weight(9, HIDDEN)}, r"ba must have shape \[8, 32\], not \[9, 32\]"),
        ({"conv": torch.zeros(41, 4)}, r"conv must have shape \[40, any\], not \[41, 4\]"),
        ({"conv": torch.zeros(40, 0)}, "conv must have at least one tap"),
        ({"decay": torch.zeros(3)}, r"decay must have shape \[4\], not \[3\]"),
    ],
)
def test_delta_layer_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        delta_layer(**changed)


@pytest.mark.parametrize(
    ("kernel", "cache", "message"),
    [
        (4, recurrent(rows=1), "state_rows names a row beyond the recurrent cache"),
        (4, recurrent(rollback=1), "The recurrent cache keeps fewer tokens undoable than the batch asks for"),
        (4, recurrent(dv=7), "The recurrent cache was made for a layer of another shape"),
        (3, recurrent(), "The recurrent cache was made for a layer of another shape"),
    ],
)
def test_delta_net_refuses_a_cache_that_does_not_fit(
    kernel: int, cache: _native.RecurrentCache, message: str
) -> None:
    x = torch.ones(4, HIDDEN)
    with pytest.raises(ValueError, match=message):
        _native.gated_delta_net(delta_layer(kernel), batch(), cache, x)
    assert (x == 1).all()


def test_recurrent_cache_refuses_a_window_shorter_than_its_history() -> None:
    with pytest.raises(ValueError, match="conv must hold at least `history` tokens"):
        recurrent(history=6)
    with pytest.raises(ValueError, match=r"journal_g must have shape \[2, 1, 4\], not \[2, 2, 4\]"):
        recurrent(history=4)


def ffn_layer(**changed: Any) -> _native.Ffn:
    """Two experts of width 16, a shared one of width 24 and a gate."""
    offset, stride = _native.weight_bytes("q4", 32, HIDDEN), 8192
    arguments: dict[str, Any] = {
        "norm": torch.ones(HIDDEN),
        "eps": 1e-6,
        "shared": _native.Mlp(weight(48, HIDDEN), weight(HIDDEN, 24)),
        "shared_gate": torch.zeros(HIDDEN),
        "router": weight(2, HIDDEN),
        "experts": zeros(2 * stride),
        "expert_stride": stride,
        "offset2": offset,
        "format13": "q4",
        "format2": "q8",
        "num_experts": 2,
        "top_k": 1,
        "intermediate": 16,
        **changed,
    }
    return _native.Ffn(**arguments)


FFNS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": (
        {"shared": None, "router": None, "experts": None},
        "A layer needs a router, a shared part or both",
    ),
    "no experts": ({"experts": None}, "A router and experts come together"),
    "gate alone": ({"shared": None}, "shared_gate needs a shared expert and a router"),
    "router": ({"num_experts": 3}, r"router must have shape \[3, 32\], not \[2, 32\]"),
    "top_k": ({"top_k": 3}, "top_k must lie between 1 and the number of experts"),
    "no top_k": ({"top_k": 0}, "top_k must lie between 1 and the number of experts"),
    "format": ({"format2": "q2"}, "There is no weight format named 'q2'"),
    "shape of shared": (
        {"shared": _native.Mlp(weight(48, 16), weight(16, 24))},
        r"w2 of shared must have shape \[32, any\], not \[16, 24\]",
    ),
    "too close": ({"offset2": 64}, "An expert's w13 must end before offset2"),
    "beyond": ({"offset2": 8128}, "An expert's w13 must end before offset2 and its w2 before expert_stride"),
    "odd": ({"offset2": 1300}, "offset2 and expert_stride must be multiples of 64"),
    "backwards": ({"expert_stride": -(2**63)}, "offset2 and expert_stride must be multiples of 64"),
    "endless": ({"expert_stride": 2**62}, "experts must be smaller"),
    "wide": ({"intermediate": 2**62}, "A weight cannot have"),
    "bytes": ({"experts": zeros(8192)}, r"experts must have shape \[16384\], not \[8192\]"),
    "alignment": ({"experts": zeros(16384, 32)}, "experts must be aligned to 64 bytes"),
}


@pytest.mark.parametrize("case", FFNS)
def test_ffn_layer_refuses(case: str) -> None:
    changed, message = FFNS[case]
    with pytest.raises(ValueError, match=f"^{message}.*\\.$"):
        ffn_layer(**changed)


PLACES: dict[str, tuple[int, Tensor, str]] = {
    "no such": (2, zeros(8192), "There is no such expert"),
    "negative": (-1, zeros(8192), "There is no such expert"),
    "short": (0, zeros(2048), "expert must hold w13 and, at offset2, w2"),
    "alignment": (0, zeros(8192, 32), "expert must be aligned to 64 bytes"),
    "dtype": (0, torch.zeros(8192), "expert must hold uint8"),
}


@pytest.mark.parametrize("case", PLACES)
def test_an_expert_cannot_be_placed_where_it_does_not_fit(case: str) -> None:
    index, expert, message = PLACES[case]
    with pytest.raises(ValueError, match=message):
        ffn_layer().place_expert(index, expert)


def test_a_dense_layer_has_no_expert_to_place() -> None:
    dense = _native.Ffn(torch.ones(HIDDEN), 1e-6, _native.Mlp(weight(48, HIDDEN), weight(HIDDEN, 24)))
    with pytest.raises(ValueError, match="A dense layer has no experts"):
        dense.place_expert(0, zeros(8192))


def test_mlp_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"w13 must have shape \[32, 8\], not \[30, 8\]"):
        _native.Mlp(weight(30, 8), weight(8, 16))
    with pytest.raises(ValueError, match=r"bias13 must have shape \[32\], not \[16\]"):
        _native.Mlp(weight(32, 8), weight(8, 16), torch.zeros(16))


def test_ffn_refuses_other_places_for_the_router_logits() -> None:
    x = torch.ones(3, HIDDEN)
    with pytest.raises(ValueError, match=r"router_logits must have shape \[3, 2\], not \[2, 3\]"):
        _native.ffn(ffn_layer(), x, torch.zeros(2, 3))
    dense = _native.Ffn(torch.ones(HIDDEN), 1e-6, _native.Mlp(weight(48, HIDDEN), weight(HIDDEN, 24)))
    with pytest.raises(ValueError, match="A dense layer has no router logits"):
        _native.ffn(dense, x, torch.zeros(3, 2))
    assert (x == 1).all()
