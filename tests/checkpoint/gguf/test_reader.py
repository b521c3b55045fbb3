"""GGUF files as checkpoints: every tensor as it was before a converter changed it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from godwit.checkpoint import Checkpoint, open_checkpoint
from godwit.checkpoint.gguf import GgufCheckpoint
from godwit.checkpoint.gguf.tensors import log_decay
from godwit.checkpoint.packed_layout import Matrix
from godwit.checkpoint.spelling import canonical_name
from godwit.errors import CheckpointError, GodwitError, UnsupportedModelError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model
from godwit.models.names import name_map
from godwit.models.open import load_weights
from godwit.models.packing import Packer, stored_recipe
from godwit.qtensor import QuantTensor
from tests.checkpoint.gguf.convert import FIELDS, Converter, make_model, published

FIXTURES = Path(__file__).resolve().parents[4] / "shared" / "fixtures" / "gguf"


def logits(model: CausalLM) -> Tensor:
    ids = torch.tensor([5, 3, 8, 1, 60, 7])
    return model.compute_logits(model(ForwardBatch.packed(ids, [len(ids)])))


def check_equal(found: Checkpoint, wanted: dict[str, Tensor]) -> None:
    """Names, shapes and values, whole and by rows."""
    assert set(found.names()) == set(wanted)
    for name, values in wanted.items():
        read = found.tensor(name).float()
        assert found.info(name).shape == tuple(values.shape) == tuple(read.shape), name
        if name.endswith("A_log"):  # any number with the same exponential does
            assert torch.equal(read.exp(), values.float().exp()), name
        else:
            assert torch.equal(read, values.float()), name
        part = found.tensor(name, slice(1, 3)).float()
        assert torch.equal(part, read[1:3]), name


VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((arch, {}, {}) for arch in FIELDS),
    ("qwen3next", {"num_mtp": 1}, {}),
    ("qwen3next", {}, {"legacy": True}),
    ("qwen3next", {"num_mtp": 1}, {"fuse": True}),
    ("qwen3next", {"num_mtp": 1}, {"ollama": True, "legacy": True}),
    ("qwen35", {"linear_num_value_heads": 2}, {}),
    ("qwen35", {"linear_num_value_heads": 6, "tie_word_embeddings": True}, {}),
    ("qwen35moe", {"num_mtp": 1, "linear_num_value_heads": 6}, {}),
    ("qwen35moe", {"num_mtp": 1}, {"ollama": True, "keys": {"qwen35moe.ssm.v_head_reordered": True}}),
    ("qwen3moe", {"tie_word_embeddings": True}, {"fuse": True}),
    ("mixtral", {}, {"single": True}),
    ("mixtral", {"tie_word_embeddings": True}, {"fuse": True}),
]


@pytest.mark.parametrize(("arch", "changed", "options"), VARIANTS)
def test_every_tensor_comes_back(
    arch: str, changed: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(arch, **changed)
    found = open_checkpoint(Converter(arch, model, **options).write(tmp_path / "m.gguf"))
    wanted = published(model)
    if options.get("legacy") or arch != "qwen3next":
        check_equal(found, wanted)
    loaded = load_model(found, dtype=torch.float32)
    assert (loaded.mtp is None) == ("num_mtp" not in changed)
    assert torch.equal(logits(loaded), logits(model))
    for name, parameter in model.named_parameters():
        if not name.endswith("A_log"):
            assert torch.equal(loaded.get_parameter(name), parameter), name


def test_a_split_set_is_one_model(tmp_path: Path) -> None:
    model = make_model("qwen3")
    first = Converter("qwen3", model, split=9).write(tmp_path / "m.gguf")
    assert first.name == "m-00001-of-00007.gguf"
    check_equal(open_checkpoint(first), published(model))
    assert open_checkpoint(tmp_path).path == first
    second = first.with_name(first.name.replace("-00001-", "-00002-"))
    with pytest.raises(CheckpointError, match=r"-00001-of-00007\.gguf"):
        open_checkpoint(second)
    second.unlink()
    with pytest.raises(CheckpointError, match="is missing; fetch all 7 parts"):
        open_checkpoint(first)


def test_what_other_programs_add_is_left_out(tmp_path: Path) -> None:
    model = make_model("qwen35", num_hidden_layers=4)

    class WithTower(Converter):
        def tensors(self) -> dict[str, Tensor]:
            vision = {"v.blk.0.attn_q.weight": torch.ones(4, 32), "mm.0.weight": torch.ones(4, 32)}
            return {**super().tensors(), **vision}

    found = open_checkpoint(WithTower("qwen35", model).write(tmp_path / "m.gguf"))
    check_equal(found, published(model))


def test_value_heads_that_are_in_order_already(tmp_path: Path) -> None:
    """Ollama's converter says whether it has put them in tiled order."""
    model = make_model("qwen35moe")

    class InOrder(Converter):
        def tensors(self) -> dict[str, Tensor]:
            self.arch = "qwen3next"  # which leaves heads alone
            return super().tensors()

    path = InOrder("qwen35moe", model, keys={"qwen35moe.ssm.v_head_reordered": False}).write(tmp_path / "m")
    check_equal(open_checkpoint(path), published(model))


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    class Odd(Converter):
        def tensors(self) -> dict[str, Tensor]:
            return {**super().tensors(), "blk.0.attn_odd.weight": torch.ones(4)}

    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_odd\.weight"):
        open_checkpoint(Odd("llama", make_model("llama")).write(tmp_path / "m.gguf"))


