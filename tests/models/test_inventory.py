"""The list of parameters equals the parameters of the real modules, for every family."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from godwit.config import ModelConfig
from godwit.errors import CheckpointError, UnsupportedModelError
from godwit.models.causal_lm import CausalLM
from godwit.models.inventory import PARTS, Parameter, count_mtp, parameters
from tests.engine.tiny import CONFIGS
from tests.models.families import FAMILIES, Family


def config_of(family: Family) -> ModelConfig:
    return ModelConfig.from_dict({"model_type": family.model_type, **family.fields})


@pytest.mark.parametrize("num_mtp", [0, 1])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_and_shapes_are_those_of_the_modules_in_their_order(family: Family, num_mtp: int) -> None:
    config = config_of(family)
    with torch.device("meta"):
        model = CausalLM(config, num_mtp)
    wanted = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(p.name, p.shape) for p in parameters(config, num_mtp)] == wanted
    assert count_mtp(name for name, _ in wanted) == num_mtp


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_parts_and_layers(family: Family) -> None:
    config = config_of(family)
    found = parameters(config, 1)
    assert {p.part for p in found} <= PARTS.keys()
    assert ("head" in {p.part for p in found}) is not config.tie_embeddings
    for p in found:
        top, *rest = p.name.split(".")
        assert p.layer == (int(rest[0]) if top == "layers" else None)
        assert (p.part == "mtp") is (top == "mtp")
    for index, layer in enumerate(config.layers):
        parts = {p.part for p in found if p.layer == index}
        ffn = {"routers", "experts"} if layer.ffn.num_experts else {"dense"}
        ffn |= {"shared"} if layer.ffn.shared_intermediate else set()
        assert parts == {layer.mixer.part, "norms"} | ffn


def test_what_a_token_reads() -> None:
    config = ModelConfig.from_dict(CONFIGS["hybrid"])
    found = {p.name: p for p in parameters(config, 1)}
    experts = found["layers.0.ffn.experts.w13"]
    assert (experts.shape, experts.top_k, experts.active) == ((4, 32, 32), 2, experts.count // 2)
    assert found["layers.3.mixer.in_proj.weight"].active == found["layers.3.mixer.in_proj.weight"].count
    assert found["embedding.weight"].active == found["mtp.fc.weight"].active == 0
    assert found["mtp.layers.0.ffn.experts.w2"].active == 0 < found["mtp.layers.0.ffn.experts.w2"].top_k
    assert found["head.weight"].active == found["head.weight"].count


def test_what_packing_replaces() -> None:
    found = parameters(ModelConfig.from_dict(CONFIGS["hybrid"]), 0)
    plain = Counter(p.name.split(".")[-1] for p in found if not p.is_matrix and not p.top_k and p.layer == 0)
    assert plain == {"weight": 3, "conv_weight": 1, "A_log": 1, "dt_bias": 1, "norm_weight": 1}
    assert {p.packed_name for p in found if p.top_k} == {f"layers.{i}.ffn.experts" for i in range(4)}
    assert all(p.packed_name == p.name for p in found if not p.top_k)
    assert not Parameter("layers.0.ffn.shared_gate.weight", (1, 8), "shared", 0).is_matrix


def test_what_cannot_be() -> None:
    with pytest.raises(UnsupportedModelError, match="full-attention layer"):
        parameters(ModelConfig.from_dict(CONFIGS["delta"]), 1)
    huge = {**CONFIGS["attention"], "hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1}
    with pytest.raises(CheckpointError, match="too large for any machine"):
        parameters(ModelConfig.from_dict(huge), 0)
