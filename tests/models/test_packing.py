"""Packing while loading: the same bytes as in a file, one tensor in memory at a time, float32 kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from godwit.checkpoint import TensorInfo, open_checkpoint, quantize_fp8, save_checkpoint
from godwit.checkpoint.packed import PackedFile
from godwit.checkpoint.packed_layout import ExpertStack, Matrix, TensorBlob
from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.models.causal_lm import CausalLM
from godwit.models.inventory import EXACT
from godwit.models.layers import Experts
from godwit.models.loader import export_tensors, load_model, save_model
from godwit.models.packing import pack_checkpoint
from godwit.models.recipe import QuantRecipe
from godwit.qtensor import QuantTensor
from godwit.shrink.quantize import quantize_checkpoint
from tests.engine.tiny import CONFIGS, tiny_model
from tests.shrink.dequantized import load_dequantized, same_weights

FLOAT32 = ("A_log", "dt_bias", "norm.weight", "layernorm.weight")


class Stub:
    """A checkpoint in memory that hands out copies and counts the bytes of those that are still alive."""

    native_names = False
    path = Path("stub")
    metadata: Mapping[str, str] = {}

    def __init__(self, tensors: Mapping[str, Tensor], raw: Mapping[str, Any]) -> None:
        self.tensors, self.raw_config = tensors, raw
        self.config = ModelConfig.from_dict(raw)
        self.live = self.peak = 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(tuple(tensor.shape), tensor.dtype, "F32", tensor.nbytes)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        wanted = self.tensors[name] if rows is None else self.tensors[name][rows]
        # torch keeps the array alive as long as any view of the tensor
        array = np.array(wanted.contiguous().view(torch.uint8).numpy())
        self.live += array.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(array, self._gone, array.nbytes)
        return torch.from_numpy(array).view(wanted.dtype)

    def groups(self, name: str, rows: slice | None = None) -> None:
        pass

    def _gone(self, nbytes: int) -> None:
        self.live -= nbytes

    def release(self, name: str) -> None:
        pass

    def files(self) -> dict[str, bytes]:
        return {}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors_of(model: CausalLM, *, fused: bool) -> dict[str, Tensor]:
    tensors = {n: t for n, t in export_tensors(model) if not fused or ".experts." not in n}
    for name, parameter in model.named_parameters() if fused else ():
        if parameter.dim() == 3:
            layer = name.split("ffn.")[0] if name.startswith("mtp") else f"model.{name.split('ffn.')[0]}"
            last = "gate_up_proj" if name.endswith("w13") else "down_proj"
            tensors[f"{layer}mlp.experts.{last}"] = parameter
    return tensors


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.usefixtures("one_thread")
def test_one_tensor_at_a_time_is_in_memory(fused: bool) -> None:
    raw = {**CONFIGS["hybrid"], "num_hidden_layers": 2, "hidden_size": 64, "num_experts": 48,
           "moe_intermediate_size": 64, "mtp_num_hidden_layers": 0}  # fmt: skip
    model = CausalLM(ModelConfig.from_dict(raw)).requires_grad_(False)
    model.init_weights()
    stub = Stub(tensors_of(model, fused=fused), raw)
    total = sum(tensor.nbytes for tensor in stub.tensors.values())
    largest = max(tensor.nbytes for tensor in stub.tensors.values() if tensor.dim() < 3)
    packed, _ = pack_checkpoint(stub, QuantRecipe.find("q4"))
    assert packed.stack is not None
    assert stub.live == 0
    assert largest <= stub.peak <= largest + 3 * 64 * 64 * 4 < total / 20


def values(model: CausalLM) -> dict[str, Tensor]:
    """Bytes of packed weights and of what is left as parameters, by name."""
    found = {name: parameter.detach().view(-1) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Experts) and module.packed is not None:
            found[name] = module.packed.data
        elif isinstance(weight := vars(module).get("weight"), QuantTensor):
            found[f"{name}.weight"] = weight.data
    return found


def matrices(blobs: Mapping[str, TensorBlob]) -> Iterator[int]:
    """How many matrices each blob holds."""
    for blob in blobs.values():
        yield 2 * blob.num_experts if isinstance(blob, ExpertStack) else int(isinstance(blob, Matrix))


@pytest.mark.parametrize("recipe", ["q4", "q8", "bf16"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_memory_and_file_hold_the_same_bytes(kind: str, recipe: str, tmp_path: Path) -> None:
    save_model(tiny_model(kind), tmp_path / "m")
    checkpoint, rules = open_checkpoint(tmp_path / "m"), QuantRecipe.find(recipe)
    seen: list[tuple[int, int]] = []
    model, packer = pack_checkpoint(checkpoint, rules, progress=lambda *pair: seen.append(pair))
    report = quantize_checkpoint(checkpoint, tmp_path / "m.godwit", rules)
    file, found = PackedFile.open(tmp_path / "m.godwit"), values(model)
    assert found.keys() == file.blobs.keys()
    for name in file.blobs:
        stored = file.packed(name)
        data = stored.reshape(-1) if isinstance(stored, Tensor) else stored.data
        assert torch.equal(found[name], data), name
    total = sum(blob.num_weights for blob in report.blobs.values())
    assert seen == sorted(seen) and seen[-1] == (total, total)
    rounding = packer.rounding
    assert rounding.matrices == (sum(matrices(file.blobs)) if recipe == "bf16" else sum(
        name.endswith(EXACT) for name in file.blobs))  # fmt: skip
    assert 0 < rounding.error < 2.0**-7 if rounding.matrices else not rounding.dtypes


def test_a_packed_file_is_a_checkpoint(tmp_path: Path) -> None:
    """Read through the protocol it is the unpacked model, wholly and in ranges of rows."""
    save_model(tiny_model("hybrid"), tmp_path / "m", extra_files={"tokenizer.json": b"{}"})
    quantize_checkpoint(tmp_path / "m", tmp_path / "m.godwit", QuantRecipe.find("q4"))
    file = PackedFile.open(tmp_path / "m.godwit")
    assert same_weights(load_model(file, dtype=torch.float32), load_dequantized(file.path))
    for name in file.names():
        info, whole = file.info(name), file.tensor(name)
        assert (tuple(whole.shape), whole.dtype) == (info.shape, info.dtype) and info.nbytes > 0
        assert torch.equal(file.tensor(name, slice(1, 3)), whole[1:3])
        file.release(name)
        assert torch.equal(file.tensor(name), whole)
    assert "layers.0.ffn.experts.w13" in file and "layers.0.ffn.experts" not in file
    with pytest.raises(CheckpointError, match=r"has no tensor 'layers\.0\.ffn\.experts\.w3'"):
        file.info("layers.0.ffn.experts.w3")


def test_rows_of_a_checkpoint(tmp_path: Path) -> None:
    tensors = {"plain": torch.randn(9, 5)}
    for name, shape in (("matrix", (300, 130)), ("stack", (3, 140, 40))):
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = quantize_fp8(torch.randn(*shape))
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    save_checkpoint(tmp_path / "m", tensors.items(), {"quantization_config": section})
    checkpoint = open_checkpoint(tmp_path / "m")
    for name in checkpoint.names():
        whole = checkpoint.tensor(name)
        for begin, end in ((0, 1), (1, 3), (2, len(whole)), (len(whole) // 2, len(whole) - 1), (2, 2)):
            assert torch.equal(checkpoint.tensor(name, slice(begin, end)), whole[begin:end]), (name, begin)


def mixed(kind: str) -> dict[str, Tensor]:
    """Tensors of a bfloat16 checkpoint whose decays and norms are float32, with all their bits in use."""
    tensors = dict(export_tensors(tiny_model(kind)))
    for name, tensor in tensors.items():
        wide = name.endswith(FLOAT32)
        tensors[name] = torch.rand(tensor.shape) + 0.1 if wide else tensor.bfloat16()
    assert not any(torch.equal(t, t.bfloat16().float()) for t in tensors.values() if t.dtype == torch.float32)
    return tensors


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_float32_among_bfloat16_keeps_its_bits(kind: str, tmp_path: Path) -> None:
    tensors = mixed(kind)
    save_checkpoint(tmp_path / "m", tensors.items(), CONFIGS[kind])
    stored = load_model(tmp_path / "m", as_stored=True)
    save_model(stored, tmp_path / "again")
    again = open_checkpoint(tmp_path / "again")
    assert sorted(again.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert again.info(name).dtype == tensor.dtype, name
        assert torch.equal(again.tensor(name), tensor), name
    packed, _ = pack_checkpoint(again, QuantRecipe.find("q4"))
    quantize_checkpoint(again, tmp_path / "m.godwit", QuantRecipe.find("q4"))
    file = PackedFile.open(tmp_path / "m.godwit")
    wide = {name: p for name, p in stored.named_parameters() if p.dtype == torch.float32}
    assert len(wide) > 4
    for name, parameter in wide.items():
        assert torch.equal(file.tensor(name), parameter), name
        assert torch.equal(packed.get_parameter(name), parameter), name
