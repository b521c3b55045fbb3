"""Muon's orthogonal updates, and which optimiser gets what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from godwit.config import ModelConfig
from godwit.models.causal_lm import CausalLM
from godwit.train.optim import Muon, build_optimizers, orthogonalize
from tests.train.conftest import MakeRecipe
from tests.train.micro import MODEL


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48), (3, 32, 64), (2, 3, 64, 32), (1, 16)])
def test_singular_values_are_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    # The quintic of Jordan et al. settles between 0.7 and 1.2; the least values of square noise are too small
    # for five steps to lift.
    assert float(values.max()) < 1.3 and float(values.median()) > 0.6
    assert shape == (48, 48) or float(values.min()) > 0.6


def test_directions_are_kept() -> None:
    matrix = torch.randn(16, 40)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalize(matrix).float()
    core = u.T @ made @ vh.T
    assert float((core - core.diag().diag()).abs().max()) < 0.1
    torch.testing.assert_close(made, u @ vh, atol=0.15, rtol=0)


def test_stacked_matrices_are_treated_one_by_one() -> None:
    stack = torch.randn(4, 24, 8) * torch.tensor([1e-3, 1.0, 10.0, 1e3])[:, None, None]
    apart = torch.stack([orthogonalize(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), apart, atol=0.05, rtol=0)


def test_nothing_stays_nothing() -> None:
    assert not orthogonalize(torch.zeros(4, 8)).any()


def test_a_step_of_muon() -> None:
    param = nn.Parameter(torch.randn(8, 32))
    before = param.detach().clone()
    param.grad = torch.randn(8, 32)
    idle = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([param, idle], lr=0.1, weight_decay=0.5)
    optimizer.step()
    # With the first momentum, a twentieth of the gradient, the update has the direction of the gradient
    # itself, up to the roundings of bfloat16.
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 32**0.5 * orthogonalize(param.grad).float()
    torch.testing.assert_close(param.detach(), expected, atol=0.1 * 0.2 * 32**0.5 * 2**-5, rtol=0)
    assert torch.equal(idle.detach(), torch.ones(2, 2)) and idle not in optimizer.state


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimiser(make_recipe: MakeRecipe, name: str) -> None:
    model = CausalLM(ModelConfig.from_dict(MODEL), 1)
    optimizers = build_optimizers(model, make_recipe(optimizer=name, weight_decay=0.3))
    owners: dict[int, tuple[str, float]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                assert id(param) not in owners
                owners[id(param)] = type(optimizer).__name__, group["weight_decay"]
    kinds = {name: owners[id(param)] for name, param in model.named_parameters()}
    assert len(kinds) == len(owners)
    hidden = ("Muon" if name == "muon" else "AdamW", 0.3)
    assert kinds["embedding.weight"] == ("AdamW", 0.0)
    assert kinds["layers.0.ffn.router.weight"] == ("AdamW", 0.0)
    assert kinds["layers.0.mixer.A_log"] == kinds["layers.0.mixer.conv_weight"] == ("AdamW", 0.0)
    assert kinds["layers.0.ffn.experts.w13"] == kinds["layers.3.mixer.in_proj.weight"] == hidden
    assert kinds["mtp.fc.weight"] == hidden
