"""How likely the model itself finds a prompt, token by token, while it is read."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from godwit.engine.sampling import TokenLogprobs
from godwit.models.causal_lm import CausalLM

#: Rows of logits at a time: with a large vocabulary, those of a whole step would take hundreds of megabytes.
ROWS = 32


class PromptScores:
    """The probabilities of a prompt's tokens, in whatever pieces it is read.

    Args:
        ids: the prompt.
        vocab_size: ids below this exist.
        num_top: report so many of the likeliest tokens, too.

    Attributes:
        complete: all are known.
    """

    def __init__(self, ids: Seq[int], vocab_size: int, num_top: int) -> None:
        self._ids = ids
        self._vocab_size = vocab_size
        self._num_top = num_top
        self._known: list[TokenLogprobs | None] = [None]  # nothing precedes the first token

    @property
    def complete(self) -> bool:
        return len(self._known) == len(self._ids)

    def read(self, model: CausalLM, first: int, hidden: Tensor) -> None:
        """Take in ``hidden [T, H]``, the trunk's output for the tokens from ``first`` on.

        What is known already, from before the request had to make room for others, is passed over.
        """
        begin, end = len(self._known) - 1, min(first + len(hidden), len(self._ids) - 1)
        with torch.inference_mode():
            for start in range(begin, end, ROWS):
                rows = hidden[start - first : min(start + ROWS, end) - first]
                for row, token in zip(model.compute_logits(rows), self._ids[start + 1 :], strict=False):
                    self._known.append(TokenLogprobs.of(row, self._vocab_size, token, self._num_top))

    def whole(self) -> tuple[TokenLogprobs | None, ...]:
        """One entry for each token, that of the first None."""
        return tuple(self._known)
