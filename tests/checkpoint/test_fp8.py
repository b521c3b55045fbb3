"""Block-wise FP8 against plain loops over the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from godwit.checkpoint import SafetensorsCheckpoint, dequantize_fp8, open_checkpoint, quantize_fp8
from godwit.checkpoint.fp8 import fp8_block_size, fp8_scale_shape
from godwit.errors import CheckpointError, UnsupportedModelError

MakeModel = Callable[..., Path]
FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}


def e4m3(code: int) -> float:
    """The value of a code, from the definition of the format."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_all_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    q = codes.view(torch.float8_e4m3fn).reshape(2, 128)
    got = dequantize_fp8(q, torch.ones(1, 1)).flatten().float()
    expected = torch.tensor([e4m3(code) for code in range(256)])
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((128, 128), (128, 128)),
        ((1, 1), (128, 128)),
        ((129, 127), (128, 128)),
        ((300, 260), (128, 128)),
        ((5, 7), (2, 3)),
        ((4, 6), (1, 6)),
        ((3, 5), (2**20, 2**20)),
        ((3, 130, 257), (128, 128)),
        ((2, 2, 5, 4), (3, 3)),
    ],
)
def test_dequantize_equals_the_definition(
    shape: tuple[int, ...], block: tuple[int, int], scale_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    q = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(fp8_scale_shape(shape, block)).to(scale_dtype)
    rows, columns = torch.arange(shape[-2]) // block[0], torch.arange(shape[-1]) // block[1]
    expected = (q.float() * scale.float()[..., rows, :][..., columns]).to(torch.bfloat16)
    got = dequantize_fp8(q, scale, block)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    target = torch.full(shape, torch.nan)
    dequantize_fp8(q, scale, block, out=target)
    assert torch.equal(target, expected.float())


def test_long_rows_are_converted_in_pieces() -> None:
    q = torch.ones(130, 2**15).to(torch.float8_e4m3fn)
    scale = torch.arange(512.0).reshape(2, 256)
    got = dequantize_fp8(q, scale)
    assert torch.equal(got[0], scale[0].bfloat16().repeat_interleave(128))
    assert torch.equal(got[-1], scale[1].bfloat16().repeat_interleave(128))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 4)])
def test_empty_weights(shape: tuple[int, ...]) -> None:
    q, scale = quantize_fp8(torch.zeros(shape))
    assert dequantize_fp8(q, scale).shape == shape


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 1), (2, 129, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_within_the_formats_error(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = (torch.randn(shape) * torch.logspace(-4, 2, shape[-1])).to(dtype)
    q, scale = quantize_fp8(weight)
    assert scale.shape == fp8_scale_shape(shape)
    assert scale.dtype == torch.float32
    got, exact = dequantize_fp8(q, scale).float(), weight.float()
    step = scale.repeat_interleave(128, -2)[..., : shape[-2], :].repeat_interleave(128, -1)[..., : shape[-1]]
    # Half a unit of 3 mantissa bits, half the subnormal step, and the bfloat16 rounding of the result.
    bound = exact.abs() * 2**-4 + step * 2**-10 + got.abs() * 2**-8
    assert bool(((got - exact).abs() <= bound).all())
    # What is on the grid already stays there.
    again, same_scale = quantize_fp8(dequantize_fp8(q, scale))
    assert torch.allclose(same_scale, scale, rtol=2**-7)
    assert torch.allclose(
        dequantize_fp8(again, same_scale).float(), got, rtol=2**-3, atol=float(scale.max()) * 2**-8
    )


def test_scales_follow_the_definition() -> None:
    weight = torch.zeros(130, 256)
    weight[3, 4], weight[129, 255] = -7.0, 1e-30
    q, scale = quantize_fp8(weight)
    assert scale.tolist() == [[7 / 448, 1.0], [1.0, pytest.approx(1e-30 / 448)]]
    assert q[3, 4].item() == -448
    assert q[129, 255].item() == 448


def test_tiny_values_do_not_divide_by_zero() -> None:
    weight = torch.full((2, 2), 1e-45)
    q, scale = quantize_fp8(weight)
    assert bool(torch.isfinite(q.float()).all())
    assert bool((scale > 0).all())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_quantize_refuses_what_it_cannot_store(bad: float) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_fp8(torch.tensor([[1.0, bad]]))
    with pytest.raises(CheckpointError, match="only matrices"):
        quantize_fp8(torch.ones(4))


def test_dequantize_refuses_wrong_scales() -> None:
    q = torch.ones(130, 4).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="do not fit blocks of 128 x 128"):
        dequantize_fp8(q, torch.ones(1, 1))
    with pytest.raises(CheckpointError, match="not finite"):
        dequantize_fp8(q, torch.tensor([[1.0], [torch.inf]]))
    with pytest.raises(CheckpointError, match="do not fit"):
        dequantize_fp8(q[0], torch.ones(1))


# --- checkpoints -------------------------------------------------------------------------------------------


def test_checkpoint_folds_scales_into_weights(make_model: MakeModel) -> None:
    torch.manual_seed(2)
    plain, fused = torch.randn(130, 70), torch.randn(3, 40, 20)
    q, scale = quantize_fp8(plain)
    q3, scale3 = quantize_fp8(fused)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": q,
        "model.layers.0.mlp.up_proj.weight_scale_inv": scale.bfloat16(),
        "model.layers.0.mlp.experts.down_proj": q3,
        "model.layers.0.mlp.experts.down_proj_scale_inv": scale3,
        "model.norm.weight": torch.ones(70).bfloat16(),
    }
    checkpoint = SafetensorsCheckpoint(
        make_model({"model.safetensors": tensors}, {"quantization_config": FP8})
    )
    assert sorted(checkpoint.names()) == sorted(name for name in tensors if not name.endswith("scale_inv"))
    assert "model.layers.0.mlp.up_proj.weight_scale_inv" not in checkpoint
    assert checkpoint.num_parameters == 130 * 70 + 3 * 40 * 20 + 70
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    info = checkpoint.info("model.layers.0.mlp.up_proj.weight")
    assert (info.shape, info.dtype, info.stored, info.nbytes) == ((130, 70), torch.bfloat16, "F8_E4M3", 9104)
    expected = dequantize_fp8(q, scale.bfloat16())
    assert torch.equal(checkpoint.tensor("model.layers.0.mlp.up_proj.weight"), expected)
    assert torch.equal(checkpoint.tensor("model.layers.0.mlp.experts.down_proj"), dequantize_fp8(q3, scale3))
    target = torch.full((130, 70), torch.nan)
    checkpoint.read_into("model.layers.0.mlp.up_proj.weight", target)
    assert torch.equal(target, expected.float())


