"""The native feed-forward part: as near exact arithmetic as proven, the same bits in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from godwit import _native
from godwit.config import MoeSpec
from godwit.models.layers import SparseMoeBlock, SwiGLU
from godwit.qtensor import GROUP, SPAN, QuantExperts, QuantTensor, expert_layout, groups, quantize

EPS = 1e-6
UNIT = 2.0**-24  # relative error of one float32 operation


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before, threads = _native.instruction_set(), _native.num_threads()
    yield
    _native.set_instruction_set(before)
    _native.set_num_threads(threads)


@dataclass(frozen=True)
class Shape:
    """Sizes and switches of a layer; without experts it is a dense one."""

    hidden: int
    num_experts: int = 0
    top_k: int = 0
    intermediate: int = 0
    shared: int = 0
    gate: bool = False
    bias: bool = False
    renormalize: bool = True
    format13: str = "q4"
    format2: str = "q4"


ODD = Shape(48, 5, 2, 40, shared=24, gate=True)
WIDE = Shape(256, 40, 10, 96, shared=64, gate=True)
EXACT = Shape(72, 6, 3, 40, shared=56, gate=True, format13="bf16", format2="bf16")
DENSE = Shape(80, shared=150, bias=True, format2="q8")
SHAPES = (
    ODD,
    WIDE,
    EXACT,
    DENSE,
    Shape(48, 5, 2, 40, renormalize=False, format2="q8"),
    Shape(64, 8, 8, 16, shared=16, format13="q8", format2="bf16"),
    Shape(100, 33, 3, 70, shared=90, gate=True, renormalize=False, format13="bf16"),
    Shape(512, 3, 1, 128, shared=128, gate=True, format2="q8"),
    Shape(16, 1, 1, 8, format13="q8", format2="q8"),
    Shape(64, shared=64, format13="bf16", format2="bf16"),
    Shape(33, shared=7, bias=True),
    Shape(320, 48, 4, 300, shared=270, gate=True),
    Shape(96, 48, 4, 264, format13="q8"),
)


class Layer:
    """Random weights of one layer, for the native kernels and for plain torch."""

    def __init__(self, shape: Shape, router: Tensor | None = None) -> None:
        self.shape = shape
        hidden, width = shape.hidden, shape.shared
        self.norm = torch.rand(hidden) + 0.5
        self.shared: tuple[QuantTensor, QuantTensor] | None = None
        self.biases: tuple[Tensor | None, Tensor | None] = (None, None)
        mlp = None
        if width:
            self.shared = self._mlp(width)
            if shape.bias:
                self.biases = (torch.randn(2 * width) * 0.3, torch.randn(hidden))
            mlp = _native.Mlp(native(self.shared[0]), native(self.shared[1]), *self.biases)
        self.gate = torch.randn(hidden) * hidden**-0.5 if shape.gate else None
        if not shape.num_experts:
            self.native = _native.Ffn(self.norm, EPS, mlp, self.gate)
            return
        chosen = torch.randn(shape.num_experts, hidden) * 2 * hidden**-0.5 if router is None else router
        self.router = quantize(chosen, "bf16")
        self.experts = self._experts()
        self.native = _native.Ffn(
            self.norm,
            EPS,
            mlp,
            self.gate,
            native(self.router),
            self.experts.data,
            self.experts.stride,
            self.experts.offset2,
            shape.format13,
            shape.format2,
            shape.num_experts,
            shape.top_k,
            shape.intermediate,
            shape.renormalize,
        )

    def _mlp(self, width: int) -> tuple[QuantTensor, QuantTensor]:
        hidden = self.shape.hidden
        return (
            quantize(torch.randn(2 * width, hidden) * 2 * hidden**-0.5, self.shape.format13),
            quantize(torch.randn(hidden, width) * width**-0.5, self.shape.format2),
        )

    def _experts(self) -> QuantExperts:
        s = self.shape
        offset2, stride = expert_layout(s.format13, s.format2, s.hidden, s.intermediate)
        data = torch.randint(256, (s.num_experts * stride,), dtype=torch.uint8)  # nobody reads the gaps
        for begin in range(0, data.numel(), stride):
            for at, weight in zip((begin, begin + offset2), self._mlp(s.intermediate), strict=True):
                data[at : at + weight.nbytes] = weight.data
        return QuantExperts(
            s.format13, s.format2, s.num_experts, s.hidden, s.intermediate, stride, offset2, data
        )

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The native result and its router logits."""
        out = x.clone()
        if not self.shape.num_experts:
            _native.ffn(self.native, out)
            return out, torch.empty(x.shape[0], 0)
        logits = torch.full((x.shape[0], self.shape.num_experts), float("nan"))
        _native.ffn(self.native, out, logits)
        return out, logits