def test_a_draft_head_alone_is_refused(tmp_path: Path) -> None:
    class Head(Converter):
        def tensors(self) -> dict[str, Tensor]:
            kept = ("token_embd", "output", "blk.4.")
            return {name: t for name, t in super().tensors().items() if name.startswith(kept)}

    model = make_model("qwen3next", num_mtp=1)
    with pytest.raises(CheckpointError, match="only the MTP layers"):
        open_checkpoint(Head("qwen3next", model).write(tmp_path / "m.gguf"))


# ---- llama.cpp's own converter -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_next", "tiny_35moe"])
def test_files_of_the_real_converter(name: str) -> None:
    path = FIXTURES / f"{name}.gguf"
    if not path.exists():
        pytest.skip("these files are not part of the repository")
    theirs, ours = open_checkpoint(FIXTURES / name), open_checkpoint(path)
    stored = {canonical_name(tensor) or "": theirs.tensor(tensor) for tensor in theirs.names()}
    whole = {tensor: values for tensor, values in stored.items() if tensor in ours}
    assert len(whole) > 20
    for tensor, values in whole.items():
        read = ours.tensor(tensor).float()
        same = read.exp(), values.float().exp()
        assert torch.equal(*(same if tensor.endswith("A_log") else (read, values.float()))), tensor
    pair = load_model(theirs, dtype=torch.float32), load_model(ours, dtype=torch.float32)
    assert (pair[0].mtp is None) == (pair[1].mtp is None) == (name == "tiny_llama")
    assert torch.equal(logits(pair[0]), logits(pair[1]))
    assert len(list(name_map(ours.config, int(pair[1].mtp is not None)))) > 10


# ---- Block types -------------------------------------------------------------------------------------------

EXACT = ("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "MXFP4")
OTHERS = (
    "Q4_1",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ2_XXS",
    "IQ2_S",
    "IQ3_S",
    "IQ1_M",
    "IQ4_XS",
)


class Blocks:
    """Encodes matrices as random blocks of a type with small scales."""

    def __init__(self, name: str) -> None:
        self.kind = gguf.GGMLQuantizationType[name]
        self.elements, self.bytes = gguf.GGML_QUANT_SIZES[self.kind]
        self.random = np.random.default_rng(0)

    def __call__(self, values: np.ndarray[Any, Any], name: str) -> tuple[np.ndarray[Any, Any], Any]:
        if values.ndim < 2 or values.shape[-1] % self.elements or "gate_inp" in name:
            return values, gguf.GGMLQuantizationType.F32
        count = values.size // self.elements
        while True:
            raw = self.random.integers(0, 256, (count, self.bytes), np.uint8)
            self._scales(raw)
            decoded = gguf.quants.dequantize(raw, self.kind)
            if np.isfinite(decoded).all() and np.abs(decoded).max() < 100:
                return raw.reshape(*values.shape[:-1], -1), self.kind

    def _scales(self, raw: np.ndarray[Any, Any]) -> None:
        """Replace half-precision scales, whose places differ by type, by small ones."""
        small = self.random.uniform(0.001, 0.01, (len(raw), 1)).astype(np.float16).view(np.uint8)
        name = self.kind.name
        if name == "MXFP4":
            raw[:, 0] = self.random.integers(110, 125, len(raw))
        elif name == "IQ1_M":  # its scale is spread over four places
            words = raw[:, 48:56].view(np.uint16)
            bits = small.view(np.uint16)[:, 0]
            for index in range(4):
                words[:, index] = (words[:, index] & 0x0FFF) | ((bits >> (4 * index)) & 15) << 12
        elif name in ("Q2_K", "Q3_K", "Q6_K"):
            end = 80 if name == "Q2_K" else self.bytes - 2
            raw[:, end : end + 2] = small
            if name == "Q2_K":
                raw[:, 82:84] = small
        else:
            raw[:, :2] = small
            if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
                raw[:, 2:4] = small
        if name == "Q8_0":
            raw[:, 2:][raw[:, 2:] == 128] = 127


def dense(**changed: Any) -> CausalLM:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 8}
    return make_model("qwen3", **{**sizes, **changed})


