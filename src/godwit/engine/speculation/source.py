"""DraftSource: where drafts come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from torch import Tensor

from godwit.engine.scheduler import Sequence, Work
from godwit.models.batch import ForwardBatch


class DraftSource(ABC):
    """Drafts tokens for sequences all tokens of which but the newest are computed."""

    @abstractmethod
    def rates(self, seq: Sequence, limit: int) -> list[float]:
        """For up to ``limit`` drafts the probability that each is accepted if those before it are."""

    def catch_up(self, seqs: Iterable[Sequence]) -> bool:
        """Do what has to be done once before drafting can begin; whether there was anything to do."""
        return False

    @abstractmethod
    def draft(self, depths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Up to so many drafts for sequences that have rates."""

    def judge(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:  # noqa: B027
        """Learn how many drafts of a step the model agreed with."""

    def record(  # noqa: B027
        self, works: Seq[Work], kept: Seq[int], batch: ForwardBatch, hidden: Tensor
    ) -> None:
        """Note a step: of each work's tokens so many stay; ``hidden [T, H]`` is the trunk's output."""

    @abstractmethod
    def forget(self, seq: Sequence) -> None:
        """The sequence has ended or lost its place in the caches."""
