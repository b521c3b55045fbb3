"""Importances: equal to what a direct computation finds, with priors where a text says little."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu

from godwit.config import ModelConfig
from godwit.errors import CheckpointError, UnsupportedModelError, UsageError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.layers import Experts, Linear
from godwit.models.loader import save_model
from godwit.models.native import pack_model
from godwit.models.recipe import QuantRecipe, tensor_blobs
from godwit.qtensor import quantize
from godwit.shrink.importance import (
    PRIOR,
    Importance,
    collect_importance,
    read_importance,
    write_importance,
)
from godwit.shrink.quantize import quantize_checkpoint
from tests.engine.tiny import CONFIGS, tiny_model

EXPERTS = "layers.1.ffn.experts"


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def inputs_of(model: CausalLM, module: str, ids: list[int], window: int) -> list[tuple[Tensor, ...]]:
    """What a module is called with while the trunk reads a text."""
    seen: list[tuple[Tensor, ...]] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args))
    for begin in range(0, len(ids), window):
        part = torch.tensor(ids[begin : begin + window])
        model(ForwardBatch.packed(part, [len(part)]))
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_matrix_that_multiplies_has_one(kind: str) -> None:
    model = tiny_model(kind)
    found = collect_importance(model, text(50))
    wanted: set[str] = set()
    num_mtp = int(model.mtp is not None)
    for name, blob in tensor_blobs(model.config, num_mtp, QuantRecipe.find("q4")).items():
        if type(blob).__name__ == "Matrix" and name != "embedding.weight":
            wanted.add(name)
        elif type(blob).__name__ == "ExpertStack":
            wanted |= {f"{name}.w13", f"{name}.w2"}
    assert set(found.values) == wanted
    assert all(bool((value >= 0).all()) and bool((value > 0).any()) for value in found.values.values())


def test_they_are_mean_squares_of_inputs() -> None:
    model, ids, window = tiny_model("hybrid"), text(100), 40
    done: list[tuple[int, int]] = []
    found = collect_importance(model, ids, window=window, progress=lambda *pair: done.append(pair)).values
    for name in ("layers.0.mixer.in_proj_qkvz", "layers.3.mixer.out_proj", "layers.2.ffn.router"):
        x = torch.cat([args[0] for args in inputs_of(model, name, ids, window)]).double()
        torch.testing.assert_close(found[f"{name}.weight"].double(), x.square().mean(0), rtol=1e-5, atol=0)
    shared = model.get_submodule("layers.2.ffn.shared_expert")
    x = torch.cat([args[0] for args in inputs_of(model, "layers.2.ffn.shared_expert", ids, window)])
    w13 = shared.get_submodule("w13")
    assert isinstance(w13, Linear)
    gate, up = linear(x, w13.weight).chunk(2, -1)
    between = (silu(gate) * up).double().square().mean(0)
    name = "layers.2.ffn.shared_expert"
    torch.testing.assert_close(found[f"{name}.w13.weight"], x.square().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[f"{name}.w2.weight"].double(), between, rtol=1e-4, atol=0)
    assert done == [(40, 100), (80, 100), (100, 100)]


def test_an_expert_has_those_of_its_own_tokens() -> None:
    model, ids = tiny_model("hybrid"), text(300)
    found = collect_importance(model, ids, window=128)
    experts = model.get_submodule(EXPERTS)
    assert isinstance(experts, Experts)
    calls = inputs_of(model, EXPERTS, ids, 128)
    x, chosen = torch.cat([c[0] for c in calls]).double(), torch.cat([c[2] for c in calls])
    assert chosen.numel() == 600
    everything = torch.cat([x[(chosen == e).any(1)] for e in range(4)]).square().mean(0)
    for index in range(4):
        rows = x[(chosen == index).any(1)]
        gate, up = linear(rows, experts.w13[index].double()).chunk(2, -1)
        between = (silu(gate) * up).square()
        wanted = (rows.square().sum(0) + PRIOR * everything) / (len(rows) + PRIOR)
        torch.testing.assert_close(
            found.values[f"{EXPERTS}.w13"][index].double(), wanted, rtol=1e-4, atol=1e-9
        )
        level = between.mean()
        wanted = (between.sum(0) + PRIOR * level) / (len(rows) + PRIOR)
        torch.testing.assert_close(
            found.values[f"{EXPERTS}.w2"][index].double(), wanted, rtol=1e-4, atol=1e-9
        )
    assert (found.tokens, found.experts) == (300, 20)  # of four layers, and of the one for further tokens


def test_an_expert_without_tokens_goes_by_the_prior() -> None:
    model = tiny_model("hybrid")
    router = model.get_submodule("layers.1.ffn.router")
    assert isinstance(router, Linear)
    router.weight.zero_()  # equal scores: always the same two are taken
    calls = inputs_of(model, EXPERTS, text(200), 200)
    taken = sorted(set(calls[0][2].flatten().tolist()))
    others = sorted({0, 1, 2, 3} - set(taken))
    found = collect_importance(model, text(200))
    first, second = found.values[f"{EXPERTS}.w13"], found.values[f"{EXPERTS}.w2"]
    assert len(taken) == 2
    torch.testing.assert_close(first[others], first[taken])
    assert torch.equal(second[others], torch.ones(2, 16)) and second[taken[0]].std() > 0
    assert found.rare >= 2
    assert collect_importance(model, text(PRIOR // 2)).rare == found.experts


def test_packing_with_them_lowers_the_error_they_weigh(tmp_path: Path) -> None:
    config = dataclasses.replace(ModelConfig.from_dict(CONFIGS["hybrid"]), initializer_range=0.3)
    model = CausalLM(config).requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(3))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # inputs that differ in size, as in trained models
            parameter.copy_(torch.linspace(-0.95, 3, parameter.numel()))
    values = collect_importance(model, text(400)).values
    plain = weighted = 0.0
    for name, importance in values.items():
        weights = dict(model.named_parameters())[name]
        stack = weights if weights.dim() == 3 else weights[None]
        rows = importance if importance.dim() == 2 else importance.expand(len(stack), -1)
        for weight, row in zip(stack, rows, strict=True):
            errors = [(quantize(weight, "q4", i).dequantize() - weight).square() @ row for i in (None, row)]
            plain, weighted = plain + float(errors[0].sum()), weighted + float(errors[1].sum())
    assert weighted < 0.98 * plain
    save_model(model, tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "m.godwit", QuantRecipe.find("q4"), importance=values)


def test_the_file_comes_back(tmp_path: Path) -> None:
    found = collect_importance(tiny_model("hybrid"), text(60))
    out = tmp_path / "new" / "importance.safetensors"
    write_importance(out, found, {"text": "some.txt"})
    again = read_importance(out)
    assert again.keys() == found.values.keys()
    assert all(torch.equal(again[name], value) for name, value in found.values.items())
    with safe_open(str(out), "pt") as file:
        assert file.metadata() == {"format": "pt", "tokens": "60", "text": "some.txt"}
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]
    with pytest.raises(CheckpointError, match="exists already"):
        write_importance(out, found, {})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        write_importance(tmp_path / "file" / "x", found, {})


def test_what_cannot_be_watched() -> None:
    model: Any = tiny_model("hybrid")
    with pytest.raises(UsageError, match="two tokens"):
        collect_importance(model, [1])
    with pytest.raises(UsageError, match="a packed model cannot be calibrated"):
        collect_importance(pack_model(model, "q8"), text(5))
    model.layers[0].mixer.in_proj_qkvz.weight[:] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        collect_importance(model, text(5))


def test_no_hook_stays() -> None:
    model = tiny_model("hybrid")
    collect_importance(model, text(5))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert isinstance(collect_importance(model, text(5)), Importance)


HOSTILE = {
    "negative": {"a": torch.tensor([1.0, -1.0])},
    "not a number": {"a": torch.tensor([[1.0, float("nan")]])},
    "infinite": {"a": torch.tensor([1.0, float("inf")])},
    "beyond float32": {"a": torch.tensor([1e300], dtype=torch.float64)},
    "very large": {"a": torch.tensor([2e30])},
    "whole numbers": {"a": torch.tensor([1, 2])},
    "booleans": {"a": torch.tensor([True])},
    "a number": {"a": torch.tensor(1.0)},
    "three dimensions": {"a": torch.ones(1, 2, 3)},
    "empty": {"a": torch.ones(0, 4)},
}


@pytest.mark.parametrize("tensors", HOSTILE.values(), ids=HOSTILE)
def test_hostile_importances_are_one_sentence(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "i.safetensors")
    with pytest.raises(
        CheckpointError, match=r"i\.safetensors: 'a' .*run 'godwit calibrate' again$"
    ) as caught:
        read_importance(tmp_path / "i.safetensors")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_importances(tmp_path: Path) -> None:
    path = tmp_path / "file"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(
        UnsupportedModelError, match="a PyTorch pickle, which can run code and is never opened"
    ):
        read_importance(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="too short"):
        read_importance(path)
    header = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (2**31, 2**33)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with path.open("ab") as file:
        file.truncate(8 + len(header) + 2**33)  # a hole: nothing is written
    with pytest.raises(CheckpointError, match=r"has 8\.0 GiB"):
        read_importance(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_importance(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_importance(path)
