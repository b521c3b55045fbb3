"""EngineCore: what the engine does between two looks at its inbox. Not for several threads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from torch import Tensor

from godwit.engine.cache import CacheSize, num_blocks
from godwit.engine.generation import Generation
from godwit.engine.masks import MaskPool, wait_for_any
from godwit.engine.runner import ModelRunner
from godwit.engine.sampling import Row, as_rows
from godwit.engine.scheduler import Scheduler, Sequence, Work
from godwit.engine.spill import DiskCache
from godwit.engine.stream import Reason
from godwit.errors import GodwitError, MemoryBudgetError, UsageError
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.models.causal_lm import CausalLM

#: Tokens of prompts that a step may read in any case.
MIN_PREFILL = 32
#: Seconds that a step waits for the masks of forms; answers whose masks take longer miss steps.
MASK_SECONDS = 0.05
#: Share of the newest step in the measured time of a token.
_NEWEST = 0.25

_log = logging.getLogger(__name__)


class Drafter(Protocol):
    """Guesses tokens, which the model then verifies several at a time; the answers stay the same.

    A step is: :meth:`wants`, :meth:`propose` if so, :meth:`observe`.
    """

    def start(self, runner: ModelRunner) -> None:
        """New caches: what was known of sequences is void."""
        ...

    def wants(self, num_sequences: int) -> bool:
        """Whether to ask for drafts in the step that begins, while so many sequences run; quick."""
        ...

    def propose(self, limits: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """For each answer under way up to so many tokens that may follow its ids."""
        ...

    def observe(self, works: Seq[Work], kept: Seq[int], batch: ForwardBatch, hidden: Tensor) -> None:
        """A step is done: of each work's tokens so many were true; ``hidden [T, H]`` is the trunk's output.

        A work whose sequence has no slot any more has ended.
        """
        ...

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended, or lost its place in the caches for now."""
        ...


@dataclass(frozen=True)
class CoreSettings:
    """How an engine works; see :class:`~godwit.engine.engine.Engine`."""

    num_blocks: int
    num_rows: int
    max_rollback: int
    snapshot_bytes: int
    chunk_size: int
    step_seconds: float


@dataclass
class Counts:
    """What was done since the start."""

    steps: int = 0
    finished: int = 0
    failures: int = 0
    checks: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    drafted: int = 0
    accepted: int = 0