@pytest.mark.parametrize("name", [*EXACT, *OTHERS])
def test_values_are_those_of_the_format(name: str, tmp_path: Path) -> None:
    """Decoded they are gguf's own; packed they are kept, by the types that q8 holds exactly."""
    path = Converter("qwen3", dense(), encode=Blocks(name)).write(tmp_path / "m.gguf")
    found = open_checkpoint(path)
    reader = gguf.GGUFReader(path)
    raw = {tensor.name: tensor for tensor in reader.tensors}
    theirs = raw["blk.0.ffn_up.weight"]
    wanted = torch.from_numpy(gguf.quants.dequantize(theirs.data, theirs.tensor_type))
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found.tensor(up), wanted) and found.info(up).stored == name
    assert torch.equal(found.tensor(up, slice(7, 9)), wanted[7:9])
    groups = found.groups(up)
    assert (groups is not None) == (name in EXACT)
    if groups is not None:
        codes, scales = groups
        assert torch.equal(codes.float() * scales.float().repeat_interleave(32, 1), wanted)
    told: list[str] = []
    loaded = load_weights(found, notice=told.append)
    assert loaded.stack is not None and len(told) == 1 and told[0].startswith(f"{name} weights (")
    assert ("exactly" in told[0]) == (name in EXACT)
    plain = load_model(found, dtype=torch.float32)
    with Packer(found, stored_recipe(found)) as packer:
        for parameter, blob in packer.blobs.items():
            if isinstance(blob, Matrix):
                packed = packer.packed(parameter)
                assert isinstance(packed, QuantTensor)
                values, own = packed.dequantize(), plain.get_parameter(parameter)
                near = (values - own).norm() / own.norm()
                assert blob.format == "q8" and (near == 0 if name in EXACT else near < 0.02), parameter
    assert bool(packer.exact) == (name in EXACT) and bool(packer.decoded) == (name in OTHERS)


def test_experts_and_tiled_columns_stay_exact(tmp_path: Path) -> None:
    """Value heads of 32 are whole groups, so even the columns of their output projection are only moved."""
    model = make_model("qwen35moe", linear_num_value_heads=6)
    found = open_checkpoint(Converter("qwen35moe", model, encode=Blocks("Q8_0")).write(tmp_path / "m.gguf"))
    out = "model.layers.0.linear_attn.out_proj.weight"
    groups = found.groups(out)
    assert groups is not None
    assert torch.equal(groups[0].float() * groups[1].float().repeat_interleave(32, 1), found.tensor(out))
    told: list[str] = []
    loaded = load_weights(found, notice=told.append)
    assert loaded.stack is not None and len(told) == 2 and all("every one of them exactly" in t for t in told)
    narrow = make_model("qwen35", linear_value_head_dim=16)
    path = Converter("qwen35", narrow, encode=Blocks("Q8_0")).write(tmp_path / "n.gguf")
    assert open_checkpoint(path).groups(out) is None


def test_nvfp4_has_a_second_scale(tmp_path: Path) -> None:
    up = "blk.0.ffn_up.weight"

    class Scaled(Converter):
        def tensors(self) -> dict[str, Tensor]:
            return {**super().tensors(), "blk.0.ffn_up.scale": torch.tensor([0.25])}

    def encode(values: np.ndarray[Any, Any], name: str) -> tuple[np.ndarray[Any, Any], Any]:
        if name != up:
            return values, gguf.GGMLQuantizationType.F32
        kind = gguf.GGMLQuantizationType.NVFP4
        raw = np.random.default_rng(0).integers(
            0, 256, (*values.shape[:-1], values.shape[-1] // 64 * 36), np.uint8
        )
        raw.reshape(-1, 36)[:, :4] = 0x38  # scales of one, as E4M3 has them
        return raw, kind

    path = Scaled("qwen3", dense(), encode=encode).write(tmp_path / "m.gguf")
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}[up]
    values = torch.from_numpy(gguf.quants.dequantize(raw.data, raw.tensor_type))
    found = open_checkpoint(path)
    assert torch.equal(found.tensor("model.layers.0.mlp.up_proj.weight"), values * 0.25)


def test_decays_give_the_stored_numbers_back() -> None:
    random = torch.Generator().manual_seed(0)
    for decays in (
        torch.rand(4096, generator=random) * 16,
        torch.rand(4096, generator=random).log() * 3,
        torch.rand(4096, generator=random).bfloat16().float() * 4 - 2,
    ):
        stored = -decays.exp()
        assert torch.equal(-log_decay(stored).exp(), stored)


# ---- Damage ------------------------------------------------------------------------------------------------


def test_flipped_bytes_end_in_a_sentence(tmp_path: Path) -> None:
    """Or in a file that is still read: flips in the tensors' data change numbers only."""
    path = Converter("qwen3", make_model("qwen3", num_hidden_layers=1)).write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    head = GgufCheckpoint(path)._files["token_embd.weight"].entries["token_embd.weight"].begin
    random = np.random.default_rng(0)
    refused = 0
    for place, value in zip(random.integers(0, head, 300), random.integers(1, 256, 300), strict=True):
        damaged = bytearray(whole)
        damaged[place] ^= int(value)
        path.write_bytes(damaged)
        try:
            found = open_checkpoint(path)
            assert found.config.hidden_size
            for name in found.names()[:2]:
                found.tensor(name)
            found.files()
        except GodwitError as error:
            refused += 1
            assert "\n" not in str(error) and isinstance(error, (CheckpointError, UnsupportedModelError))
    assert refused > 100
