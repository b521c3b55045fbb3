"""Block types: what q8 holds exactly, for every scale that can occur."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from godwit.checkpoint.gguf.types import TYPES, BlockType, as_groups, decode
from godwit.qtensor import pack_groups

EXACT = {"Q8_0": 2, "Q4_0": 2, "Q5_0": 2, "IQ4_NL": 2, "MXFP4": 1}  # bytes of the scale


def kind_of(name: str) -> BlockType:
    return next(kind for kind in TYPES.values() if kind.name == name)


def blocks(kind: BlockType, rows: int = 9, per_row: int = 5) -> Tensor:
    """Random blocks with scales that are zero, negative, tiny, huge or subnormal."""
    raw = torch.randint(256, (rows, per_row, kind.bytes), dtype=torch.uint8)
    if kind.name == "MXFP4":
        raw[..., 0] = torch.randint(104, 144, (rows, per_row))
    else:
        special = [0.0, -0.0, 2.0**-24, -(2.0**-20), 65504.0, -1.0]
        scales = torch.randn(rows, per_row).half()
        scales.view(-1)[: len(special)] = torch.tensor(special).half()
        raw[..., :2] = scales.view(torch.uint8).view(rows, per_row, 2)
    if kind.name == "Q8_0":
        raw[..., 2:][raw[..., 2:] == 128] = 127
    return raw.flatten(1)


@pytest.mark.parametrize("name", EXACT)
def test_groups_are_the_values_of_the_format(name: str) -> None:
    kind = kind_of(name)
    raw = blocks(kind)
    groups = as_groups(raw, kind)
    assert groups is not None
    values = decode(raw, kind)
    assert torch.equal(pack_groups(*groups).dequantize(), values)
    assert groups[1].dtype == torch.float16 and values.shape == (9, 5 * kind.elements)


def test_a_code_that_q8_lacks_is_not_a_group() -> None:
    raw = blocks(kind_of("Q8_0"))
    raw[3, 40] = 128
    assert as_groups(raw, kind_of("Q8_0")) is None


@pytest.mark.parametrize("exponent", [0, 103, 144, 255])
def test_a_scale_beyond_half_precision_is_not_a_group(exponent: int) -> None:
    raw = blocks(kind_of("MXFP4"))
    raw[2, 17] = exponent
    assert as_groups(raw, kind_of("MXFP4")) is None


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00])
def test_infinite_and_nan_scales_are_no_groups(bits: int) -> None:
    raw = blocks(kind_of("Q8_0"))
    raw[1, :2] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
    assert as_groups(raw, kind_of("Q8_0")) is None


def test_other_types_are_no_groups() -> None:
    for name in ("Q4_1", "Q4_K", "Q6_K", "F16"):
        kind = kind_of(name)
        assert as_groups(torch.zeros(2, kind.bytes, dtype=torch.uint8), kind) is None


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "F64", "I8", "I32"])
def test_plain_types_keep_their_bits(name: str) -> None:
    kind = kind_of(name)
    assert kind.dtype is not None
    raw = torch.randint(256, (3, 7 * kind.bytes), dtype=torch.uint8)
    values = decode(raw, kind)
    assert values.dtype == kind.dtype and values.shape == (3, 7)
    assert torch.equal(values.view(torch.uint8), raw)


def test_every_type_has_a_decoder() -> None:
    for kind in TYPES.values():
        raw = torch.zeros(2, 3 * kind.bytes, dtype=torch.uint8)
        assert decode(raw, kind).shape == (2, 3 * kind.elements), kind.name
