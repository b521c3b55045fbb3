"""Fill-in-the-middle: prompts from the text before and after the one that the model is to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from godwit.text.tokenizer import Tokenizer

#: The tokens before the prefix, the suffix and the answer, in several families of models.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
#: These end the answer: the next file or padding follows.
_ENDS = ("<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<fim_pad>", "<file_sep>", "<|endoftext|>")


@dataclass(frozen=True)
class Fim:
    """The control tokens of a fill-in-the-middle model.

    Attributes:
        prefix, suffix, middle: open the parts of a prompt, in this order.
        ends: tokens that end an answer.
    """

    prefix: int
    suffix: int
    middle: int
    ends: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Tokenizer) -> Fim | None:
        """Those of a tokenizer, if it has any."""
        for family in _FAMILIES:
            ids = [id for name in family if (id := tokenizer.token_to_id(name)) is not None]
            if len(ids) == len(family):
                others = [id for name in _ENDS if (id := tokenizer.token_to_id(name)) is not None]
                return Fim(ids[0], ids[1], ids[2], (*ids, *others))
        return None

    def prompt(self, before: Sequence[int], behind: Sequence[int]) -> tuple[int, ...]:
        """The prompt for the gap between two texts."""
        return (self.prefix, *before, self.suffix, *behind, self.middle)
