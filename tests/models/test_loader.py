"""Loading: what does not fit is listed at once, and every layout in the wild ends in the same parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from godwit.checkpoint import dequantize_fp8, open_checkpoint, quantize_fp8, save_checkpoint
from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import export_tensors, load_model, save_model
from tests.models.families import BY_NAME
from tests.models.harness import randomize

NEXT = {"model_type": "qwen3_next", **BY_NAME["qwen3_next"].fields}
Tensors = dict[str, Tensor]


def fresh(raw: Mapping[str, Any] = NEXT, num_mtp: int = 1) -> CausalLM:
    model = CausalLM(ModelConfig.from_dict(raw), num_mtp=num_mtp).requires_grad_(False)
    randomize(model)
    return model


def saved(path: Path, tensors: Mapping[str, Tensor], raw: Mapping[str, Any] = NEXT) -> Path:
    save_checkpoint(path, ((name, tensor.contiguous()) for name, tensor in tensors.items()), raw)
    return path


def assert_loads_as(path: Path, model: CausalLM) -> None:
    found = dict(load_model(path).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name


def test_everything_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    tensors = dict(export_tensors(fresh()))
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"], tensors["mtp.fc.weight"]
    tensors["model.layers.7.input_layernorm.weight"] = torch.zeros(54)
    tensors["model.norm.weight"] = torch.zeros(55)
    tensors["model.layers.0.linear_attn.A_log"] = torch.zeros(6, 1)
    with pytest.raises(CheckpointError) as caught:
        load_model(saved(tmp_path / "m", tensors))
    text = str(caught.value)
    assert "missing tensors (2): model.layers.2.mlp.experts.5.up_proj.weight, mtp.fc.weight" in text
    assert "unexpected tensors (1): model.layers.7.input_layernorm.weight" in text
    assert "misshapen tensors (2): " in text
    assert "model.norm.weight is [55], expected [54]" in text
    assert "model.layers.0.linear_attn.A_log is [6, 1], expected [6]" in text
    assert "config.json" in text


def test_long_lists_are_cut(tmp_path: Path) -> None:
    tensors = {n: t for n, t in export_tensors(fresh()) if ".experts." not in n}
    with pytest.raises(CheckpointError, match=r"missing tensors \(105\): (model\.[\w.]+, ){20}\.\.\.$"):
        load_model(saved(tmp_path / "m", tensors))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_missing_ends_of_the_model(name: str, tmp_path: Path) -> None:
    tensors = dict(export_tensors(fresh()))
    del tensors[name]
    with pytest.raises(CheckpointError, match=rf"missing tensors \(1\): {name}"):
        load_model(saved(tmp_path / "m", tensors))


def test_mtp_layers_are_counted_in_the_names(tmp_path: Path) -> None:
    model = fresh()
    tensors = dict(export_tensors(model))
    assert_loads_as(saved(tmp_path / "with", tensors), model)
    trunk = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    assert load_model(saved(tmp_path / "without", trunk)).mtp is None
    told = {**NEXT, "mtp_num_hidden_layers": 1}
    assert load_model(saved(tmp_path / "told", trunk, told)).mtp is None


def test_a_second_mtp_layer_is_refused_by_name(tmp_path: Path) -> None:
    tensors = dict(export_tensors(fresh()))
    second = {name.replace("layers.0", "layers.1"): t for name, t in tensors.items() if "mtp.layers" in name}
    with pytest.raises(CheckpointError, match=r"unexpected tensors.*mtp\.layers\.1\."):
        load_model(saved(tmp_path / "m", tensors | second))


def experts_fused(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            out[name] = tensor
            continue
        base, rest = name.split(".experts.")
        if not rest.startswith("0."):
            continue

        def stack(part: str, base: str = base) -> Tensor:
            return torch.stack([tensors[f"{base}.experts.{e}.{part}.weight"] for e in range(7)])

        if rest == "0.gate_proj.weight":
            out[base + ".experts.gate_up_proj"] = torch.cat((stack("gate_proj"), stack("up_proj")), 1)
        elif rest == "0.down_proj.weight":
            out[base + ".experts.down_proj"] = stack("down_proj")
    return out


def only_mtp_apart(tensors: Tensors) -> Tensors:
    """As Qwen3.5-35B-A3B: the trunk's experts fused, those of the MTP layer one by one."""
    fused = experts_fused(tensors)
    trunk = {name: tensor for name, tensor in fused.items() if not name.startswith("mtp.")}
    return trunk | {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}


def wrapped(tensors: Tensors) -> Tensors:
    """As a multimodal wrapper, with an image tower beside the text model."""
    inner = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in tensors.items()
    }
    return inner | {"model.visual.patch_embed.proj.bias": torch.zeros(3)}


def as_mlx_vlm(tensors: Tensors) -> Tensors:
    """Everything under one more prefix, the head too, with a tower beside it."""
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()} | {
        "vision_tower.blocks.0.attn.proj.weight": torch.zeros(3),
        "multi_modal_projector.linear_1.weight": torch.zeros(3),
    }


def mtp_inside(tensors: Tensors) -> Tensors:
    return {"model." + name if name.startswith("mtp.") else name: tensor for name, tensor in tensors.items()}


