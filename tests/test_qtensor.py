"""Layouts against loops written from the format's text, and what quantising costs."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from godwit import qtensor
from godwit.errors import UsageError
from godwit.qtensor import (
    QuantExperts,
    QuantTensor,
    expert_layout,
    expert_stride,
    join_expert,
    quantize,
    weight_bytes,
)

SHAPES = [(1, 1), (16, 32), (17, 33), (16, 64), (31, 100), (48, 130), (5, 257)]
TILE = {"q4": 256 + 32, "q8": 512 + 32, "bf16": 1024}


def looped_bytes(weight: QuantTensor) -> list[list[float]]:
    """Every weight, one at a time, from the bytes: tile, group, byte, as the layout is written down."""
    rows, cols = weight.shape
    data = bytes(weight.data.tolist())
    num_groups = (cols + 63) // 64 * 2
    tile_bytes = num_groups * TILE[weight.format]
    return [[_one(data[r // 16 * tile_bytes :], weight.format, num_groups, r % 16, c) for c in range(cols)]
            for r in range(rows)]  # fmt: skip


def _one(tile: bytes, format: str, num_groups: int, r: int, col: int) -> float:
    group, c = divmod(col, 32)
    if format == "bf16":
        at = group * 1024 + 2 * (32 * (c // 2) + 2 * r + c % 2)
        return float(struct.unpack("<f", b"\0\0" + tile[at : at + 2])[0])
    code_bytes = 256 if format == "q4" else 512
    at = num_groups * code_bytes + group * 32 + 2 * r
    (scale,) = struct.unpack("<e", tile[at : at + 2])
    if format == "q8":
        return float((tile[group * 512 + 64 * (c // 4) + 4 * r + c % 4] - 128) * scale)
    byte = tile[group * 256 + 64 * (c % 16 // 4) + 4 * r + c % 4]
    return float(((byte & 15 if c < 16 else byte >> 4) - 8) * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", ["q4", "q8", "bf16"])
def test_the_layout_is_the_one_written_down(format: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    packed = quantize(weight, format)
    assert packed.nbytes == weight_bytes(format, *shape)
    assert packed.nbytes == (shape[0] + 15) // 16 * ((shape[1] + 63) // 64 * 2) * TILE[format]
    looped = torch.tensor(looped_bytes(packed))
    assert torch.equal(packed.dequantize(), looped)
    bound = {"q4": 0.3, "q8": 0.02, "bf16": 0.02}[format] * weight.abs().max()
    assert bool(((looped - weight).abs() <= bound).all())


@pytest.mark.parametrize("format", ["q4", "q8"])
def test_codes_and_scales_come_back(format: str) -> None:
    low, high = (0, 15) if format == "q4" else (1, 255)
    codes = torch.randint(low, high + 1, (32, 4, 32), dtype=torch.uint8)
    scales = torch.randn(32, 4).half()
    packed = qtensor.pack(codes, scales, format, (20, 100))
    found_codes, found_scales = qtensor.unpack(packed)
    assert torch.equal(found_codes.reshape(codes.shape), codes)
    assert torch.equal(found_scales.reshape(scales.shape), scales)


def test_bf16_only_rounds() -> None:
    weight = torch.randn(33, 70)
    assert torch.equal(quantize(weight, "bf16").dequantize(), weight.bfloat16().float())


def test_missing_rows_and_columns_are_zero() -> None:
    padding = quantize(torch.randn(1, 1), "q4")
    whole = QuantTensor("q4", (16, 64), padding.data).dequantize()
    assert whole[0, 0] != 0 and int((whole != 0).sum()) == 1


def squared(weight: Tensor, format: str, importance: Tensor | None = None) -> Tensor:
    """Squared errors of each column."""
    return (quantize(weight, format, importance).dequantize() - weight).square().sum(0)


def test_scales_are_better_than_the_extreme_weight_alone() -> None:
    weight = torch.randn(64, 512)
    grouped = weight.view(64, -1, 32)
    extreme = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    scale = (extreme / -8).half().float()
    plain = ((grouped / scale).round().clamp(-8, 7) * scale - grouped).square().sum()
    assert squared(weight, "q4").sum() < 0.91 * plain
    assert squared(weight, "q8").sum() < 0.0042 * plain


def test_the_search_is_near_the_best_of_a_fine_grid() -> None:
    x = torch.randn(200, 32)
    best = torch.full((200,), torch.inf)
    for step in range(400):
        scale = x.abs().amax(1) / 8 * (0.6 + step / 400)
        for sign in (1, -1):
            d = (sign * scale).half().float()[:, None]
            best = torch.minimum(best, ((x / d).round().clamp(-8, 7) * d - x).square().sum(1))
    found = (quantize(x, "q4").dequantize() - x).square().sum()
    assert best.sum() <= found < 1.02 * best.sum()


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    weight = torch.randn(128, 256)
    importance = torch.rand(256) ** 4
    uniform, aware = squared(weight, "q4"), squared(weight, "q4", importance)
    assert (aware * importance).sum() < 0.93 * (uniform * importance).sum()
    assert aware.sum() > uniform.sum()


def test_importance_that_says_nothing_changes_nothing() -> None:
    weight = torch.randn(32, 96)
    plain = quantize(weight, "q4").data
    assert torch.equal(quantize(weight, "q4", torch.full((96,), 7.0)).data, plain)
    assert torch.equal(quantize(weight, "q4", torch.zeros(96)).data, plain)


@pytest.mark.parametrize("format", ["q4", "q8"])
def test_a_group_of_zeros_has_scale_0_and_the_code_of_zero(format: str) -> None:
    weight = torch.randn(16, 64)
    weight[:, :32] = 0
    codes, scales = qtensor.unpack(quantize(weight, format))
    assert bool((codes[:, :, 0] == (8 if format == "q4" else 128)).all())
    assert bool((scales[:, :, 0] == 0).all()) and bool((scales[:, :, 1] != 0).all())


@pytest.mark.parametrize("format", ["q4", "q8"])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-8, 1e-6, 65504.0])
def test_sizes_at_the_ends_of_half_precision(format: str, size: float) -> None:
    weight = torch.randn(16, 64).clamp(-3, 3) * size
    restored = quantize(weight, format).dequantize()
    assert bool(torch.isfinite(restored).all())
    least = 2.0**-25 * (8 if format == "q4" else 128)  # half the smallest scale times the greatest code
    assert bool(((restored - weight).abs() <= 0.13 * weight.abs().max() + least).all())


def test_codes_of_8_bits_never_use_0() -> None:
    codes, _ = qtensor.unpack(quantize(torch.randn(64, 256) ** 3, "q8"))
    assert int(codes.min()) >= 1 and int(codes.max()) == 255


@pytest.mark.parametrize("format", ["q4", "q8", "bf16"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_what_has_no_code_is_refused(format: str, bad: float) -> None:
    weight = torch.zeros(20, 40)
    weight[17, 39] = bad
    with pytest.raises(UsageError, match="finite"):
        quantize(weight, format)


@pytest.mark.parametrize(
    ("weight", "format", "importance"),
    [
        (torch.zeros(4), "q4", None),
        (torch.zeros(4, 4, dtype=torch.int8), "q4", None),
        (torch.zeros(0, 4), "q4", None),
        (torch.zeros(4, 4), "q5", None),
        (torch.zeros(4, 4), "q4", torch.ones(5)),
        (torch.zeros(4, 4), "q4", torch.tensor([1.0, -1.0, 1.0, 1.0])),
        (torch.zeros(4, 4), "q4", torch.tensor([1.0, torch.nan, 1.0, 1.0])),
    ],
)
def test_bad_arguments(weight: Tensor, format: str, importance: Tensor | None) -> None:
    with pytest.raises(UsageError):
        quantize(weight, format, importance)


@pytest.mark.parametrize("format", ["q4", "q8", "bf16"])
def test_the_result_does_not_depend_on_the_blocks(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = torch.randn(70, 130, dtype=torch.bfloat16), torch.rand(130)
    whole = quantize(weight, format, importance).data
    monkeypatch.setattr(qtensor, "_BLOCK", 1)
    assert torch.equal(quantize(weight, format, importance).data, whole)


@pytest.mark.parametrize("formats", [("q4", "q4"), ("q4", "q8"), ("bf16", "q4")], ids=str)
def test_experts_lie_at_their_offsets(formats: tuple[str, str]) -> None:
    hidden, width, count = 96, 40, 3
    offset2, stride = expert_layout(*formats, hidden, width)
    assert stride == expert_stride(*formats, hidden, width)
    assert offset2 % 64 == 0 and stride % 4096 == 0
    assert 0 <= offset2 - weight_bytes(formats[0], 2 * width, hidden) < 64
    assert 0 <= stride - offset2 - weight_bytes(formats[1], hidden, width) < 4096
    pairs = [(quantize(torch.randn(2 * width, hidden), formats[0]),
              quantize(torch.randn(hidden, width), formats[1])) for _ in range(count)]  # fmt: skip
    data = torch.cat([join_expert(*pair) for pair in pairs])
    for index, (w13, w2) in enumerate(pairs):
        one = data[index * stride : (index + 1) * stride]
        assert torch.equal(one[: w13.nbytes], w13.data)
        assert torch.equal(one[offset2 : offset2 + w2.nbytes], w2.data)
        assert not one[w13.nbytes : offset2].any() and not one[offset2 + w2.nbytes :].any()
    with pytest.raises(UsageError):
        join_expert(pairs[0][1], pairs[0][0])
    experts = QuantExperts(*formats, count, hidden, width, stride, offset2, data)
    assert experts.nbytes == count * stride
    for index, pair in enumerate(pairs):
        for found, made in zip(experts.expert(index), pair, strict=True):
            assert found.shape == made.shape and torch.equal(found.dequantize(), made.dequantize())


def test_bytes_that_do_not_fit_are_refused() -> None:
    good = quantize(torch.ones(16, 32), "q4").data
    for data in (good[:-1], good.view(torch.int8), good.view(2, -1), good.repeat(2)[::2]):
        with pytest.raises(UsageError):
            QuantTensor("q4", (16, 32), data)
    offset2, stride = expert_layout("q4", "q4", 32, 16)
    data = torch.zeros(2 * stride, dtype=torch.uint8)
    for change in ((stride + 4096, offset2, data), (stride, offset2 + 64, data), (stride, offset2, data[1:])):
        with pytest.raises(UsageError):
            QuantExperts("q4", "q4", 2, 32, 16, *change)
