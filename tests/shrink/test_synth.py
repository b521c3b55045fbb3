"""Random models: whole files, sane activations through many layers, and routing as uneven as asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from godwit.checkpoint.packed import PackedFile
from godwit.config import ModelConfig
from godwit.errors import CheckpointError, UsageError
from godwit.models.batch import ForwardBatch
from godwit.shrink.recipe import QuantRecipe, tensor_blobs
from godwit.shrink.synth import first_layers, synthesize
from tests.engine.tiny import CONFIGS
from tests.shrink.dequantized import load_dequantized

WIDE: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "max_position_embeddings": 4096,
}


def forward(path: Path, num_tokens: int = 200) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Hidden states after each layer, router logits of each layer, and logits."""
    model = load_dequantized(path)
    hidden: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: hidden.append(out))
    router: list[Tensor] = []
    ids = torch.randint(0, model.config.vocab_size, (num_tokens,))
    with torch.no_grad():
        normed = model(ForwardBatch.packed(ids, [num_tokens]), router_logits=router)
        return hidden, router, model.compute_logits(normed)


@pytest.mark.parametrize("skew", [False, True], ids=["uniform", "real"])
def test_activations_stay_in_range_through_48_layers(tmp_path: Path, skew: bool) -> None:
    report = synthesize({**WIDE, "num_experts": 8}, tmp_path / "m", skew=skew)
    PackedFile.open(report.path).verify()
    hidden, _, logits = forward(report.path)
    assert len(hidden) == 48
    sizes = [float(x.square().mean().sqrt()) for x in hidden]
    assert min(sizes) > 0.5 and max(sizes) < 8
    assert bool(torch.isfinite(logits).all()) and 1 < float(logits.std()) < 6
    apart = hidden[-1][:, 32:]
    alike = torch.nn.functional.cosine_similarity(apart[:-1], apart[1:], dim=-1)
    assert float(alike.mean()) < 0.3  # tokens are still told apart


def shares(router: Tensor, top_k: int = 4) -> tuple[float, int]:
    """Share of the uses that the eighth of the experts used most has; experts used at all."""
    counts = torch.bincount(router.topk(top_k, -1).indices.flatten(), minlength=router.shape[1])
    most = counts.sort(descending=True).values[: router.shape[1] // 8]
    return float(most.sum() / counts.sum()), int((counts > 0).sum())


@pytest.mark.parametrize("format", ["q4", "q8", "bf16"])
def test_routing(tmp_path: Path, format: str) -> None:
    synthesize(WIDE, tmp_path / "even", num_layers=6, format=format)
    synthesize(WIDE, tmp_path / "skewed", num_layers=6, format=format, skew=True)
    _, even, _ = forward(tmp_path / "even")
    hidden, skewed, _ = forward(tmp_path / "skewed")
    for uniform, real in zip(even, skewed, strict=True):
        assert shares(uniform)[0] < 0.26 and shares(uniform)[1] == 64
        assert 0.28 < shares(real)[0] < 0.55 and shares(real)[1] > 40
        popularity = real.mean(0).std() / real.std(0).mean()
        assert 0.3 < float(popularity) < 0.65  # the deviation that the module's text gives, and some noise
    favourites = [set(real.mean(0).topk(8).indices.tolist()) for real in skewed]
    assert len(set.union(*favourites)) > 16  # each layer has its own
    for x in hidden:  # the constant arrives everywhere as it was put in
        assert torch.equal(x[:, :32], hidden[0][:1, :1].expand(len(x), 32))


@pytest.mark.parametrize("format", ["q4", "q8", "bf16"])
def test_drawn_codes_have_the_size_of_drawn_numbers(tmp_path: Path, format: str) -> None:
    synthesize(WIDE, tmp_path / "m", num_layers=4, format=format)
    for name, parameter in load_dequantized(tmp_path / "m").named_parameters():
        if parameter.dim() == 1 or name.endswith(("conv_weight", "shared_gate.weight")):
            continue
        gain = {"embedding": 16.0, "router": 2.0, "head": 2.5, "w2": 0.5, "out_proj": 0.5}
        wanted = next((g for mark, g in gain.items() if mark in name), 1.0) / parameter.shape[-1] ** 0.5
        assert float(parameter.std()) == pytest.approx(wanted, rel=0.1), name
        assert abs(float(parameter.mean())) < 0.1 * wanted, name


def test_the_first_layers_keep_their_kinds(tmp_path: Path) -> None:
    report = synthesize(WIDE, tmp_path / "m", num_layers=5)
    packed = PackedFile.open(tmp_path / "m")
    assert packed.blob("embedding.weight") == report.blobs["embedding.weight"]
    assert list(report.blobs) == packed.names()
    assert packed.config.layers == ModelConfig.from_dict(WIDE).layers[:5]
    assert packed.files() == {} and "uniform" in packed.metadata["source"]


def test_configs_that_nest_or_list_their_layers() -> None:
    kinds = ["linear_attention", "full_attention"] * 2
    text = {**CONFIGS["hybrid"], "model_type": "qwen3_5_moe_text", "layer_types": kinds}
    nested = {"model_type": "qwen3_5_moe", "text_config": text, "quantization_config": {}}
    cut = first_layers(nested, 3)
    assert cut["text_config"]["layer_types"] == kinds[:3] and cut["text_config"]["num_hidden_layers"] == 3
    assert "quantization_config" not in cut and text["layer_types"] == kinds
    assert first_layers(CONFIGS["hybrid"], None) == CONFIGS["hybrid"]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_awkward_sizes_hold_what_they_should(tmp_path: Path, kind: str) -> None:
    for skew in (False, True):
        report = synthesize(CONFIGS[kind], tmp_path / str(skew), skew=skew)
        config = PackedFile.open(report.path).config
        assert report.blobs == tensor_blobs(config, config.num_mtp_layers or 0, QuantRecipe.find("q4"))
        assert bool(torch.isfinite(forward(report.path, 20)[2]).all())


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesize(CONFIGS["hybrid"], tmp_path / name, seed=seed)
    first, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == same != other


class Killed(Exception):
    pass


def test_it_goes_on_and_counts(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if 2 * done > total:
            raise Killed

    with pytest.raises(Killed):
        synthesize(CONFIGS["hybrid"], tmp_path / "m", progress=interrupt)
    report = synthesize(CONFIGS["hybrid"], tmp_path / "m", progress=lambda *pair: seen.append(pair))
    assert report.resumed > 0 and seen[-1][0] == seen[-1][1]
    synthesize(CONFIGS["hybrid"], tmp_path / "whole")
    assert (tmp_path / "m").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(CheckpointError, match="there already"):
        synthesize(CONFIGS["hybrid"], tmp_path / "m")


@pytest.mark.parametrize("options", [{"num_layers": 5}, {"num_layers": 0}, {"format": "q5"}])
def test_bad_arguments(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        synthesize(CONFIGS["hybrid"], tmp_path / "m", **options)
