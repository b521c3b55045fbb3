"""Optimisers: AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from godwit.train import parallel
from godwit.train.recipe import Recipe


class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz steps (Jordan et al. 2024); each matrix of a stack separately.

    Updates are scaled to the size of an AdamW update, ``0.2 sqrt(max(rows, cols))`` (Liu et al. 2025), so
    that one learning rate suits both.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient are skipped."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if "momentum" not in self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
            for param, update in zip(params, self._updates(params, group["momentum"]), strict=True):
                size = max(param.shape[-2:])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update.to(param.dtype), alpha=-group["lr"] * 0.2 * size**0.5)

    def _updates(self, params: list[nn.Parameter], momentum: float) -> list[Tensor]:
        """Each process orthogonalises its share; all keep the momentum, so that any of them can save it."""
        updates = []
        for index, param in enumerate(params):
            buffer = self.state[param]["momentum"]
            buffer.lerp_(param.grad, 1 - momentum)
            if index % parallel.world_size() == parallel.rank():
                ahead = torch.lerp(param.grad, buffer, momentum)  # type: ignore[arg-type]
                updates.append(orthogonalize(ahead).contiguous())
            else:
                updates.append(torch.empty_like(param, dtype=torch.bfloat16))
        for index, update in enumerate(updates):
            parallel.share(update, index % parallel.world_size())
        return updates


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate ``U V^T`` of the singular value decomposition of ``[..., rows, cols]``, in bfloat16."""
    x = matrix.to(torch.bfloat16)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    norm: Tensor = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm + 1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[Optimizer]:
    """Optimisers for all parameters; weight decay applies to matrices, not to vectors and embeddings."""
    matrices, embeddings, vectors = [], [], []
    for name, param in model.named_parameters():
        if param.ndim < 2 or name.endswith("conv_weight"):
            vectors.append(param)
        elif name.startswith(("embedding.", "head.")) or ".router." in name or ".shared_gate." in name:
            embeddings.append(param)
        else:
            matrices.append(param)
    betas = (recipe.beta1, recipe.beta2)
    adam_groups: list[dict[str, Any]] = [
        {"params": embeddings, "weight_decay": 0.0},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = []
    if recipe.optimizer == "muon":
        optimizers.append(Muon(matrices, recipe.learning_rate, recipe.weight_decay))
    else:
        adam_groups.append({"params": matrices, "weight_decay": recipe.weight_decay})
    optimizers.append(
        torch.optim.AdamW(adam_groups, lr=recipe.learning_rate, betas=betas, eps=1e-8, fused=True)
    )
    return optimizers
