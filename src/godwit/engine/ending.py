"""Which tokens end an answer, and when they may."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from godwit.engine.sampling import SamplingParams


class Ending:
    """The tokens that end one answer.

    Args:
        params: of these, ``ignore_eos``, ``min_tokens`` and ``stop_token_ids`` matter here.
        stop_ids: the model's own stop tokens.
        vocab_size: ids below this can be chosen.
    """

    def __init__(self, params: SamplingParams, stop_ids: Collection[int], vocab_size: int) -> None:
        own = () if params.ignore_eos else stop_ids
        self._ids = frozenset((*own, *params.stop_token_ids))
        self._min_tokens = params.min_tokens
        self._banned = sorted(id for id in self._ids if id < vocab_size) if params.min_tokens else []
        self._vocab_size = vocab_size

    def ends(self, token: int) -> bool:
        """Whether this token ends the answer."""
        return token in self._ids

    def too_early(self, num_made: int) -> bool:
        """Whether an answer of ``num_made`` tokens must go on."""
        return num_made < self._min_tokens

    def allowed(self, num_made: int, allowed: Tensor | None) -> Tensor | None:
        """The tokens that may follow ``num_made`` tokens, bool ``[vocab_size]``; None: all.

        If the constraint allows only the end of the answer, the answer may end.

        Args:
            num_made: number of tokens of the answer.
            allowed: tokens that a constraint allows; None: all.
        """
        if not self._banned or not self.too_early(num_made):
            return allowed
        left = torch.ones(self._vocab_size, dtype=torch.bool) if allowed is None else allowed.clone()
        left[self._banned] = False
        return left if bool(left.any()) else allowed
