"""The native delta layer: near the reference, and the same bits however tokens are cut and undone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from godwit import _native
from godwit.config import GatedDeltaNetSpec, ModelConfig
from godwit.kernels import ops
from godwit.models.batch import ForwardBatch
from godwit.models.caches import Caches, RecurrentState, cache_spec
from godwit.models.mixers import GatedDeltaNet
from godwit.qtensor import GROUP, SPAN, QuantTensor, quantize
from tests.kernels.packed import ints

EPS = 1e-6
UNIT = 2.0**-24  # relative error of one float32 operation
SETS = _native.available_instruction_sets()
NUM_ROWS = 4


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before, threads = _native.instruction_set(), _native.num_threads()
    yield
    _native.set_instruction_set(before)
    _native.set_num_threads(threads)


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and the format of its large matrices."""

    hidden: int
    num_k_heads: int
    ratio: int
    dk: int
    dv: int
    kernel: int
    format: str = "bf16"

    @property
    def spec(self) -> GatedDeltaNetSpec:
        heads = (self.num_k_heads, self.num_k_heads * self.ratio)
        return GatedDeltaNetSpec(*heads, self.dk, self.dv, self.kernel)


PLAIN = Shape(40, 2, 2, 16, 32, 4)
ODD = Shape(33, 1, 3, 5, 37, 4)
SHAPES = (
    PLAIN,
    ODD,
    Shape(48, 2, 1, 32, 16, 2),
    Shape(64, 2, 4, 12, 24, 3),
    Shape(16, 3, 1, 7, 3, 3),
    Shape(24, 1, 2, 33, 130, 5),
    Shape(20, 1, 1, 8, 48, 1),
    Shape(24, 1, 2, 8, 8, 20),
)
QUANTISED = (Shape(256, 2, 2, 32, 32, 4, "q8"), Shape(128, 2, 1, 64, 96, 4, "q4"))


def native(weight: QuantTensor) -> _native.Weight:
    return _native.Weight(weight.format, *weight.shape, weight.data)


