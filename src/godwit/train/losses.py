"""Expert balance loss, and loss weights by role."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ExpertLoad:
    """How often each expert has been chosen in a step so far, per layer (or once, for all layers pooled)."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []  # [E] for each layer
        self.num_tokens: list[int] = []

    def add(self, layer: int, ids: Tensor, num_experts: int) -> Tensor:
        """Count ``ids [T, k]``; return the share of all tokens so far that chose each expert, ``[E]``."""
        if layer == len(self.counts):
            self.counts.append(ids.new_zeros(num_experts))
            self.num_tokens.append(0)
        self.counts[layer] += ids.flatten().bincount(minlength=num_experts)
        self.num_tokens[layer] += ids.shape[0]
        return self.counts[layer].float() / self.num_tokens[layer]


def load_balancing_loss(
    router_logits: Sequence[Tensor], top_k: int, *, pooled: bool = True, load: ExpertLoad | None = None
) -> Tensor:
    """Switch-style balance loss, ``E * sum_e f_e P_e``; equals ``top_k`` when perfectly balanced.

    Args:
        router_logits: ``[T, E]`` of every sparse layer.
        top_k: experts per token.
        pooled: one f and P over all layers, as ``transformers`` computes it; otherwise the mean of per-layer
            losses, which balances the experts of each layer.
        load: counts of the step's earlier micro-batches, which f includes; updated in place. P, which
            carries the gradient, always comes from these logits alone. None: so does f.
    """
    load = ExpertLoad() if load is None else load
    losses = []
    for layer, logits in enumerate([torch.cat(list(router_logits))] if pooled else router_logits):
        probs = logits.float().softmax(-1)
        share = load.add(layer, probs.topk(top_k, -1).indices, logits.shape[-1])
        losses.append(logits.shape[-1] * (share * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def expert_balance(load: ExpertLoad) -> float:
    """Load of the busiest expert relative to the mean load, averaged over layers; 1 is perfect."""
    worst = [float(counts.max() / counts.float().mean()) for counts in load.counts]
    return sum(worst) / len(worst) if worst else 1.0


def role_weights(roles: Tensor, weights: Sequence[float]) -> Tensor:
    """Loss weight of each target by its role code (0 to 3); code 4 (no target) weighs zero."""
    return torch.tensor([*weights, 0.0], device=roles.device)[roles]
