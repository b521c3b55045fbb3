"""Quality loss of a changed model: compare its predictions with the original's on the same text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from godwit.errors import UsageError
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.models.caches import Caches
from godwit.models.causal_lm import CausalLM

WINDOW = 512  # tokens per step
CONTEXT = 4096  # tokens after which a new context starts
_ROWS = 64  # logits computed at a time, as the vocabulary may be large


@dataclass(frozen=True)
class Quality:
    """How far the predictions differ, over all tokens but the first of each context.

    Attributes:
        tokens: predicted.
        perplexity: of the original.
        perplexity_changed: of the changed model.
        kl: mean Kullback-Leibler divergence of the changed distribution from the original, in nats.
        kl_99: its 99th percentile over the tokens.
        same_top: share of tokens where both models have the same most likely one.
    """

    tokens: int
    perplexity: float
    perplexity_changed: float
    kl: float
    kl_99: float
    same_top: float


@torch.no_grad()
def compare(
    original: CausalLM,
    changed: CausalLM,
    ids: Sequence[int],
    *,
    window: int = WINDOW,
    context: int = CONTEXT,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Read ``ids`` with both models, in steps of ``window`` tokens with caches.

    Args:
        original: the reference.
        changed: the same model in another form.
        ids: a text in the vocabulary of both.
        window: tokens per step.
        context: tokens after which both start a new context.
        progress: called with (tokens done, total tokens).

    Raises:
        UsageError: fewer than two tokens.
    """
    if len(ids) < 2:
        raise UsageError("the text needs at least two tokens")
    readers = [_CachedReader(model, min(context, len(ids))) for model in (original, changed)]
    found: list[Tensor] = []
    for begin in range(0, len(ids), context):
        text = ids[begin : begin + context]
        for reader in readers:
            reader.forget()
        for at in range(0, len(text), window):
            targets = torch.tensor(text[at + 1 : at + window + 1], dtype=torch.long)
            first, second = (reader.read(text[at : at + window])[: len(targets)] for reader in readers)
            for row in range(0, len(targets), _ROWS):
                rows = torch.arange(row, min(row + _ROWS, len(targets)))
                logits = original.compute_logits(first, rows), changed.compute_logits(second, rows)
                found.append(_differences(*logits, targets[rows]))
            if progress is not None:
                progress(begin + at + min(window, len(text) - at), len(ids))
    return _summary(torch.cat(found, 1))


class _CachedReader:
    """A model with caches for one sequence."""

    def __init__(self, model: CausalLM, context: int) -> None:
        self.model = model
        self.blocks = list(range(-(-context // BLOCK_SIZE)))
        self.caches: Caches = model.allocate_caches(len(self.blocks))
        self.past = 0

    def forget(self) -> None:
        self.past = 0
        self.caches.reset_row(0)

    def read(self, ids: Sequence[int]) -> Tensor:
        batch = ForwardBatch.cached([ids], [self.past], [self.blocks], [0], device=self.model.device)
        self.past += len(ids)
        hidden: Tensor = self.model(batch, self.caches)
        return hidden


def _differences(first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
    """Rows: both losses, KL divergence, whether the most likely token is the same; ``[4, T]`` float64."""
    p, q = (logits.cpu().float().log_softmax(-1) for logits in (first, second))
    kl = (p.exp() * (p - q)).sum(-1)
    losses = (-x.gather(1, targets[:, None]).squeeze(1) for x in (p, q))
    return torch.stack((*losses, kl, (p.argmax(-1) == q.argmax(-1)).float())).double()


def _summary(found: Tensor) -> Quality:
    loss, changed, kl, same = found.mean(1).tolist()
    return Quality(
        tokens=found.shape[1],
        perplexity=math.exp(loss),
        perplexity_changed=math.exp(changed),
        kl=kl,
        kl_99=float(found[2].sort().values[math.ceil(0.99 * found.shape[1]) - 1]),
        same_top=same,
    )