class Layer:
    """Random weights of one layer, for the native kernels and in the reference module."""

    def __init__(self, shape: Shape) -> None:
        self.shape, spec = shape, shape.spec
        self.norm = torch.rand(shape.hidden) + 0.5
        config = SimpleNamespace(hidden_size=shape.hidden, norm_eps=EPS)
        self.module = GatedDeltaNet(spec, cast(ModelConfig, config)).requires_grad_(False)
        for value in self.module.parameters():
            value.normal_(std=value.shape[-1] ** -0.5 if value.dim() > 1 else 1.0)
        qkvz = self._pack(self.module.in_proj_qkvz.weight, shape.format)
        ba = self._pack(self.module.in_proj_ba.weight, "bf16")
        out = self._pack(self.module.out_proj.weight, shape.format)
        self.native = _native.GatedDeltaNet(
            self.norm,
            native(qkvz),
            native(ba),
            native(out),
            self.module.conv_weight.clone(),
            -self.module.A_log.exp(),
            self.module.dt_bias.clone(),
            self.module.norm_weight.clone(),
            spec.num_k_heads,
            spec.num_v_heads,
            spec.head_k_dim,
            spec.head_v_dim,
            EPS,
        )

    @staticmethod
    def _pack(weight: nn.Parameter, format: str) -> QuantTensor:
        packed = quantize(weight, format)
        weight.copy_(packed.dequantize())
        return packed

    def caches(self, max_rollback: int = 4) -> Caches:
        """Rows that nobody has used yet are NaN."""
        spec = cache_spec(self.module.spec, torch.float32)
        state = cast(RecurrentState, spec.allocate(0, NUM_ROWS, max_rollback, "cpu"))
        for array in arrays(state):
            array.fill_(float("nan"))
        return Caches([state], [], max_rollback, [0] * NUM_ROWS)

    def reference(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        batch = ForwardBatch.packed(torch.zeros(x.shape[0], dtype=torch.long), lengths)
        return x + self._mixer(x, batch, None, None)

    def reference_step(self, caches: Caches, row: int, x: Tensor, tentative: int) -> Tensor:
        batch = ForwardBatch.cached([[0] * x.shape[0]], [0], [[0] * x.shape[0]], [row], [tentative])
        out = x + self._mixer(x, batch, caches, caches.layers[0])
        caches.pending[row] = tentative
        return out

    def _mixer(self, x: Tensor, *context: Any) -> Tensor:
        out: Tensor = self.module(ops.rms_norm(x, self.norm, EPS, zero_centered=False), *context)
        return out

    def tolerance(self, written: Tensor) -> float:
        """What float32 may differ by, in units of what the layer writes.

        Four sums of random roundings lead to an output, and the state hands on those of its past; the two
        normalisations divide by sizes that may be several times below the ordinary.
        """
        s = self.shape
        lengths = (s.hidden, s.dk, s.dk, s.num_k_heads * s.ratio * s.dv)
        return 4 * UNIT * sum(math.sqrt(n) for n in lengths) * float(written.abs().max())


def arrays(state: RecurrentState) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return state.conv, state.state, state.journal_g, state.journal_k, state.journal_delta


Piece = tuple[int, Tensor, int]  # row, tokens, how many of the last are tentative


def step(layer: Layer, caches: Caches, pieces: Sequence[Piece]) -> list[Tensor]:
    """One call of the native op for the next tokens of several sequences."""
    lengths = [tokens.shape[0] for _, tokens, _ in pieces]
    rows = [row for row, _, _ in pieces]
    x = torch.cat([tokens for _, tokens, _ in pieces])
    zeros = torch.zeros(x.shape[0], dtype=torch.int64)
    batch = _native.Batch(
        zeros,
        ints(*accumulate(lengths, initial=0)),
        ints(*lengths),
        zeros,
        torch.zeros(len(rows), 1, dtype=torch.int64),
        ints(*rows),
        ints(*(tentative for _, _, tentative in pieces)),
        ints(*(caches.pending[row] for row in rows)),
    )
    (state,) = caches.recurrent()
    _native.gated_delta_net(layer.native, batch, _native.RecurrentCache(*arrays(state), state.history), x)
    for row, _, tentative in pieces:
        caches.pending[row] = tentative
    return list(torch.split(x, lengths))


def start(layer: Layer, *rows: int, max_rollback: int = 4) -> Caches:
    caches = layer.caches(max_rollback)
    for row in rows:
        caches.reset_row(row)
    return caches


def run(
    layer: Layer, x: Tensor, lengths: Sequence[int], max_rollback: int = 4
) -> tuple[Tensor, list[Tensor]]:
    """A sequence in steps of these lengths: outputs, and what the cache knows of it afterwards."""
    caches = start(layer, 1, max_rollback=max_rollback)
    out = torch.cat([step(layer, caches, [(1, piece, 0)])[0] for piece in torch.split(x, list(lengths))])
    return out, known(caches, 1)


def known(caches: Caches, row: int) -> list[Tensor]:
    (state,) = caches.recurrent()
    window = state.conv[row]
    return [state.state[row].clone(), window[window.shape[0] - state.history :].clone()]


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("level", SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_are_those_of_the_reference(shape: Shape, level: str) -> None:
    _native.set_instruction_set(level)
    layer, lengths = Layer(shape), [21, 1, 6]
    x = torch.randn(sum(lengths), shape.hidden)
    wanted = layer.reference(x, lengths)
    pieces = [(row, tokens, 0) for row, tokens in enumerate(torch.split(x, lengths))]
    found = torch.cat(step(layer, start(layer, 0, 1, 2), pieces))
    written = wanted - x
    assert float(written.abs().max()) > 0.1
    assert float((found - wanted).abs().max()) <= layer.tolerance(written)


def rounded(x: Tensor, format: str) -> Tensor:
    """Activations as they meet a q4 or q8 weight: 8 bits in each span or group."""
    size = GROUP if format == "q8" else min(GROUP * SPAN, x.shape[-1])
    grouped = torch.unflatten(x, -1, (-1, size))
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    return torch.flatten((grouped / scale).round() * scale, -2)


@pytest.mark.parametrize("level", SETS)
@pytest.mark.parametrize("shape", QUANTISED)
def test_only_the_rounding_of_activations_separates_quantised_layers(shape: Shape, level: str) -> None:
    """A reference that rounds them too is near: what is left are values on the brink between two codes."""
    _native.set_instruction_set(level)
    layer, x = Layer(shape), torch.randn(30, shape.hidden)
    found = step(layer, start(layer, 0), [(0, x, 0)])[0]
    exact = layer.reference(x, [30])
    for linear in (layer.module.in_proj_qkvz, layer.module.out_proj):
        linear.register_forward_pre_hook(lambda _module, inputs: (rounded(inputs[0], shape.format),))
    near = layer.reference(x, [30])
    rounding = float((near - exact).norm())
    assert 1e-3 < rounding / float((exact - x).norm()) < 0.1
    assert float((found - near).norm()) < 0.1 * rounding


@pytest.mark.parametrize("level", SETS)
@pytest.mark.parametrize("shape", [PLAIN, ODD])
def test_caches_hold_what_the_reference_keeps(shape: Shape, level: str) -> None:
    _native.set_instruction_set(level)
    layer = Layer(shape)
    ours, theirs = start(layer, 2), start(layer, 2)
    for length, tentative, undone in ((5, 0, 0), (4, 3, 2), (1, 0, 0), (2, 2, 0), (3, 3, 3), (6, 1, 0)):
        x = torch.randn(length, shape.hidden)
        found = step(layer, ours, [(2, x, tentative)])[0]
        wanted = layer.reference_step(theirs, 2, x, tentative)
        assert torch.allclose(found, wanted, rtol=0, atol=layer.tolerance(wanted - x))
        kept = ours.recurrent()[0].history + tentative  # older inputs are of no use to anybody
        for left, right in zip(arrays(ours.recurrent()[0]), arrays(theirs.recurrent()[0]), strict=True):
            if right is theirs.recurrent()[0].conv:
                left, right = left[:, -kept:], right[:, -kept:]
            atol = layer.tolerance(right.nan_to_num())  # NaN where nobody has written
            assert torch.allclose(left, right, rtol=0, atol=atol, equal_nan=True)
        ours.rollback(2, undone)
        theirs.rollback(2, undone)


@pytest.mark.parametrize("level", SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_cut_changes_a_bit(shape: Shape, level: str) -> None:
    _native.set_instruction_set(level)
    layer, x = Layer(shape), torch.randn(38, shape.hidden)
    whole, kept = run(layer, x, [38])
    for lengths in ([1] * 38, [16, 16, 6], [17, 1, 20], [2, 3, 31, 2], [37, 1]):
        out, after = run(layer, x, lengths, max_rollback=len(lengths) % 3)
        assert torch.equal(out, whole)
        assert same(after, kept)


@pytest.mark.parametrize("level", SETS)
@pytest.mark.parametrize("shape", [PLAIN, ODD, *QUANTISED])
def test_no_neighbour_changes_a_bit(shape: Shape, level: str) -> None:
    _native.set_instruction_set(level)
    layer = Layer(shape)
    xs = [torch.randn(length, shape.hidden) for length in (9, 30, 4)]
    alone = [run(layer, x, [x.shape[0]]) for x in xs]
    caches = start(layer, 3, 0, 1)
    cuts = ([4, 0, 5], [1, 28, 1], [0, 3, 1])
    outs: list[list[Tensor]] = [[], [], []]
    for turn in range(3):
        begins = [sum(cut[:turn]) for cut in cuts]
        pieces = [
            (row, x[begin : begin + cut[turn]], 0)
            for row, x, begin, cut in zip((3, 0, 1), xs, begins, cuts, strict=True)
        ]
        for parts, out in zip(outs, step(layer, caches, pieces), strict=True):
            parts.append(out)
    for row, parts, (out, kept) in zip((3, 0, 1), outs, alone, strict=True):
        assert torch.equal(torch.cat(parts), out)
        assert same(known(caches, row), kept)
    assert all(array[2].isnan().all() for array in arrays(caches.recurrent()[0]))


@pytest.mark.parametrize("level", SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_undone_tokens_leave_no_trace(shape: Shape, level: str) -> None:
    """Drafts of which some are undone, beside a sequence that just goes on: the bits of plain decoding."""
    _native.set_instruction_set(level)
    layer, x = Layer(shape), torch.randn(24, shape.hidden)
    whole, kept = run(layer, x, [24])
    other, other_kept = run(layer, x.flip(0), [24])
    caches, at, turn = start(layer, 0, 3), 0, 0
    for sure, right, wrong in (
        (4, 0, 0),
        (1, 1, 2),
        (0, 2, 0),
        (1, 0, 3),
        (2, 4, 0),
        (0, 0, 4),
        (3, 1, 1),
        (5, 0, 0),
    ):
        drafted = torch.cat((x[at : at + sure + right], torch.randn(wrong, shape.hidden)))
        beside = (3, x.flip(0)[3 * turn : 3 * turn + 3], turn % 3)
        found, out = step(layer, caches, [(0, drafted, right + wrong), beside])
        assert torch.equal(found[: sure + right], whole[at : at + sure + right])
        assert torch.equal(out, other[3 * turn : 3 * turn + 3])
        caches.rollback(0, wrong)
        at, turn = at + sure + right, turn + 1
    assert (at, turn) == (24, 8)
    step(layer, caches, [(0, x[:0], 0), (3, x[:0], 0)])  # no token: what is in the journal enters the state
    assert same(known(caches, 0), kept)
    assert same(known(caches, 3), other_kept)


@pytest.mark.parametrize("shape", [PLAIN, QUANTISED[1]])
def test_no_number_of_threads_changes_a_bit(shape: Shape) -> None:
    layer, x = Layer(shape), torch.randn(50, shape.hidden)
    _native.set_num_threads(1)
    whole, kept = run(layer, x, [47, 1, 1, 1])
    for num_threads in (2, 3, 7):
        _native.set_num_threads(num_threads)
        out, after = run(layer, x, [47, 1, 1, 1])
        assert torch.equal(out, whole)
        assert same(after, kept)


def test_a_long_step_is_one_of_many_short_ones() -> None:
    layer, x = Layer(Shape(16, 1, 2, 8, 20, 4)), torch.randn(1300, 16)
    whole, kept = run(layer, x, [1300])
    out, after = run(layer, x, [511, 1, 515, 273])
    assert torch.equal(out, whole)
    assert same(after, kept)


@pytest.mark.parametrize("before", [0, 1, 300])
@pytest.mark.parametrize("length", [509, 511, 512, 513, 514, 1025])
def test_tentative_tokens_where_a_long_step_is_cut(length: int, before: int) -> None:
    layer, x = Layer(Shape(16, 1, 2, 8, 20, 4)), torch.randn(1100, 16)
    whole, kept = run(layer, x, [1100])
    caches = start(layer, 1, 2)
    pieces = [(1, x[:before], 0), (2, x[:length], 3)]
    assert torch.equal(step(layer, caches, pieces)[1], whole[:length])
    caches.rollback(2, 1)
    pieces = [(2, x[length - 1 :], 0), (1, x[before:], 0)]
    found = step(layer, caches, pieces)
    assert torch.equal(found[0], whole[length - 1 :])
    assert torch.equal(found[1], whole[before:])
    assert same(known(caches, 1), kept)
    assert same(known(caches, 2), kept)


def test_the_widest_instruction_sets_agree() -> None:
    sets = [name for name in ("avx512", "amx") if name in SETS]
    if len(sets) < 2:
        pytest.skip("needs two instruction sets with vectors of the same width")
    for shape in (*SHAPES, *QUANTISED):
        layer, x, outs = Layer(shape), torch.randn(40, shape.hidden), []
        for name in sets:
            _native.set_instruction_set(name)
            outs.append(run(layer, x, [30, 10])[0])
        assert torch.equal(*outs)


def test_nan_stays_in_its_sequence() -> None:
    layer = Layer(PLAIN)
    xs = [torch.randn(6, PLAIN.hidden) for _ in range(3)]
    alone = [run(layer, x, [6])[0] for x in xs]
    xs[1][2, 5] = float("nan")
    outs = step(layer, start(layer, 0, 1, 2), [(row, x, 0) for row, x in enumerate(xs)])
    assert torch.equal(outs[0], alone[0])
    assert torch.equal(outs[1][:2], alone[1][:2])
    assert outs[1][2:].isnan().all()
    assert torch.equal(outs[2], alone[2])


def test_scratch_memory_of_a_long_step_is_bounded() -> None:
    layer = Layer(Shape(16, 1, 1, 8, 8, 4))
    run(layer, torch.randn(600, 16), [600])
    held = _native.scratch_bytes()
    run(layer, torch.randn(6000, 16), [6000])
    assert _native.scratch_bytes() <= 2 * held


def test_time_is_told_by_phase() -> None:
    layer = Layer(PLAIN)
    _native.set_profiling(True)
    try:
        run(layer, torch.randn(5, PLAIN.hidden), [4, 1])
        phases = {name: calls for name, (_, calls) in _native.profile().items() if name.startswith("gdn.")}
    finally:
        _native.set_profiling(False)
    assert phases == dict.fromkeys(("gdn.in_proj", "gdn.conv", "gdn.delta", "gdn.out_proj"), 2)
