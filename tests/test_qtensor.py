"""Layouts against loops written from the format's text, and what quantising costs."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from godwit import qtensor
from godwit.errors import UsageError
from godwit.kernels import packing
from godwit.qtensor import (
    GROUP,
    QuantExperts,
    QuantTensor,
    expert_layout,
    expert_stride,
    join_expert,
    pack_groups,
    quantize,
    weight_bytes,
)

SHAPES = [(1, 1), (16, 32), (17, 33), (16, 64), (31, 100), (48, 130), (5, 257), (3, 600)]


def size_of_tile(format: str, cols: int) -> int:
    num_groups = (cols + 63) // 64 * 2
    if format == "q4":
        return (num_groups * (256 + 16) + (num_groups + 7) // 8 * 32 + 63) // 64 * 64
    return num_groups * (512 + 32 if format == "q8" else 1024)


def looped_bytes(weight: QuantTensor) -> list[list[float]]:
    """Every weight, one at a time, from the bytes: tile, group, byte, as the layout is written down."""
    rows, cols = weight.shape
    data = bytes(weight.data.tolist())
    num_groups = (cols + 63) // 64 * 2
    tile_bytes = size_of_tile(weight.format, cols)
    return [[_one(data[r // 16 * tile_bytes :], weight.format, num_groups, r % 16, c) for c in range(cols)]
            for r in range(rows)]  # fmt: skip


def _one(tile: bytes, format: str, num_groups: int, r: int, col: int) -> float:
    group, c = divmod(col, 32)
    if format == "bf16":
        at = group * 1024 + 2 * (32 * (c // 2) + 2 * r + c % 2)
        return float(struct.unpack("<f", b"\0\0" + tile[at : at + 2])[0])
    if format == "q8":
        at = num_groups * 512 + group * 32 + 2 * r
        (scale,) = struct.unpack("<e", tile[at : at + 2])
        return float((tile[group * 512 + 64 * (c // 4) + 4 * r + c % 4] - 128) * scale)
    zero, size = divmod(tile[num_groups * 256 + group * 16 + r], 16)
    at = num_groups * (256 + 16) + group // 8 * 32 + 2 * r
    (scale,) = struct.unpack("<e", tile[at : at + 2])
    byte = tile[group * 256 + 64 * (c % 16 // 4) + 4 * r + c % 4]
    return float(((byte & 15 if c < 16 else byte >> 4) - zero) * size * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", ["q4", "q8", "bf16"])
def test_the_layout_is_the_one_written_down(format: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    packed = quantize(weight, format)
    assert packed.nbytes == weight_bytes(format, *shape)
    assert packed.nbytes == (shape[0] + 15) // 16 * size_of_tile(format, shape[1])
    looped = torch.tensor(looped_bytes(packed))
    assert torch.equal(packed.dequantize(), looped)
    bound = {"q4": 0.3, "q8": 0.02, "bf16": 0.02}[format] * weight.abs().max()
    assert bool(((looped - weight).abs() <= bound).all())


@pytest.mark.parametrize("format", ["q4", "q8"])
def test_codes_and_scales_come_back(format: str) -> None:
    low, high = (0, 15) if format == "q4" else (1, 255)
    codes = torch.randint(low, high + 1, (32, 10, 32), dtype=torch.uint8)
    scales = torch.randn(32, 2 if format == "q4" else 10).half()
    steps = torch.randint(256, (32, 10), dtype=torch.uint8) if format == "q4" else None
    found = qtensor.unpack(qtensor.pack(codes, scales, format, (20, 290), steps))
    assert torch.equal(found[0].reshape(codes.shape), codes)
    assert torch.equal(found[1].reshape(scales.shape), scales)
    assert (found[2] is None) == (steps is None)
    if found[2] is not None and steps is not None:
        assert torch.equal(found[2].reshape(32, 10), steps)


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
    assert squared(weight, "q4").sum() < 0.88 * plain
    assert squared(weight, "q8").sum() < 0.0042 * plain


def test_the_search_is_near_the_best_of_a_fine_grid() -> None:
    """Although a group alone could have any width, and here shares the scale of its span."""
    x = torch.randn(50, 8, 32)
    best = torch.full((50, 8), torch.inf)
    for zero in range(16):
        for step in range(200):
            width = ((x.amax(2) - x.amin(2)) / 15 * (0.6 + step / 200))[:, :, None]
            codes = (x / width + zero).round().clamp(0, 15)
            best = torch.minimum(best, ((codes - zero) * width - x).square().sum(2))
    found = (quantize(x.flatten(1), "q4").dequantize() - x.flatten(1)).square().sum()
    assert best.sum() <= found < 1.07 * best.sum()


def test_every_weight_but_for_its_scale_fits_in_a_signed_byte() -> None:
    """What the tile unit multiplies; extremes of every kind make all zeros and sizes appear."""
    weight = torch.cat((torch.randn(256, 512), torch.randn(256, 512).exp() * torch.randn(256, 1)))
    _, _, steps = qtensor.unpack(quantize(weight, "q4"))
    assert steps is not None
    size, zero = (steps & 15).int(), (steps >> 4).int()
    assert bool((size * torch.maximum(zero, 15 - zero) <= 127).all())
    assert int(size.max()) == 15 and {4, 7, 8, 11} <= set(zero.flatten().tolist())


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
def test_a_group_of_zeros_has_no_size_and_the_code_of_zero(format: str) -> None:
    weight = torch.randn(16, 64)
    weight[:, :32] = 0
    codes, scales, steps = qtensor.unpack(quantize(weight, format))
    assert bool((codes[:, :, 0] == (8 if format == "q4" else 128)).all())
    if steps is not None:
        assert bool((steps[:, :, 0] == 0x80).all()) and bool((steps[:, :, 1] & 15 != 0).all())
    else:
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
    codes, _, _ = qtensor.unpack(quantize(torch.randn(64, 256) ** 3, "q8"))
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
    weight, importance = torch.randn(70, 330, dtype=torch.bfloat16), torch.rand(330)
    whole = quantize(weight, format, importance).data
    monkeypatch.setattr(packing, "_BLOCK", 1)
    assert torch.equal(packing.quantize(weight, format, importance).data, whole)


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


@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (37, 96), (33, 1056)])
def test_whole_groups_are_packed_without_rounding(shape: tuple[int, int]) -> None:
    rows, cols = shape
    codes = torch.randint(-127, 128, (rows, cols), dtype=torch.int8)
    codes[:, :32] //= 9  # a scale that no rounding would choose
    scales = torch.randn(rows, cols // GROUP).half()
    scales[0, 0] = 2.0**-24  # the smallest there is
    wanted = (codes.view(rows, -1, GROUP).float() * scales.float()[:, :, None]).view(rows, cols)
    assert torch.equal(pack_groups(codes, scales).dequantize(), wanted)
