"""Products of packed weights: near exact arithmetic, and the same bits however they are computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from godwit import _native
from godwit.qtensor import FORMATS, GROUP, SPAN, TILE_ROWS, QuantTensor, groups, pack, quantize, spans

SETS = _native.available_instruction_sets()
UNIT = 2.0**-24  # relative error of one float32 operation
# One column, groups, pairs and spans that are not full, several pieces of 32; tiles that are not full.
SHAPES = (
    (1, 1),
    (15, 31),
    (16, 32),
    (17, 33),
    (50, 64),
    (16, 65),
    (33, 100),
    (5, 320),
    (70, 512),
    (40, 1088),
    (19, 2112),
)
COUNTS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before, threads = _native.instruction_set(), _native.num_threads()
    yield
    _native.set_instruction_set(before)
    _native.set_num_threads(threads)


def random_weight(fmt: str, rows: int, cols: int) -> QuantTensor:
    """Codes and steps over their whole range, scales of both signs; padding is zero, as it must be."""
    if fmt == "bf16":
        return quantize(torch.randn(rows, cols), fmt)
    size, padded = groups(cols), -(-rows // TILE_ROWS) * TILE_ROWS
    low, zero, high = (0, 8, 16) if fmt == "q4" else (1, 128, 256)
    codes = torch.full((padded, size * GROUP), zero, dtype=torch.uint8)
    codes[:rows, :cols] = torch.randint(low, high, (rows, cols), dtype=torch.uint8)
    codes, used = codes.view(padded, size, GROUP), -(-cols // GROUP)
    if fmt == "q8":
        scales = torch.zeros(padded, size)
        scales[:rows, :used] = torch.randn(rows, used) * 0.1
        return pack(codes, scales.half(), fmt, (rows, cols))
    scales = torch.zeros(padded, spans(cols))
    scales[:rows] = torch.randn(rows, spans(cols)) * 0.01
    zeros = torch.randint(0, 16, (rows, used))
    sizes = (torch.rand(rows, used) * (127 // torch.maximum(zeros, 15 - zeros) + 1)).long().clamp(max=15)
    steps = torch.full((padded, size), 0x80, dtype=torch.uint8)
    steps[:rows, :used] = (sizes + 16 * zeros).to(torch.uint8)
    filler = zeros.to(torch.uint8).repeat_interleave(GROUP, 1)[:, cols:]
    codes.view(padded, -1)[:rows, cols : cols + filler.shape[1]] = filler
    return pack(codes, scales.half(), fmt, (rows, cols), steps)


def native(w: QuantTensor) -> _native.Weight:
    return _native.Weight(w.format, *w.shape, w.data)


def linear(x: Tensor, w: QuantTensor, bias: Tensor | None = None) -> Tensor:
    out = torch.full((x.shape[0], w.shape[0]), torch.nan)
    _native.linear(x, native(w), bias, out)
    return out


def rounded(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Activations as the integer products see them, and half a step of each."""
    m, cols = x.shape
    size = GROUP if fmt == "q8" else GROUP * SPAN
    full = torch.zeros(m, -(-cols // size) * size)
    full[:, :cols] = x
    grouped = full.view(m, -1, size)
    top = grouped.abs().amax(2, keepdim=True)
    q = (grouped * torch.where(top > 0, 127 / top, 0.0)).round()
    step = (top / 127).double()
    return (q.double() * step).flatten(1)[:, :cols], (step / 2).expand_as(grouped).flatten(1)[:, :cols]


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_near_exact(fmt: str, rows: int, cols: int, instruction_set: str) -> None:
    """Besides the rounding of activations there are only the errors of n additions, 1 / 2^24 each."""
    _native.set_instruction_set(instruction_set)
    w, x, bias = random_weight(fmt, rows, cols), torch.randn(9, cols), torch.randn(rows)
    exact = w.dequantize().double().T
    seen, half = (x.double(), torch.zeros(9, cols)) if fmt == "bf16" else rounded(x, fmt)
    terms = groups(cols) * (GROUP // 2 if fmt == "bf16" else 1) + 5
    sizes = seen.abs() @ exact.abs() + bias.abs()
    out = linear(x, w, bias).double()
    assert bool(((out - seen @ exact - bias).abs() <= terms * UNIT * sizes).all())
    bound = half.double() @ exact.abs() * (1 + 2.0**-10) + 2 * terms * UNIT * sizes
    assert bool(((out - x.double() @ exact - bias).abs() <= bound).all())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_the_same_bits_everywhere(fmt: str, rows: int, cols: int) -> None:
    """Whatever the instruction set and however many rows are computed together."""
    w, x, bias = random_weight(fmt, rows, cols), torch.randn(100, cols), torch.randn(rows)
    x[3, : cols // 2] = 0
    _native.set_instruction_set("scalar")
    expected = linear(x, w, bias)
    for instruction_set in SETS:
        _native.set_instruction_set(instruction_set)
        for m in COUNTS:
            assert torch.equal(linear(x[:m], w, bias), expected[:m]), (instruction_set, m)
        assert torch.equal(linear(x[50:51], w, bias), expected[50:51]), instruction_set


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_same_bits_for_more_rows_than_are_summed_at_a_time(fmt: str) -> None:
    w, x = random_weight(fmt, 40, 64), torch.randn(530, 64)
    _native.set_instruction_set("scalar")
    expected = linear(x, w)
    for instruction_set in SETS:
        _native.set_instruction_set(instruction_set)
        for m in (255, 256, 257, 271, 272, 273, 511, 512, 513, 530):
            assert torch.equal(linear(x[:m], w), expected[:m]), (instruction_set, m)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_same_bits_with_every_number_of_threads(fmt: str, instruction_set: str) -> None:
    """Also where the rows are too many for a cache and come in blocks."""
    _native.set_instruction_set(instruction_set)
    w, x = random_weight(fmt, 90, 4160), torch.randn(150, 4160)
    _native.set_num_threads(1)
    expected = linear(x, w)
    assert torch.isfinite(expected).all()
    assert torch.equal(linear(x[140:145], w), expected[140:145])
    for count in (2, 3):
        _native.set_num_threads(count)
        assert torch.equal(linear(x, w), expected)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("fmt", ["q4", "q8"])
@pytest.mark.parametrize("m", [1, 3, 20])
def test_no_sum_of_integers_overflows(fmt: str, instruction_set: str, m: int) -> None:
    """The greatest codes times the greatest activations, which keep to powers of two and so are exact."""
    _native.set_instruction_set(instruction_set)
    ends = torch.tensor([0, 15] if fmt == "q4" else [1, 255], dtype=torch.uint8)
    cols = 8 * GROUP
    for pattern in (ends[:1], ends[1:], ends, ends.flip(0)):
        codes = pattern.repeat(TILE_ROWS * cols // len(pattern)).view(TILE_ROWS, 8, GROUP)
        # The greatest sizes beside the zeros in the middle and at both ends; q8 has none.
        for step in (15 + 16 * 8, 15 + 16 * 7, 8 + 16 * 15, 8) if fmt == "q4" else (None,):
            steps = None if step is None else torch.full((TILE_ROWS, 8), step, dtype=torch.uint8)
            scales = torch.ones(TILE_ROWS, 8 if step is None else 1).half()
            w = pack(codes, scales, fmt, (TILE_ROWS, cols), steps)
            for signs in ([1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]):
                x = (torch.tensor(signs).repeat(cols // 2) * 127.0).expand(m, -1).contiguous()
                assert torch.equal(linear(x, w), x @ w.dequantize().T)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(fmt: str, instruction_set: str, m: int, bad: float) -> None:
    _native.set_instruction_set(instruction_set)
    w, x = random_weight(fmt, 20, 100), torch.randn(m, 100)
    good = linear(x, w)
    x[m // 2, 70] = bad
    out = linear(x, w)
    assert not torch.isfinite(out[m // 2]).any()
    assert fmt == "bf16" or out[m // 2].isnan().all()
    others = torch.arange(m) != m // 2
    assert torch.equal(out[others], good[others])


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 2.0**-126, 1e-36, 1e-30])
def test_the_smallest_activations(fmt: str, instruction_set: str, size: float) -> None:
    """Where 127 / max |x| is no number a group may count as zero; nothing but that may happen."""
    _native.set_instruction_set(instruction_set)
    w, x = random_weight(fmt, 20, 64), torch.rand(3, 64) * size
    out, exact = linear(x, w).double(), w.dequantize().double().T
    half = x.amax(1, keepdim=True).double() / 254 if size > 2.0**-119 else 2.0**-120
    slack = 0.0 if fmt == "bf16" else half * 1.001 * exact.abs().sum(0)
    assert bool(
        ((out - x.double() @ exact).abs() <= slack + 70 * UNIT * (x.double() @ exact.abs()) + 1e-43).all()
    )


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_embed(fmt: str, rows: int, cols: int, instruction_set: str) -> None:
    _native.set_instruction_set(instruction_set)
    w, ids = random_weight(fmt, rows, cols), torch.randint(0, rows, (37,))
    out = torch.full((37, cols), torch.nan)
    _native.embed(native(w), ids, out)
    assert torch.equal(out, w.dequantize()[ids])


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("n", [1, 7, 16, 33, 1000])
def test_rms_norm(n: int, instruction_set: str) -> None:
    """n squares are added with an error of 1 / 2^24 each at most, half of which the root leaves."""
    _native.set_instruction_set(instruction_set)
    x, factor, out = torch.randn(50, n), torch.randn(n), torch.full((50, n), torch.nan)
    _native.rms_norm(x, factor, 1e-6, out)
    exact = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() * factor
    torch.testing.assert_close(out.double(), exact, rtol=(n / 2 + 6) * UNIT, atol=0)
    one = x[20:21].clone()
    _native.rms_norm(one, factor, 1e-6, one)
    assert torch.equal(one, out[20:21])


def best(values: Tensor, k: int) -> tuple[list[float], list[int]]:
    top, ids = values.sort(descending=True, stable=True)
    return top[:k].tolist(), ids[:k].tolist()


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000, 30011])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "rising", "falling"])
def test_top_k(kind: str, n: int, instruction_set: str) -> None:
    """The largest first, and among equals the lower index."""
    _native.set_instruction_set(instruction_set)
    values = {
        "distinct": torch.randn(n),
        "ties": torch.randint(-3, 4, (n,)).float(),
        "equal": torch.full((n,), -2.5),
        "rising": torch.arange(n).float(),
        "falling": -torch.arange(n).float(),
    }[kind]
    for k in {0, 1, min(n, 7), min(n, 300)}:
        assert _native.top_k(values, k) == best(values, k)


@pytest.mark.parametrize("instruction_set", SETS)
def test_top_k_of_nan_and_infinity(instruction_set: str) -> None:
    """NaN counts as minus infinity, wherever it stands."""
    _native.set_instruction_set(instruction_set)
    values = torch.randn(500)
    values[::3] = torch.nan
    values[100], values[200] = torch.inf, -torch.inf
    assert _native.top_k(values, 60) == best(values.nan_to_num(nan=-torch.inf, posinf=torch.inf), 60)
    assert _native.top_k(values, 1) == ([torch.inf], [100])
