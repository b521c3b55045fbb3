"""How far float32 explains that two ways of computing the same differ, whatever the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from godwit.models.causal_lm import CausalLM


@torch.no_grad()
def rounding(model: CausalLM, run: Callable[[CausalLM], Tensor]) -> Tensor:
    """A tolerance for each row ``[T]`` of what ``run`` computes, ``[T, N]``.

    As far as the row moves when each weight changes by up to half its last bit, the most of a few trials;
    times 16, since products and sums are rounded, too, not the weights alone.
    """
    wanted, moves = run(model), []
    for seed in range(3):
        other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        for parameter in other.parameters():
            parameter.mul_(1 + 2.0**-24 * (2 * torch.rand(parameter.shape, generator=generator) - 1))
        moves.append((run(other) - wanted).abs().amax(-1))
    return 16 * torch.stack(moves).amax(0)
