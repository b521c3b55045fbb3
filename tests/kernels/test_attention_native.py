"""Native attention over paged bf16 keys and values: near the reference, the same bits however it is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from godwit import _native
from godwit.kernels import kv_layout, reference
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.qtensor import quantize

EPS = 1e-6
BF16 = 2.0**-9  # relative error of rounding to bf16


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before, threads = _native.instruction_set(), _native.num_threads()
    yield
    _native.set_instruction_set(before)
    _native.set_num_threads(threads)


@dataclass(frozen=True)
class Shape:
    """Sizes and switches of a layer."""

    kv_heads: int
    ratio: int
    dim: int
    rotary: int
    gate: bool = True
    norms: bool = True
    bias: bool = False
    hidden: int = 40
    rope_scale: float = 1.0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.ratio


SHAPES = (
    Shape(2, 8, 32, 8),
    Shape(1, 1, 16, 16, gate=False),
    Shape(2, 3, 24, 12, bias=True, norms=False),
    Shape(1, 2, 80, 80, gate=False, rope_scale=1.3, hidden=33),
    Shape(3, 2, 96, 24, bias=True),
    Shape(1, 3, 18, 6),
    Shape(1, 8, 256, 64),
    Shape(1, 20, 64, 64, gate=False),
)
SMALL, WIDE, ODD, TINY = SHAPES[0], SHAPES[6], SHAPES[2], SHAPES[5]


class Layer:
    """Random weights of one layer, for the native kernels and for plain torch."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        queries, keys = shape.heads * shape.dim, shape.kv_heads * shape.dim
        self.split = [queries, queries if shape.gate else 0, keys, keys]
        rows = sum(self.split)
        self.norm = torch.rand(shape.hidden) + 0.5
        self.in_weight = quantize(torch.randn(rows, shape.hidden) * 2 * shape.hidden**-0.5, "bf16")
        self.out_weight = quantize(torch.randn(shape.hidden, queries) * queries**-0.5, "bf16")
        self.in_bias = torch.randn(rows) * 0.3 if shape.bias else None
        self.out_bias = torch.randn(shape.hidden) if shape.bias else None
        self.q_norm = torch.rand(shape.dim) + 0.5 if shape.norms else None
        self.k_norm = torch.rand(shape.dim) + 0.5 if shape.norms else None
        self.inv_freq = 100.0 ** (-torch.arange(0, shape.rotary, 2) / shape.rotary)
        self.in_proj, self.out_proj = (
            _native.Weight(w.format, *w.shape, w.data) for w in (self.in_weight, self.out_weight)
        )
        self.native = _native.Attention(
            self.norm,
            self.in_proj,
            self.out_proj,
            self.in_bias,
            self.out_bias,
            self.q_norm,
            self.k_norm,
            self.inv_freq,
            shape.heads,
            shape.kv_heads,
            shape.dim,
            shape.gate,
            EPS,
            shape.rope_scale,
        )

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries ``[T, heads, D]`` and keys ``[T, kv_heads, D]``, rotated; gate and values."""
        normed = reference.rms_norm(x, self.norm, EPS, zero_centered=False)
        projected = reference.linear(normed, self.in_weight.dequantize(), self.in_bias)
        q, gate, k, v = torch.split(projected, self.split, -1)
        q, k, v = (torch.unflatten(part, -1, (-1, self.shape.dim)) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q = reference.rms_norm(q, self.q_norm, EPS, zero_centered=False)
            k = reference.rms_norm(k, self.k_norm, EPS, zero_centered=False)
        cos, sin = reference.rotary_cos_sin(positions, self.inv_freq, self.shape.rope_scale, torch.float32)
        q, k = (reference.apply_rotary_emb(part, cos, sin) for part in (q, k))
        return q, k, gate, v


class Sequences:
    """Caches of some sequences whose blocks lie scattered among others that hold NaN."""

    def __init__(self, layer: Layer, lengths: Sequence[int]) -> None:
        self.layer = layer
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.randperm(sum(counts) + 2).tolist()
        shape = (len(order), BLOCK_SIZE, layer.shape.kv_heads, layer.shape.dim)
        self.k, self.v = (torch.full(shape, torch.nan, dtype=torch.bfloat16) for _ in range(2))
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        self.past = [0] * len(lengths)
        self.native = _native.PagedCache(self.k, self.v)

    def batch(self, chosen: Sequence[int], counts: Sequence[int]) -> ForwardBatch:
        pieces = [[0] * count for count in counts]
        past = [self.past[seq] for seq in chosen]
        return ForwardBatch.cached(pieces, past, [self.tables[seq] for seq in chosen], list(chosen))

    def step(self, pieces: dict[int, Tensor]) -> list[Tensor]:
        """Outputs of the next tokens of some sequences; the residual is part of them."""
        batch = self.batch(list(pieces), [piece.shape[0] for piece in pieces.values()])
        x = torch.cat(list(pieces.values()))
        _native.attention(self.layer.native, to_native(batch), self.native, x)
        for seq, piece in pieces.items():
            self.past[seq] += piece.shape[0]
        return list(torch.split(x, [piece.shape[0] for piece in pieces.values()]))


def to_native(batch: ForwardBatch) -> _native.Batch:
    assert batch.slot_mapping is not None and batch.block_tables is not None
    zeros = torch.zeros(len(batch.seq_lens), dtype=torch.long)
    return _native.Batch(
        batch.positions,
        torch.tensor(batch.cu_seqlens),
        torch.tensor(batch.seq_lens),
        batch.slot_mapping,
        batch.block_tables,
        torch.tensor(batch.state_indices),
        zeros,
        zeros,
    )


def whole(layer: Layer, xs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of sequences computed in one step."""
    return Sequences(layer, [x.shape[0] for x in xs]).step(dict(enumerate(xs)))


