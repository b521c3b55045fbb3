"""Filling gaps: a prompt of what stands before and after the text that the model is to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from godwit.tokenizer import Tokenizer

#: What opens the text before the gap, the text behind it, and the answer, in several families of models.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
#: After these the answer is over: the next file would begin, or padding.
_ENDS = ("<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<fim_pad>", "<file_sep>", "<|endoftext|>")


@dataclass(frozen=True)
class Fim:
    """The control tokens of a model that fills gaps.

    Attributes:
        prefix, suffix, middle: open the parts of a prompt, in this order.
        ends: tokens with which an answer ends.
    """

    prefix: int
    suffix: int
    middle: int
    ends: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Tokenizer) -> Fim | None:
        """Those of a tokenizer; None where it has none."""
        for family in _FAMILIES:
            ids = [id for name in family if (id := tokenizer.token_to_id(name)) is not None]
            if len(ids) == len(family):
                others = [id for name in _ENDS if (id := tokenizer.token_to_id(name)) is not None]
                return Fim(ids[0], ids[1], ids[2], (*ids, *others))
        return None

    def prompt(self, before: Sequence[int], behind: Sequence[int]) -> tuple[int, ...]:
        """The prompt for a gap between two texts."""
        return (self.prefix, *before, self.suffix, *behind, self.middle)
