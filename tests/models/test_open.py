"""From a path to a model that runs: what is chosen, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from godwit import _native
from godwit.checkpoint import open_checkpoint
from godwit.checkpoint.packed import PackedFile
from godwit.errors import CheckpointError, UsageError
from godwit.models import open as opening
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import save_model
from godwit.models.native import formats
from godwit.models.open import described, load_weights, open_source, resolve_dtype, suits_native
from godwit.models.recipe import QuantRecipe
from godwit.shrink.quantize import quantize_checkpoint
from tests.engine.tiny import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("open") / "m"
    save_model(tiny_model("hybrid"), path)
    quantize_checkpoint(path, path.with_suffix(".godwit"), QuantRecipe.find("q8"))
    return path


def logits(model: CausalLM) -> torch.Tensor:
    from godwit.models.batch import ForwardBatch

    return model.compute_logits(model(ForwardBatch.packed(torch.tensor([5, 3, 8]), [3])))


def test_every_kind_of_source_becomes_a_model(directory: Path) -> None:
    plain, packed = open_source(directory), open_source(directory.with_suffix(".godwit"))
    assert isinstance(packed, PackedFile) and packed.config == plain.config
    loaded = load_weights(packed)
    made = load_weights(plain, quantize="q8")
    assert formats(loaded) == formats(made) and "q8" in formats(made)
    assert torch.equal(logits(loaded), logits(made))
    with pytest.raises(CheckpointError, match="absent"):
        open_source(directory / "absent")


def test_what_is_chosen(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(directory)
    told: list[str] = []
    seen: list[tuple[int, int]] = []
    model = load_weights(source, notice=told.append, progress=lambda *pair: seen.append(pair))
    assert formats(model) == ["bf16"] and model.stack is not None and seen[-1][0] == seen[-1][1]
    assert len(told) == 1 and "float32 weights are packed as bf16" in told[0]
    assert "bf16 on" in described(model)
    half = load_weights(source, "bfloat16", notice=told.append)
    assert half.stack is None and half.dtype == torch.bfloat16 and len(told) == 1
    assert "bfloat16 on PyTorch" in described(half)
    monkeypatch.setattr(_native, "instruction_set", lambda: "scalar")
    assert not suits_native(source)
    assert load_weights(source).dtype == torch.float32
    assert load_weights(source, quantize="q4", notice=told.append).stack is not None and len(told) == 1


def test_options_that_exclude_each_other(directory: Path) -> None:
    packed = open_source(directory.with_suffix(".godwit"))
    with pytest.raises(UsageError, match="does not apply to packed weights"):
        load_weights(packed, "float32")
    with pytest.raises(UsageError, match="does not apply to packed weights"):
        load_weights(open_source(directory), "float32", "q4")
    with pytest.raises(UsageError, match="already packed"):
        load_weights(packed, quantize="q4")


def test_arithmetic_on_pytorch(directory: Path, tmp_path: Path) -> None:
    save_model(tiny_model("hybrid").bfloat16(), tmp_path / "m")
    for path, stored in ((directory, torch.float32), (tmp_path / "m", torch.bfloat16)):
        checkpoint = open_checkpoint(path)
        assert resolve_dtype("float16", checkpoint, None) == torch.float16
        assert resolve_dtype("auto", checkpoint, None) == torch.float32
        enough = 8 * checkpoint.num_parameters + 2
        assert resolve_dtype("auto", checkpoint, enough) == torch.float32
        assert resolve_dtype("auto", checkpoint, enough - 2) == stored


def test_nothing_is_packed_for_a_packed_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were packed")

    monkeypatch.setattr(opening, "pack_checkpoint", refuse)
    assert load_weights(open_source(directory.with_suffix(".godwit"))).stack is not None