def expected(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output of one sequence with keys and values in bf16 and all else exact, and how far one may stray.

    Rounding a query, and a key that lies next to a tie, moves a score by at most
    ``2 BF16 |q| |k| / sqrt(D)``, thus a probability by the factor ``exp`` of twice that; rounding it moves it
    by BF16 more, and a value next to a tie likewise. A convex sum of values moves by no more than that times
    the largest of them.
    """
    shape = layer.shape
    q, k, gate, v = layer.project(x, torch.arange(x.shape[0]))
    keys, values = (part.bfloat16().double() for part in (k, v))
    queries = q.double()
    out = reference.attention(queries, [keys], [values], [x.shape[0]], shape.dim**-0.5)
    queries, keys = torch.unflatten(queries, 1, (shape.kv_heads, -1)), keys[:, :, None]
    scores = (queries.norm(dim=-1) * keys.norm(dim=-1).amax(0)).flatten(1) * shape.dim**-0.5
    spread = torch.expm1(4 * BF16 * scores) + 4 * BF16
    largest = values.abs().amax(0).repeat_interleave(shape.ratio, 0)
    slack = spread[..., None] * largest
    opened = torch.unflatten(gate.double().sigmoid(), -1, (-1, shape.dim)) if shape.gate else torch.ones(())
    weight = layer.out_weight.dequantize().double()
    bias = 0 if layer.out_bias is None else layer.out_bias.double()
    result = x.double() + (out * opened).flatten(1) @ weight.T + bias
    # float32 products of some hundred terms add little
    return result, (slack * opened).flatten(1) @ weight.abs().T + 1e-5 * (1 + result.abs())


@pytest.mark.parametrize("level", _native.available_instruction_sets())
@pytest.mark.parametrize("shape", SHAPES)
def test_close_to_the_reference(level: str, shape: Shape) -> None:
    """Lengths around a block and a partition; every slot that no token fills holds NaN."""
    _native.set_instruction_set(level)
    layer = Layer(shape)
    lengths = (1, 15, 16, 17, 300) if shape is not WIDE else (3, 257)
    xs = [torch.randn(length, shape.hidden) for length in lengths]
    for x, out in zip(xs, whole(layer, xs), strict=True):
        result, slack = expected(layer, x)
        assert bool(((out - result).abs() <= slack).all())
        # the bound is that of the worst case: on average the error must be far below it
        assert float((out - result).norm() / (result - x).norm()) < 0.01


@pytest.mark.parametrize("level", _native.available_instruction_sets())
@pytest.mark.parametrize("shape", [SMALL, ODD, TINY])
def test_decoding_gives_the_bits_of_prefill(level: str, shape: Shape) -> None:
    """Token by token, in pieces, and all at once, across the border of a partition."""
    _native.set_instruction_set(level)
    layer = Layer(shape)
    x = torch.randn(275, shape.hidden)
    (prefill,) = whole(layer, [x])
    for pieces in ([255] + [1] * 20, [16, 17, 100, 3, 120, 1, 18], [1] * 40):
        cache = Sequences(layer, [x.shape[0]])
        done = 0
        for count in pieces:
            (out,) = cache.step({0: x[done : done + count].clone()})
            assert torch.equal(out, prefill[done : done + count]), (done, count)
            done += count


@pytest.mark.parametrize("level", _native.available_instruction_sets())
def test_other_sequences_change_no_bit(level: str) -> None:
    """Decoding together, drafts and prompts in one step, and each sequence on its own."""
    _native.set_instruction_set(level)
    layer = Layer(TINY if level == "scalar" else SMALL)
    lengths = (1, 15, 16, 17, 255, 256, 257, 600)
    xs = [torch.randn(length, layer.shape.hidden) for length in lengths]
    alone = [whole(layer, [x])[0] for x in xs]
    for ours, theirs in zip(whole(layer, xs), alone, strict=True):
        assert torch.equal(ours, theirs)
    cache = Sequences(layer, lengths)
    cache.step({seq: x[:-3].clone() for seq, x in enumerate(xs) if x.shape[0] > 3})
    mixed = cache.step({7: xs[7][-3:].clone(), 0: xs[0].clone(), 4: xs[4][-3:-2].clone()})
    for seq, out, rows in zip((7, 0, 4), mixed, (slice(-3, None), slice(None), slice(-3, -2)), strict=True):
        assert torch.equal(out, alone[seq][rows])
    last = cache.step({4: xs[4][-2:].clone(), 6: xs[6][-3:].clone(), 1: xs[1][-3:].clone()})
    for seq, out in zip((4, 6, 1), last, strict=True):
        assert torch.equal(out, alone[seq][-out.shape[0] :])


@pytest.mark.parametrize("level", _native.available_instruction_sets())
def test_threads_change_no_bit(level: str) -> None:
    _native.set_instruction_set(level)
    layer = Layer(TINY if level == "scalar" else SMALL)
    xs = [torch.randn(length, layer.shape.hidden) for length in (700, 5, 530)]
    results = []
    for threads in (1, 2, 3):
        _native.set_num_threads(threads)
        cache = Sequences(layer, [x.shape[0] for x in xs])
        results.append(cache.step({seq: x[:-2].clone() for seq, x in enumerate(xs)}))
        results[-1] += cache.step({seq: x[-2:].clone() for seq, x in enumerate(xs)})
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_long_context_is_joined_in_pieces() -> None:
    """So many partitions and rows that their results are joined a few partitions at a time."""
    layer = Layer(Shape(1, 8, 64, 16, hidden=16))
    x = torch.randn(3000, 16)
    (prefill,) = whole(layer, [x])
    _native.set_num_threads(2)
    cache = Sequences(layer, [3000])
    cache.step({0: x[:2500].clone()})
    (out,) = cache.step({0: x[2500:].clone()})
    assert torch.equal(out, prefill[2500:])
    cache.past[0] = 2800
    (out,) = cache.step({0: x[2800:].clone()})
    assert torch.equal(out, prefill[2800:])


def test_the_cache_holds_rounded_keys_and_values() -> None:
    """In the native layout, at the slots of the tokens; all other slots stay as they were."""
    _native.set_instruction_set("scalar")
    layer = Layer(ODD)
    x = torch.randn(19, ODD.hidden)
    cache = Sequences(layer, [19])
    cache.step({0: x.clone()})
    _, k, _, v = layer.project(x, torch.arange(19))
    for stored, new in ((kv_layout.keys_from_native(cache.k), k), (kv_layout.values_from_native(cache.v), v)):
        tokens = reference.gather_kv(stored, torch.tensor(cache.tables[0]), 19)
        torch.testing.assert_close(tokens.float(), new, rtol=2 * BF16, atol=1e-5)
        assert int(stored.isnan().sum()) == stored.numel() - tokens.numel()


def test_layouts() -> None:
    """Where kernels.h says that an element lies, and back."""
    plain = torch.arange(3 * 16 * 2 * 6).view(3, 16, 2, 6)
    keys = kv_layout.keys_to_native(plain).flatten(1)
    values = kv_layout.values_to_native(plain).flatten(1)
    for block, token, head, d in ((0, 0, 0, 0), (1, 5, 1, 4), (2, 14, 0, 3), (2, 15, 1, 5)):
        here = plain[block, token, head, d]
        assert keys[block, head * 96 + d // 2 * 32 + token * 2 + d % 2] == here
        assert values[block, head * 96 + token // 2 * 12 + d * 2 + token % 2] == here
    assert torch.equal(kv_layout.keys_from_native(kv_layout.keys_to_native(plain)), plain)
    assert torch.equal(kv_layout.values_from_native(kv_layout.values_to_native(plain)), plain)


def test_no_tokens_are_no_work() -> None:
    layer = Layer(SMALL)
    cache = Sequences(layer, [4])
    (out,) = cache.step({0: torch.empty(0, SMALL.hidden)})
    assert out.shape == (0, SMALL.hidden) and bool(cache.k.isnan().all())


def test_scratch_stays_modest() -> None:
    """A step of many tokens takes no more scratch than one of 512."""
    layer = Layer(SMALL)
    whole(layer, [torch.randn(512, SMALL.hidden)])
    before = _native.scratch_bytes()
    whole(layer, [torch.randn(1500, SMALL.hidden)])
    assert _native.scratch_bytes() == before
