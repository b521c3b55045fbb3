"""Losses of a packed batch: next token, token after next (MTP), expert balance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, *, pooled: bool = True) -> Tensor:
    """Switch-style balance loss, ``E * sum_e f_e P_e``; equals ``top_k`` when perfectly balanced.

    Args:
        router_logits: ``[T, E]`` of every sparse layer.
        top_k: experts of a token.
        pooled: one f and P over all layers, as ``transformers`` computes it; else the mean of per-layer losses, which
            keeps the experts of every single layer busy.
    """
    groups = [torch.cat(list(router_logits))] if pooled else list(router_logits)
    return torch.stack([_balance(logits, top_k) for logits in groups]).mean()


def _balance(logits: Tensor, top_k: int) -> Tensor:
    probs = logits.float().softmax(-1)
    ids = probs.topk(top_k, -1).indices
    share = ids.flatten().bincount(minlength=logits.shape[-1]).to(probs.dtype) / logits.shape[0]
    return logits.shape[-1] * (share * probs.mean(0)).sum()


def expert_balance(router_logits: Sequence[Tensor], top_k: int) -> float:
    """Load of the busiest expert over the mean load, averaged over layers; 1 is perfect."""
    worst = []
    for logits in router_logits:
        counts = logits.detach().topk(top_k, -1).indices.flatten().bincount(minlength=logits.shape[-1]).float()
        worst.append(float(counts.max() / counts.mean()))
    return sum(worst) / len(worst) if worst else 1.0


def role_weights(roles: Tensor, weights: Sequence[float]) -> Tensor:
    """Loss weight of each target from its role code; code 3 (no target) weighs nothing."""
    return torch.tensor([*weights, 0.0], device=roles.device)[roles]