def with_buffers(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.3.self_attn.rotary_emb.inv_freq": torch.zeros(3)}


@pytest.mark.parametrize(
    "layout", [experts_fused, only_mtp_apart, wrapped, as_mlx_vlm, mtp_inside, with_buffers]
)
def test_layouts_in_the_wild(layout: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    model = fresh()
    tensors = dict(export_tensors(model))
    changed = layout(tensors)
    assert changed.keys() != tensors.keys()
    assert_loads_as(saved(tmp_path / "m", changed), model)


def test_one_tensor_under_two_spellings_is_refused(tmp_path: Path) -> None:
    tensors = dict(export_tensors(fresh()))
    tensors["model.mtp.fc.weight"] = tensors["mtp.fc.weight"] + 1
    with pytest.raises(CheckpointError, match=r"mtp\.fc\.weight \(a second spelling of "):
        load_model(saved(tmp_path / "m", tensors))


def test_both_layouts_of_the_same_experts_are_refused(tmp_path: Path) -> None:
    tensors = dict(export_tensors(fresh()))
    fused = {
        name: t
        for name, t in experts_fused(tensors).items()
        if name.endswith(("up_proj", "experts.down_proj"))
    }
    with pytest.raises(
        CheckpointError, match=r"unexpected tensors \(10\): model.layers.0.mlp.experts.down_proj"
    ):
        load_model(saved(tmp_path / "m", dict(sorted((tensors | fused).items()))))


def test_a_tied_checkpoint_may_carry_its_head(tmp_path: Path) -> None:
    raw = {"model_type": "qwen3", **BY_NAME["qwen3 tied"].fields}
    model = fresh(raw, 0)
    tensors = dict(export_tensors(model))
    assert "lm_head.weight" not in tensors and model.head is None
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    loaded = load_model(saved(tmp_path / "m", tensors, raw))
    assert loaded.head_weight is loaded.embedding.weight
    assert_loads_as(tmp_path / "m", model)


def test_a_head_of_its_own_in_a_tied_checkpoint_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = {"model_type": "qwen3", **BY_NAME["qwen3 tied"].fields}
    model = fresh({**raw, "tie_word_embeddings": False}, 0)
    checkpoint = open_checkpoint(saved(tmp_path / "m", dict(export_tensors(model)), raw))
    assert not checkpoint.config.tie_embeddings and not checkpoint.config.raw["tie_word_embeddings"]
    loaded = load_model(checkpoint)
    assert loaded.head is not None and torch.equal(loaded.head.weight, model.head_weight)
    assert len(caplog.records) == 1 and "has another head; it is used" in caplog.text
    save_model(loaded, tmp_path / "again")
    assert load_model(tmp_path / "again").head is not None
    assert len(caplog.records) == 1


def test_a_tied_matrix_may_be_called_the_head(tmp_path: Path) -> None:
    raw = {"model_type": "qwen3", **BY_NAME["qwen3 tied"].fields}
    model = fresh(raw, 0)
    tensors = dict(export_tensors(model))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    assert_loads_as(saved(tmp_path / "m", tensors, raw), model)


def test_wrappers_may_tie_at_either_level() -> None:
    fields = BY_NAME["qwen3_5 wrapper"].fields
    for outer in ({}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}):
        for inner in (False, True):
            text = {**fields["text_config"], "tie_word_embeddings": inner}
            raw = {"model_type": "qwen3_5", **fields, **outer, "text_config": text}
            tied = ModelConfig.from_dict(raw)
            assert tied.tie_embeddings == (inner or outer.get("tie_word_embeddings", False))
            assert not ModelConfig.from_dict(tied.untied().raw).tie_embeddings


def test_parameters_as_they_are_stored(tmp_path: Path) -> None:
    """For packing, each parameter has the least dtype that holds its tensors exactly."""
    model = fresh()
    tensors = {name: tensor.bfloat16() for name, tensor in export_tensors(model)}
    tensors["model.layers.0.linear_attn.A_log"] = torch.full((6,), 1 / 3)
    tensors["model.layers.3.self_attn.q_proj.weight"] = tensors[
        "model.layers.3.self_attn.q_proj.weight"
    ].half()
    loaded = load_model(saved(tmp_path / "m", tensors), as_stored=True)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.get_parameter("layers.0.mixer.A_log"), torch.full((6,), 1 / 3))
    assert loaded.get_parameter("layers.3.mixer.in_proj.weight").dtype == torch.float32
    assert load_model(tmp_path / "m").get_parameter("layers.0.mixer.A_log").dtype == torch.bfloat16


def test_fp8(tmp_path: Path) -> None:
    """Block-wise FP8 as the official releases: matrices in blocks of 128 x 128, the rest in bfloat16."""
    raw = {**NEXT, "hidden_size": 160, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}
    model = fresh(raw).to(torch.bfloat16)
    stored: Tensors = {}
    expected: Tensors = {}
    for name, tensor in export_tensors(model):
        expected[name] = tensor
        if not name.endswith(("_proj.weight", "in_proj_qkvz.weight")):
            stored[name] = tensor
            continue
        codes, scale = quantize_fp8(tensor)
        stored[name], stored[name + "_scale_inv"] = codes, scale
        expected[name] = dequantize_fp8(codes, scale)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) > 100
    loaded = load_model(saved(tmp_path / "m", stored, raw))
    assert loaded.dtype == torch.bfloat16
    found = dict(export_tensors(loaded))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_progress_and_an_open_checkpoint(tmp_path: Path) -> None:
    model = fresh()
    path = saved(tmp_path / "m", dict(export_tensors(model)))
    seen: list[tuple[int, int]] = []
    loaded = load_model(open_checkpoint(path), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, seen[-1][1]) for i in range(1, len(seen) + 1)]
    assert seen[-1][0] == len(dict(export_tensors(model)))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_model_does_not_lean_on_its_file(tmp_path: Path) -> None:
    model = fresh()
    path = saved(tmp_path / "m", dict(export_tensors(model)))
    loaded = load_model(path)
    (path / "model.safetensors").unlink()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_a_config_of_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", dict(export_tensors(fresh())))
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, "num_experts": 8, "hidden_size": 60}))
    with pytest.raises(CheckpointError, match=r"missing tensors \(15\): .*; misshapen tensors \(164\): "):
        load_model(path)