def native(weight: QuantTensor) -> _native.Weight:
    return _native.Weight(weight.format, *weight.shape, weight.data)


# ---- Exact arithmetic, and how far float32 may be from it --------------------------------------------


@dataclass(frozen=True)
class Approx:
    """Exact values and a bound on what float32 can make of each."""

    value: Tensor
    error: Tensor

    def rows(self, index: Tensor) -> Approx:
        return Approx(self.value[index], self.error[index])


def quantized(x: Approx, format: str) -> Approx:
    """As int8 in groups of 32, or for q4 in spans of 256.

    An error shifts a code only where the value lies close to a half.
    """
    num_rows, cols = x.value.shape
    size = GROUP if format == "q8" else GROUP * SPAN
    count = -(-cols // size)
    padding, shape = (0, count * size - cols), (num_rows, count, size)
    value, error = (F.pad(t, padding).view(shape) for t in (x.value, x.error))
    top, top_error = value.abs().amax(-1, keepdim=True), error.amax(-1, keepdim=True)
    scale = (top / 127).clamp_min(1e-300)
    exact = value / scale
    codes = exact.round()
    shift = (error + value.abs() * top_error / top.clamp_min(1e-300)) / scale + 127 * 4 * UNIT
    steps = ((exact - codes).abs() + shift + 0.5).floor()
    moved = steps * (scale + top_error / 127) + codes.abs() * (top_error / 127)
    return Approx(*((t.flatten(1)[:, :cols]) for t in (codes * scale, moved)))


def product(x: Approx, weight: QuantTensor, bias: Tensor | None = None) -> Approx:
    """Integers inside a group are exact: float32 rounds once a group and a few times more."""
    cols = x.value.shape[1]
    exact = weight.format == "bf16"
    given, num_roundings = (x, cols // 2 + 4) if exact else (quantized(x, weight.format), groups(cols) + 5)
    w, added = weight.dequantize().double(), torch.zeros(()) if bias is None else bias.double()
    mass = (given.value.abs() + given.error) @ w.abs().T + added.abs()
    return Approx(given.value @ w.T + added, given.error @ w.abs().T + num_roundings * UNIT * mass)


def swiglu(
    x: Approx, w13: QuantTensor, w2: QuantTensor, bias13: Tensor | None, bias2: Tensor | None
) -> Approx:
    both = product(x, w13, bias13)
    (gate, up), (gate_error, up_error) = both.value.chunk(2, -1), both.error.chunk(2, -1)
    value = F.silu(gate) * up
    error = 1.1 * gate_error * (up.abs() + up_error) + F.silu(gate).abs() * up_error
    return product(Approx(value, error + 16 * UNIT * value.abs()), w2, bias2)


def normed(layer: Layer, x: Tensor) -> Approx:
    """The norm's own float32 results: a code near a half could turn on their last bit."""
    found = torch.empty_like(x)
    _native.rms_norm(x, layer.norm, EPS, found)
    exact = F.rms_norm(x.double(), (x.shape[1],), layer.norm.double(), EPS)
    assert ((found - exact).abs() <= (x.shape[1] / 2 + 8) * UNIT * exact.abs()).all()
    return Approx(found.double(), torch.zeros_like(exact))


def choose(layer: Layer, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids of the top k, the lower index first among equals."""
    ranked = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, ids = (t[:, : layer.shape.top_k] for t in ranked)
    return (weights / weights.sum(-1, keepdim=True) if layer.shape.renormalize else weights), ids


def exact_ffn(layer: Layer, x: Tensor, logits: Tensor) -> Approx:
    """What ``layer.run(x)`` approximates, given the logits it found."""
    shape, rows = layer.shape, normed(layer, x)
    total, mass, error = (torch.zeros_like(x, dtype=torch.float64) for _ in range(3))

    def add(index: Tensor, weight: Tensor, weight_error: Tensor, y: Approx) -> None:
        total.index_add_(0, index, weight * y.value)
        mass.index_add_(0, index, weight * y.value.abs())
        error.index_add_(0, index, weight * y.error + weight_error * (y.value.abs() + y.error))

    if shape.num_experts:
        weights, ids = choose(layer, logits)
        for e in range(shape.num_experts):
            tokens, slots = (ids == e).nonzero(as_tuple=True)
            weight = weights[tokens, slots][:, None]
            y = swiglu(rows.rows(tokens), *layer.experts.expert(e), None, None)
            add(tokens, weight, weight * (shape.num_experts + 16) * UNIT, y)
    if layer.shared is not None:
        weight, weight_error = torch.ones(len(x), 1, dtype=torch.float64), torch.zeros(len(x), 1)
        if layer.gate is not None:
            found = product(
                rows, QuantTensor("bf16", (1, shape.hidden), quantize(layer.gate[None], "bf16").data)
            )
            exact = rows.value @ layer.gate.double()[:, None]
            weight, weight_error = exact.sigmoid(), found.error / 4 + 4 * UNIT
        add(torch.arange(len(x)), weight, weight_error, swiglu(rows, *layer.shared, *layer.biases))
    out = x.double() + total
    return Approx(out, error + (shape.top_k + 4) * UNIT * mass + UNIT * out.abs())


def check(layer: Layer, x: Tensor) -> Tensor:
    """Run, and compare with exact arithmetic; returns the native result."""
    out, logits = layer.run(x)
    if layer.shape.num_experts:
        exact = product(normed(layer, x), layer.router)
        assert ((logits - exact.value).abs() <= exact.error).all()
    exact = exact_ffn(layer, x, logits)
    assert ((out - exact.value).abs() <= exact.error).all()
    assert exact.error.median() < 0.02 * (exact.value - x).abs().median()  # the bound means something
    return out


# ---- Tests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction_set", _native.available_instruction_sets())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_instruction_set(shape: Shape, instruction_set: str) -> None:
    layer = Layer(shape)
    _native.set_instruction_set(instruction_set)
    x = 2 * torch.randn(33, shape.hidden)
    out = check(layer, x)
    for num_tokens in (0, 1, 2, 5):
        assert torch.equal(layer.run(x[:num_tokens])[0], out[:num_tokens])


@pytest.mark.parametrize("shape", [ODD, EXACT, replace(WIDE, renormalize=False)], ids=str)
def test_near_the_sparse_block(shape: Shape) -> None:
    layer = Layer(shape)
    spec = MoeSpec(shape.num_experts, shape.top_k, shape.intermediate, shape.shared, shape.renormalize)
    block = SparseMoeBlock(spec, shape.hidden)
    pairs = [layer.experts.expert(e) for e in range(shape.num_experts)]
    assert layer.shared is not None and layer.gate is not None
    weights = {
        "router.weight": layer.router.dequantize(),
        "experts.w13": torch.stack([w13.dequantize() for w13, _ in pairs]),
        "experts.w2": torch.stack([w2.dequantize() for _, w2 in pairs]),
        "shared_expert.w13.weight": layer.shared[0].dequantize(),
        "shared_expert.w2.weight": layer.shared[1].dequantize(),
        "shared_gate.weight": layer.gate[None],
    }
    block.load_state_dict(weights)
    compare_with_module(layer, block)


@pytest.mark.parametrize("shape", [DENSE, replace(DENSE, format13="bf16", format2="bf16")], ids=str)
def test_near_the_dense_mlp(shape: Shape) -> None:
    layer = Layer(shape)
    mlp = SwiGLU(shape.hidden, shape.shared, bias=True)
    assert layer.shared is not None and layer.biases[0] is not None and layer.biases[1] is not None
    w13, w2 = (w.dequantize() for w in layer.shared)
    bias13, bias2 = layer.biases
    mlp.load_state_dict({"w13.weight": w13, "w13.bias": bias13, "w2.weight": w2, "w2.bias": bias2})
    compare_with_module(layer, mlp)


def compare_with_module(layer: Layer, module: torch.nn.Module) -> None:
    """An int8 code is off by 0.3 of its 127th of the largest of 32: half a percent a product, of which
    three follow each other."""
    x = 2 * torch.randn(17, layer.shape.hidden)
    with torch.no_grad():
        expected = module(F.rms_norm(x, (layer.shape.hidden,), layer.norm, EPS))
    difference = layer.run(x)[0] - x - expected
    exact = layer.shape.format13 == layer.shape.format2 == "bf16"
    assert difference.norm() < (1e-5 if exact else 0.02) * expected.norm()


@pytest.mark.parametrize("instruction_set", _native.available_instruction_sets())
@pytest.mark.parametrize("shape", [ODD, WIDE, EXACT, DENSE], ids=str)
def test_the_same_bits_in_every_batch(shape: Shape, instruction_set: str) -> None:
    layer = Layer(shape)
    _native.set_instruction_set(instruction_set)
    x = 2 * torch.randn(33, shape.hidden)
    layer.run(torch.full((70, shape.hidden), float("nan")))  # scratch memory that nobody may rely on
    out, logits = layer.run(x)
    for begin, end in ((0, 1), (7, 8), (32, 33), (3, 9), (10, 30)):
        part, part_logits = layer.run(x[begin:end])
        assert torch.equal(part, out[begin:end])
        assert torch.equal(part_logits, logits[begin:end])
    for num_threads in (1, 2, 3, 7):
        _native.set_num_threads(num_threads)
        assert torch.equal(layer.run(x)[0], out)
        assert torch.equal(layer.run(x[5:6])[0], out[5:6])


def test_the_widest_instruction_sets_agree() -> None:
    sets = [name for name in ("avx512", "amx") if name in _native.available_instruction_sets()]
    if len(sets) < 2:
        pytest.skip("needs two instruction sets with vectors of the same width")
    for shape in SHAPES:
        layer, x = Layer(shape), torch.randn(40, shape.hidden)
        results = []
        for name in sets:
            _native.set_instruction_set(name)
            results.append(layer.run(x)[0])
        assert torch.equal(*results)


def test_more_tokens_than_a_round_takes() -> None:
    layer = Layer(Shape(16, 3, 2, 8, shared=8, gate=True))
    x = torch.randn(4100, 16)
    out, logits = layer.run(x)
    for begin in range(0, 4100, 1025):
        part, part_logits = layer.run(x[begin : begin + 1025])
        assert torch.equal(part, out[begin : begin + 1025])
        assert torch.equal(part_logits, logits[begin : begin + 1025])


@pytest.mark.parametrize("num_tokens", [1, 9, 600])
def test_all_tokens_on_the_same_experts(num_tokens: int) -> None:
    router = torch.zeros(40, 32)
    router[37, 0], router[2, 0] = 3.0, 2.0  # the first input of every token is positive
    layer = Layer(Shape(32, 40, 2, 40), router)
    x = torch.randn(num_tokens, 32)
    x[:, 0] = x[:, 0].abs() + 1
    out = check(layer, x)
    assert torch.equal(layer.run(x[-1:])[0], out[-1:])


def test_equal_logits_go_to_the_lower_index() -> None:
    layer = Layer(Shape(32, 70, 4, 16), torch.zeros(70, 32))
    x = torch.randn(3, 32)
    out = check(layer, x)
    stride = layer.experts.stride
    for e in range(70):
        layer.experts.data[e * stride : (e + 1) * stride].bitwise_not_()
        assert torch.equal(layer.run(x)[0], out) == (e >= 4)
        layer.experts.data[e * stride : (e + 1) * stride].bitwise_not_()


def test_a_token_of_nan_harms_no_other() -> None:
    layer = Layer(WIDE)
    x = torch.randn(9, WIDE.hidden)
    out = layer.run(x)[0]
    x[4, 3] = float("nan")
    harmed = layer.run(x)[0]
    assert harmed[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(harmed[others], out[others])


@pytest.mark.parametrize("shape", [ODD, WIDE, EXACT], ids=str)
def test_experts_may_lie_anywhere(shape: Shape) -> None:
    layer, x = Layer(shape), torch.randn(9, shape.hidden)
    expected = layer.run(x)
    stride = layer.experts.stride
    for e in reversed(range(shape.num_experts)):
        moved = layer.experts.data[e * stride : (e + 1) * stride].clone()
        layer.native.place_expert(e, moved)  # the layer alone keeps it alive
    layer.experts.data.zero_()  # whatever still read from here would differ
    for result, wanted in zip(layer.run(x), expected, strict=True):
        assert torch.equal(result, wanted)