class EngineCore:
    """Requests, the scheduler and the runner, step by step."""

    def __init__(
        self,
        model: CausalLM,
        settings: CoreSettings,
        drafter: Drafter | None = None,
        disk: DiskCache | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.drafter = drafter
        self.scheduler = Scheduler(settings.num_rows)
        self.runner = ModelRunner(
            model,
            settings.num_blocks,
            settings.num_rows,
            settings.max_rollback,
            settings.snapshot_bytes,
            disk,
        )
        if drafter is not None:
            drafter.start(self.runner)
        self.masks = MaskPool()
        self.counts = Counts()
        self.last_error: str | None = None
        self.ok = True
        self._generations: dict[Sequence, Generation] = {}
        self._late: dict[Sequence, Tensor] = {}  # scores [V] of the next tokens, whose masks are not ready
        self._mask_deadline = 0.0
        self._seconds_per_token = 0.0

    @property
    def busy(self) -> bool:
        """Whether there are requests."""
        return bool(self._generations)

    def add(self, generation: Generation) -> None:
        """Take a request in."""
        self._generations[generation.sequence] = generation
        self.scheduler.add(generation.sequence)

    def turn(self) -> None:
        """Let go of cancelled requests, then do a step; if it fails, only those that run fail with it."""
        try:
            for generation in list(self._generations.values()):
                if generation.channel.cancelled:
                    self._finish(generation, "cancelled")
            if self._generations:
                self._step()
                self.ok = True
        except Exception as error:
            _log.exception("a step of the engine failed")
            self._recover(error)

    def cancel_all(self) -> None:
        """End all requests in good order."""
        for generation in list(self._generations.values()):
            self._finish(generation, "cancelled")

    def fail_all(self, error: str) -> None:
        """End all requests, whatever state the caches are in; nothing can be run any more."""
        for generation in list(self._generations.values()):
            self._forget(generation.sequence)
            generation.finish("error", error)

    def check_integrity(self) -> None:
        """Every request, block, row and snapshot is accounted for.

        Raises:
            RuntimeError: it is not so, which is a fault of the program.
        """
        if set(self._generations) != {*self.scheduler.running, *self.scheduler.waiting}:
            raise RuntimeError("a request is neither running nor waiting")
        self.runner.check_integrity(self.scheduler.running)
        self.counts.checks += 1

    # a step

    def _step(self) -> None:
        self._answer_late()
        began = perf_counter()
        drafts = self._drafts()
        draft = (lambda seq: drafts.get(seq, [])) if drafts else None
        plan = self.scheduler.plan(self.runner, self._budget(), draft)
        for seq in plan.preempted:
            self._undraft(seq)
            self._late.pop(seq, None)
        for seq in plan.admitted:
            self._begin(seq)
        if not plan.works:
            self._await_masks()
            return
        batch, hidden, logits, firsts = self.runner.run(plan.works)
        self.counts.steps += 1  # before anybody hears of what came of it
        rows = as_rows(logits)
        self._mask_deadline = perf_counter() + MASK_SECONDS
        for work, start in zip(plan.works, batch.cu_seqlens, strict=False):
            if work.sequence.scored:
                seq, read = work.sequence, hidden[start : start + len(work.tokens)]
                self._generations[seq].score(self.model, seq.num_computed, read)
        kept = [
            self._pass(work) if first is None else self._answer(work, logits, rows, first)
            for work, first in zip(plan.works, firsts, strict=True)
        ]
        if self.drafter is not None:
            self.drafter.observe(plan.works, kept, batch, hidden)
        self._measure(batch, perf_counter() - began)

    def _drafts(self) -> dict[Sequence, list[int]]:
        """Guesses for the answers under way: the one place where they come in."""
        if self.drafter is None:
            return {}
        if not self.drafter.wants(len(self.scheduler.running)):
            return {}
        most = self.settings.max_rollback
        limits = {
            seq: min(most, seq.limit - len(seq.ids) - 1)
            for seq in self.scheduler.running
            if seq.remaining == 1 and len(seq.ids) > seq.num_prompt and not self._generations[seq].foreseen
        }
        drafts = self.drafter.propose({seq: limit for seq, limit in limits.items() if limit > 0})
        return {seq: tokens[: limits[seq]] for seq, tokens in drafts.items()}

    def _begin(self, seq: Sequence) -> None:
        """A sequence got its place; it may have its next token without a step."""
        hit, logits = self.runner.hits.pop(seq, None), self.runner.ready.pop(seq, None)
        if hit is not None:
            self._generations[seq].begin(hit)
        if logits is not None:
            self._answer(Work(seq, []), logits[None], as_rows(logits[None]), 0)

    def _answer_late(self) -> None:
        """Go on with answers whose masks have become ready."""
        for seq in [seq for seq in self._late if self._generations[seq].ready(0)]:
            logits = self._late.pop(seq)[None]
            self._answer(Work(seq, []), logits, as_rows(logits), 0)

    def _await_masks(self) -> None:
        """Nothing else is to be done, so wait for a mask."""
        masks = [self._generations[seq].masks for seq in self._late]
        wait_for_any([one for one in masks if one is not None], MASK_SECONDS)

    def _pass(self, work: Work) -> int:
        """Take in a step that read a part of a prompt; how many tokens it ran."""
        seq = work.sequence
        self.runner.settle(work, len(work.tokens))
        if seq.is_cut(seq.num_computed):
            self.runner.remember(seq)
        if (report := self._generations[seq].request.on_read) is not None:
            report(seq.num_computed)
        return len(work.tokens)

    def _answer(self, work: Work, logits: Tensor, rows: Row, first: int) -> int:
        """Choose tokens as far as the drafts agree, and undo the others; how many that ran were true.

        A token is drawn as it would be without drafts, so they change neither an answer nor its distribution.
        If a mask is not ready in time, the answer keeps the scores and goes on in a later step.

        Args:
            logits: scores ``[R, V]``, of which ``rows`` is the same in memory.
            first: row after the last known token; those after each draft follow.
        """
        seq, generation = work.sequence, self._generations[work.sequence]
        sure = len(work.tokens) - work.num_drafts
        made, late = 0, False
        reason: Reason | None = None
        fault: Exception | None = None
        guesses: tuple[int | None, ...] = (*work.tokens[sure:], None)
        if len(seq.ids) >= seq.limit:  # only the prompt was to be read
            guesses, reason = (), "length"
        try:
            for guess in guesses:
                if late := not generation.ready(max(0.0, self._mask_deadline - perf_counter())):
                    break
                row = rows[first + made]
                token = generation.choose(row)
                made += 1
                reason = generation.push(token, row)
                if reason is not None or token != guess:
                    break
        except Exception as error:
            reason, fault = "error", error
        kept = sure + (made if late else max(0, made - 1))
        generation.drafted += work.num_drafts
        generation.accepted += kept - sure
        self.runner.settle(work, kept)
        if seq.num_computed == seq.num_prompt and fault is None:
            self.runner.remember(seq, logits[first])
        if late:
            self._late[seq] = logits[first + made].clone()
        if reason is not None:
            self._finish(generation, reason, fault)
        return kept

    def _finish(self, generation: Generation, reason: Reason, fault: Exception | None = None) -> None:
        seq = generation.sequence
        if seq.slot is not None:
            self.runner.release(seq, keep=reason != "error", last=True)
        self.scheduler.remove(seq)
        self._forget(seq)
        error = None if fault is None else told(fault)
        generation.finish(reason, error, refused=isinstance(fault, UsageError), fault=fault)

    def _forget(self, seq: Sequence) -> None:
        """Close the books of a request."""
        generation, counts = self._generations.pop(seq), self.counts
        self._undraft(seq)
        self._late.pop(seq, None)
        counts.finished += 1
        counts.prompt += seq.num_prompt
        counts.cached += generation.num_cached
        counts.completion += len(seq.ids) - seq.num_prompt
        counts.drafted += generation.drafted
        counts.accepted += generation.accepted

    def _undraft(self, seq: Sequence) -> None:
        if self.drafter is not None:
            self.drafter.forget(seq)

    def _recover(self, error: Exception) -> None:
        """End what ran in a step that failed, and go on with caches that nothing of it is in."""
        self.ok = False
        self.counts.failures += 1
        self.last_error = f"{type(error).__name__}: {error}"
        waiting = set(self.scheduler.waiting)
        self.scheduler.running.clear()
        for generation in list(self._generations.values()):
            if generation.sequence not in waiting:
                self._forget(generation.sequence)
                generation.finish("error", told(error), fault=error)
        self.runner.reset()
        if self.drafter is not None:
            self.drafter.start(self.runner)

    # how much a step may do

    def _budget(self) -> int:
        """Tokens of the next step: fewer where reading prompts would hold up answers for too long."""
        chunk, each = self.settings.chunk_size, self._seconds_per_token
        answers = sum(seq.remaining == 1 for seq in self.scheduler.running)
        if not answers or not each:
            return chunk
        return min(chunk, answers + max(MIN_PREFILL, int(self.settings.step_seconds / each)))

    def _measure(self, batch: ForwardBatch, seconds: float) -> None:
        num_tokens = len(batch.input_ids)
        if num_tokens < MIN_PREFILL:  # such a step takes its time for the weights, not for the tokens
            return
        newest = seconds / num_tokens
        each = self._seconds_per_token
        self._seconds_per_token = newest if not each else each + _NEWEST * (newest - each)


def told(error: Exception) -> str:
    """What a client may know of an error."""
    return str(error) if isinstance(error, GodwitError) else "an internal error ended this request; try again"


def divide(size: CacheSize, max_context: int, max_bytes: int | None, max_sequences: int) -> tuple[int, int]:
    """Blocks and rows within ``max_bytes``: first one whole context, then rows in half of the rest.

    Raises:
        MemoryBudgetError: there is no room for one row and two blocks.
    """
    context = num_blocks(max_context)
    most = context * max_sequences
    if max_bytes is None or size.per_row * max_sequences + size.per_block * most <= max_bytes:
        return most, max_sequences
    least = size.per_row + min(2, context) * size.per_block
    if max_bytes < least:
        raise MemoryBudgetError(
            f"one sequence of {2 * BLOCK_SIZE} tokens takes {least / 2**20:.3f} MiB, but the caches may have "
            f"only {max_bytes / 2**20:.3f} MiB: allow more memory"
        )
    rest = max(0, max_bytes - size.total(max_context))
    num_rows = 1 + (min(max_sequences - 1, rest // 2 // size.per_row) if size.per_row else max_sequences - 1)
    blocks = (max_bytes - num_rows * size.per_row) // size.per_block if size.per_block else most
    return min(blocks, most), num_rows