def test_checkpoint_with_other_blocks(make_model: MakeModel) -> None:
    weight = torch.randn(100, 90)
    q, scale = quantize_fp8(weight, (64, 32))
    config = {"text_config": {"quantization_config": FP8 | {"weight_block_size": [64, 32]}}}
    directory = make_model({"model.safetensors": {"x.weight": q, "x.weight_scale_inv": scale}}, config)
    assert torch.equal(open_checkpoint(directory).tensor("x.weight"), dequantize_fp8(q, scale, (64, 32)))


Q = torch.ones(4, 4).to(torch.float8_e4m3fn)
PAIRS: list[tuple[str, dict[str, torch.Tensor], str]] = [
    ("no scale", {"x.weight": Q}, "has no 'x.weight_scale_inv'"),
    (
        "wrong shape",
        {"x.weight": Q, "x.weight_scale_inv": torch.ones(2, 1)},
        "do not fit blocks of 128 x 128",
    ),
    ("wrong rank", {"x.weight": Q, "x.weight_scale_inv": torch.ones(2)}, "do not fit"),
    ("wrong dtype", {"x.weight": Q, "x.weight_scale_inv": torch.ones(1, 1).double()}, "dtype F64"),
    ("vector", {"x.weight": Q[0].contiguous(), "x.weight_scale_inv": torch.ones(2)}, "do not fit"),
    (
        "scale of a plain weight",
        {"x.weight": torch.ones(4, 4), "x.weight_scale_inv": torch.ones(1, 1)},
        "that is not supported",
    ),
    ("orphan", {"y.weight": torch.ones(4), "x.weight_scale_inv": torch.ones(1, 1)}, "that is not supported"),
    ("gptq or awq", {"x.qweight": torch.ones(4, 4).int(), "x.scales": torch.ones(1, 4)}, "with AWQ or GPTQ"),
    ("gptq", {"x.qweight": torch.ones(4, 4).int(), "x.g_idx": torch.ones(4)}, "with GPTQ that is not"),
    ("mlx", {"x.weight": torch.ones(4, 4).int(), "x.scales": torch.ones(1, 4)}, "with MLX that is not"),
    ("nvfp4", {"x.weight": torch.ones(4).byte(), "x.weight_scale_2": torch.ones(1)}, "with NVFP4 that"),
    ("exl3", {"x.trellis": torch.ones(4).int(), "x.suh": torch.ones(1)}, "with EXL3 that"),
    ("a tensor", {"x.weight": Q, "x.weight_scale": torch.ones(1)}, "one scale per tensor or channel"),
    ("a channel", {"x.weight": Q, "x.weight_scale": torch.ones(4, 1)}, "one scale per tensor or channel"),
    ("misnamed", {"x.weight": Q, "x.weight_scale_inv": torch.ones(4, 1)}, "one scale per tensor or channel"),
    (
        "packed",
        {"x.weight_packed": torch.ones(4, 4).int()},
        "with compressed-tensors that is not supported (tensor 'x.weight_packed')",
    ),
    ("per tensor", {"x.weight": torch.ones(4, 4), "x.weight_scale": torch.ones(1)}, "that is not supported"),
    (
        "static",
        {"x.weight": Q, "x.weight_scale_inv": torch.ones(1, 1), "x.input_scale": torch.ones(1)},
        "that is not supported",
    ),
]


