"""Naive generation, which recomputes the whole sequence at every step: the reference for faster methods."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from godwit.errors import UsageError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM


def argmax(logits: Tensor) -> int:
    """The id of the largest of ``logits [V]``, the lowest if several are equal."""
    return int(logits.argmax())


@torch.no_grad()
def generate(
    model: CausalLM,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    pick: Callable[[Tensor], int] = argmax,
    stop_ids: Collection[int] = frozenset(),
) -> list[int]:
    """Continue ``prompt_ids`` without any cache.

    Args:
        model: any supported family; the work grows with the square of the length.
        prompt_ids: at least one token.
        max_tokens: the most tokens to add.
        pick: chooses the next id from logits ``[V]`` in the activation dtype.
        stop_ids: ids that end the text.

    Returns:
        The new ids, including the one of ``stop_ids`` that ended them, if any.

    Raises:
        UsageError: an empty prompt.
    """
    if not prompt_ids:
        raise UsageError("the prompt is empty; give at least one token")
    ids, made = list(prompt_ids), list[int]()
    while len(made) < max_tokens:
        batch = ForwardBatch.packed(torch.tensor(ids, device=model.device), [len(ids)])
        token = pick(model.compute_logits(model(batch), batch.last_rows)[0])
        ids.append(token)
        made.append(token)
        if token in stop_ids:
            break
    return made
