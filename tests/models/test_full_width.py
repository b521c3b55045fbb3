"""Layers at the width of Qwen3-Next-80B-A3B in bfloat16, the format it is published in.

Only the number of experts is smaller (64 for 512): with all of them one layer, twice, would take 6.4 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model
from tests.models.families import Family
from tests.models.harness import build_reference

HIDDEN = 2048
TOKENS = 80  # a chunk of the delta rule and a part of the next
FAMILY = Family(
    "full width",
    "qwen3_next",
    {
        "vocab_size": 257,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "intermediate_size": 5120,
        "mlp_only_layers": [1],
        "num_experts": 64,
        "max_position_embeddings": 262144,
        "rope_theta": 1e7,
        "bos_token_id": None,
        "eos_token_id": None,
    },
)
#: One rounding to bfloat16 (8 bits) moves a number by at most this share of it.
UNIT = 2.0**-9


def tolerance(roundings: int) -> float:
    """Accepted distance of two results, as a share of the norm.

    Both round their intermediate results ``roundings`` times on the longest path. Where sums were added in
    another order a value may fall on the other side of a rounding border, and then the two differ by one
    step, 2 UNIT. Were every number affected by every rounding, independent steps would add up like a random
    walk, to ``2 UNIT sqrt(roundings)``. Most numbers are not affected, which leaves room for steps in between
    that enlarge relative differences (norms of small head outputs, differences of nearly equal numbers).
    """
    return 2 * UNIT * math.sqrt(roundings)


@dataclass(frozen=True)
class Models:
    reference: Any
    model: CausalLM
    x: Tensor

    @property
    def batch(self) -> ForwardBatch:
        return ForwardBatch.packed(torch.zeros(TOKENS, dtype=torch.long), [TOKENS])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        reference = build_reference(FAMILY, torch.bfloat16)
    reference.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            fill(name, parameter, generator)
    for module in reference.modules():  # buffers are not saved and to_empty left them unset
        if type(module).__name__ == "Qwen3NextRotaryEmbedding":
            module.inv_freq = type(module)(reference.config).inv_freq
    path = tmp_path_factory.mktemp("full_width")
    reference.save_pretrained(path)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    with torch.no_grad():
        yield Models(reference, load_model(path), x)


def fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """As trained ones in scale; the experts repeat one random matrix, rolled, which is quicker to make."""
    if "A_log" in name:
        parameter.uniform_(-6.0, 1.0, generator=generator)
    elif parameter.ndim == 1:
        neutral = 0.0 if "layernorm" in name or "_norm" in name or name == "model.norm.weight" else 1.0
        parameter.normal_(neutral, 0.1, generator=generator)
    elif parameter.ndim == 3 and "experts" in name:
        parameter[0].normal_(0.0, 0.02, generator=generator)
        for expert in range(1, parameter.shape[0]):
            parameter[expert] = parameter[0].roll((expert, 3 * expert), (0, 1))
    else:
        parameter.normal_(0.0, 0.3 if "conv" in name else 0.02, generator=generator)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def our_layer(models: Models, index: int) -> Any:
    return models.model.layers[index]


def reference_layer(models: Models, index: int) -> Any:
    return models.reference.model.layers[index]


def rotary(models: Models) -> tuple[Tensor, Tensor]:
    embedding: nn.Module = models.reference.model.rotary_emb
    cos, sin = embedding(models.x[None], torch.arange(TOKENS)[None])
    return cos, sin


def causal_mask() -> Tensor:
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return torch.zeros(TOKENS, TOKENS).masked_fill(~allowed, float("-inf")).bfloat16()[None, None]


def test_delta_mixer(models: Models) -> None:
    """Roundings: projection, convolution, SiLU, beta, head output, three in the gated norm, projection."""
    ours = our_layer(models, 0).mixer(models.x, models.batch, None, None)
    theirs = reference_layer(models, 0).linear_attn(models.x[None])[0]
    assert distance(ours, theirs) < tolerance(9)


def test_attention_mixer(models: Models) -> None:
    """Roundings: projection, norm, two products and a sum in the rotation, scores, probabilities, mixture,
    gate and its product, output projection."""
    ours = our_layer(models, 1).mixer(models.x, models.batch, None, None)
    theirs = reference_layer(models, 1).self_attn(models.x[None], rotary(models), causal_mask())[0][0]
    assert distance(ours, theirs) < tolerance(11)


def settled(logits: Tensor, top_k: int) -> Tensor:
    """Tokens whose choice of experts one step of rounding cannot change ``[T]``."""
    ranked = logits.float().sort(descending=True).values
    gap = ranked[:, top_k - 1] - ranked[:, top_k]
    return gap > 2 * 2 * UNIT * ranked[:, top_k - 1].abs()


def test_experts(models: Models) -> None:
    """Roundings: router logits, weights, gate and up, SiLU, product, down, weighting, sum, shared gate, its
    product, the sum of both. The reference adds ten results one by one (ten roundings), we at once."""
    ours = our_layer(models, 0).ffn
    collected: list[Tensor] = []
    out = ours(models.x, collected)
    expected = reference_layer(models, 0).mlp(models.x[None])[0]
    keep = settled(collected[0], 10)
    assert int(keep.sum()) > TOKENS // 2
    assert distance(out[keep], expected[keep]) < tolerance(11 + 10)


def test_dense_feed_forward(models: Models) -> None:
    """Roundings: gate and up, SiLU, product, down."""
    ours = our_layer(models, 1).ffn(models.x)
    assert distance(ours, reference_layer(models, 1).mlp(models.x[None])[0]) < tolerance(5)


def test_whole_layers(models: Models) -> None:
    """The mixers' roundings, two norms, two residual sums and the feed-forward part's.

    The residual carries most of the norm, so the bound is generous; what the parts add has its own tests.
    """
    ours = our_layer(models, 1)(models.x, models.batch)
    theirs = reference_layer(models, 1)(
        models.x[None], position_embeddings=rotary(models), attention_mask=causal_mask()
    )
    assert distance(ours, theirs[0]) < tolerance(11 + 4 + 5)


def test_roundings_are_those_of_the_reference(models: Models) -> None:
    """Both are as far from the same layer in float32: no rounding too many, none too few."""
    layer = our_layer(models, 0)
    x = models.x
    ours = layer.mixer(x, models.batch, None, None)
    theirs = reference_layer(models, 0).linear_attn(x[None])[0]
    exact = layer.mixer.float()(x.float(), models.batch, None, None)
    layer.mixer.bfloat16()
    assert 0.8 < distance(ours, exact) / distance(theirs, exact) < 1.25
