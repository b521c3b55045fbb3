"""Log probabilities of a prompt's tokens, computed while it is read."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from godwit.engine.sampling import TokenLogprobs
from godwit.models.causal_lm import CausalLM

#: Rows of logits at a time; with a large vocabulary, those of a whole step take hundreds of megabytes.
ROWS = 32


class PromptScores:
    """The log probabilities of a prompt's tokens; the prompt may be read in any pieces.

    Args:
        ids: the prompt.
        vocab_size: number of ids.
        num_top: report this many of the likeliest tokens, too.
    """

    def __init__(self, ids: Seq[int], vocab_size: int, num_top: int) -> None:
        self._ids = ids
        self._vocab_size = vocab_size
        self._num_top = num_top
        self._known: list[TokenLogprobs | None] = [None]  # nothing precedes the first token

    @property
    def complete(self) -> bool:
        """Whether all are known."""
        return len(self._known) == len(self._ids)

    def read(self, model: CausalLM, first: int, hidden: Tensor) -> None:
        """Take in ``hidden [T, H]``, the trunk's output for the tokens from ``first`` on.

        Tokens scored before a preemption are skipped.
        """
        begin, end = len(self._known) - 1, min(first + len(hidden), len(self._ids) - 1)
        with torch.inference_mode():
            for start in range(begin, end, ROWS):
                rows = hidden[start - first : min(start + ROWS, end) - first]
                for row, token in zip(model.compute_logits(rows), self._ids[start + 1 :], strict=False):
                    self._known.append(TokenLogprobs.of(row, self._vocab_size, token, self._num_top))

    def whole(self) -> tuple[TokenLogprobs | None, ...]:
        """One entry per token, None for the first."""
        return tuple(self._known)
