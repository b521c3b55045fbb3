"""What Godwit saves, Godwit and ``transformers`` load again, bit for bit."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch

from godwit.checkpoint import open_checkpoint
from godwit.checkpoint.companions import read_companions
from godwit.config import ModelConfig
from godwit.errors import CheckpointError
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model, save_model
from tests.models.families import BY_NAME, FAMILIES, Family
from tests.models.harness import Pair, error, limit, load_reference, randomize, reference_logits, tokens


def assert_equal_parameters(a: CausalLM, b: CausalLM) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


def fresh_model(family: Family, num_mtp: int = 0) -> CausalLM:
    config = ModelConfig.from_dict({"model_type": family.model_type, **family.fields})
    model = CausalLM(config, num_mtp=num_mtp).requires_grad_(False)
    randomize(model)
    return model


def test_transformers_sees_the_same_model(pair: Pair, tmp_path: Path) -> None:
    save_model(pair.model, tmp_path / "saved")
    reference = load_reference(pair, tmp_path / "saved")
    wanted = {text_name(name): value for name, value in pair.reference.named_parameters()}
    found = dict(reference.named_parameters())
    assert found.keys() == {name for name in wanted if not name.startswith("model.visual.")}
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name]), name
    # Where the weights lie in memory may decide how a CPU adds, so the logits need not be equal to the bit.
    ids = tokens(30)
    apart = error(reference_logits(reference, ids), reference_logits(pair.reference, ids))
    assert apart <= limit("saved")


def text_name(name: str) -> str:
    """A wrapper's parameter as the text model names it."""
    return name.replace("model.language_model.", "model.", 1)


WITH_MTP = [f for f in FAMILIES if f.model_type.startswith(("qwen3_next", "qwen3_5"))]


@pytest.mark.parametrize(
    ("family", "num_mtp"),
    [pytest.param(family, 0, id=family.name) for family in FAMILIES]
    + [pytest.param(family, 1, id=f"{family.name} + MTP") for family in WITH_MTP],
)
def test_back_again(family: Family, num_mtp: int, tmp_path: Path) -> None:
    model = fresh_model(family, num_mtp)
    save_model(model, tmp_path / "one")
    once = load_model(tmp_path / "one")
    save_model(once, tmp_path / "two")
    twice = load_model(tmp_path / "two")
    assert (model.mtp is None) == (num_mtp == 0)
    assert once.dtype == torch.float32
    assert_equal_parameters(once, model)
    assert_equal_parameters(twice, model)
    assert once.config.layers == model.config.layers
    assert once.config.tie_embeddings == model.config.tie_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_on_disk_is_kept_or_chosen(dtype: torch.dtype, tmp_path: Path) -> None:
    model = fresh_model(BY_NAME["qwen3_next"], 1).to(dtype)
    save_model(model, tmp_path / "saved")
    assert_equal_parameters(load_model(tmp_path / "saved"), model)
    assert_equal_parameters(load_model(tmp_path / "saved", dtype=torch.float32), model.float())


def test_published_names_and_layouts(tmp_path: Path) -> None:
    """Qwen3-Next: experts one by one, q with its gate, q | k | v | z by key head."""
    save_model(fresh_model(BY_NAME["qwen3_next"], 1), tmp_path / "saved")
    checkpoint = open_checkpoint(tmp_path / "saved")
    shapes = {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names()}
    assert shapes["model.layers.0.linear_attn.in_proj_qkvz.weight"] == (2 * 36 + 2 * 120, 54)
    assert shapes["model.layers.0.linear_attn.in_proj_ba.weight"] == (12, 54)
    assert shapes["model.layers.0.linear_attn.conv1d.weight"] == (192, 1, 4)
    assert shapes["model.layers.3.self_attn.q_proj.weight"] == (2 * 6 * 24, 54)
    assert shapes["model.layers.0.mlp.experts.6.down_proj.weight"] == (54, 20)
    assert shapes["mtp.layers.0.mlp.experts.6.up_proj.weight"] == (20, 54)
    assert shapes["mtp.fc.weight"] == (54, 108)
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in shapes)


def test_a_wrapper_is_saved_as_its_text_model(tmp_path: Path) -> None:
    """No image tower was loaded, so the saved config must not announce one."""
    model = fresh_model(BY_NAME["qwen3_5_moe wrapper"])
    save_model(model, tmp_path / "saved")
    raw = open_checkpoint(tmp_path / "saved").raw_config
    assert raw["model_type"] == "qwen3_5_moe_text"
    assert "vision_config" not in raw and "text_config" not in raw
    assert raw["tie_word_embeddings"] is False


@pytest.mark.parametrize("target", ["../secret", "/dev/zero", "pipe"])
def test_companions_do_not_lead_elsewhere(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "from"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    os.mkfifo(folder / "pipe")
    (folder / "vocab.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"vocab\.json: (a link that leads out|not a regular file)"):
        read_companions(folder)


def test_companions_and_extra_files_travel_along(tmp_path: Path) -> None:
    model = fresh_model(BY_NAME["llama with biases"])
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "tokenizer.json").write_text("{}")
    (tmp_path / "from" / "secret.txt").write_text("no")
    save_model(model, tmp_path / "saved", companions=tmp_path / "from", extra_files={"notes.md": b"hello"})
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "notes.md"}


def test_models_can_be_copied_and_pickled() -> None:
    model = fresh_model(BY_NAME["qwen3_next"], 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_parameters(other, model)
        assert other.config == model.config