@pytest.mark.parametrize(("tensors", "sentence"), [row[1:] for row in PAIRS], ids=[row[0] for row in PAIRS])
def test_weights_and_scales_that_do_not_match(
    make_model: MakeModel, tensors: dict[str, torch.Tensor], sentence: str
) -> None:
    directory = make_model({"model.safetensors": tensors})
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        open_checkpoint(directory)
    assert sentence in str(caught.value)
    assert str(directory) in str(caught.value)


def test_scales_that_are_not_finite_are_found_on_reading(make_model: MakeModel) -> None:
    tensors = {"x.weight": Q, "x.weight_scale_inv": torch.full((1, 1), torch.inf)}
    checkpoint = open_checkpoint(make_model({"model.safetensors": tensors}))
    with pytest.raises(CheckpointError, match=r"tensor 'x\.weight': .* not finite"):
        checkpoint.tensor("x.weight")


CONFIGS: list[tuple[object, type[Exception], str]] = [
    (
        {"quant_method": "gptq", "bits": 4},
        UnsupportedModelError,
        "quantised with GPTQ of 4 bits, which is not supported; fetch the original",
    ),
    ({"quant_method": "awq"}, UnsupportedModelError, "with AWQ, which"),
    ({"quant_method": "compressed-tensors"}, UnsupportedModelError, "with compressed-tensors, which"),
    ({"load_in_4bit": True}, UnsupportedModelError, "bitsandbytes of 4 bits"),
    (FP8 | {"activation_scheme": "static"}, UnsupportedModelError, "activation_scheme 'static'"),
    (FP8 | {"fmt": "e5m2"}, UnsupportedModelError, "fmt 'e5m2'"),
    (FP8 | {"weight_block_size": None}, UnsupportedModelError, "one scale per tensor or channel"),
    ({"group_size": 64, "bits": 4}, UnsupportedModelError, "MLX of 4 bits"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, UnsupportedModelError, "NVFP4 (ModelOpt)"),
    (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        UnsupportedModelError,
        "NVFP4 (compressed-tensors)",
    ),
    (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        UnsupportedModelError,
        "FP8 with a scale for each channel or tensor",
    ),
    ({"quant_method": "mxfp4"}, UnsupportedModelError, "MXFP4"),
    ({"quant_method": "hqq"}, UnsupportedModelError, "HQQ"),
    ({"quant_method": "exl3", "bits": 3.5}, UnsupportedModelError, "EXL3"),
    ({"quant_method": "brand-new"}, UnsupportedModelError, "quant_method 'brand-new'"),
    (FP8 | {"weight_block_size": [128]}, CheckpointError, "not two whole numbers"),
    (FP8 | {"weight_block_size": [128, 1.5]}, CheckpointError, "not two whole numbers"),
    (FP8 | {"weight_block_size": [0, 128]}, CheckpointError, "out of range"),
    (FP8 | {"weight_block_size": [10**30, 128]}, CheckpointError, "out of range"),
    ("fp8", CheckpointError, "not a JSON object"),
]


@pytest.mark.parametrize(("section", "kind", "sentence"), CONFIGS)
@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_quantisation_sections_that_are_refused(
    section: object, kind: type[Exception], sentence: str, key: str
) -> None:
    with pytest.raises(kind) as caught:
        fp8_block_size({key: section})
    assert sentence in str(caught.value)


def test_quantisation_sections_that_are_read() -> None:
    assert fp8_block_size({}) == (128, 128)
    assert fp8_block_size({"quantization_config": None}) == (128, 128)
    assert fp8_block_size({"quantization_config": {"quant_method": "fp8"}}) == (128, 128)
    assert fp8_block_size({"quantization_config": FP8 | {"weight_block_size": [64, 32]}}) == (64, 32)
