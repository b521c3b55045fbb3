"""EngineCore: one step of the engine after the other. Not thread-safe."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from torch import Tensor

from godwit.engine.cache import CacheSize, num_blocks
from godwit.engine.cache.disk import DiskCache
from godwit.engine.constraint.masks import MaskPool, wait_for_any
from godwit.engine.generation import Generation, client_message
from godwit.engine.runner import ModelRunner
from godwit.engine.sampling import Row, as_rows
from godwit.engine.scheduler import Plan, Scheduler, Sequence, Work
from godwit.engine.stream import Reason
from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.batch import BLOCK_SIZE, ForwardBatch
from godwit.models.causal_lm import CausalLM

#: Prompt tokens that a step may always read.
MIN_PREFILL = 32
#: Seconds that a step waits for the masks of constrained answers; an answer whose mask takes longer sits out.
MASK_SECONDS = 0.05
#: Weight of the newest step in the moving average of the time per token.
_NEWEST = 0.25

_log = logging.getLogger(__name__)


class Drafter(Protocol):
    """Drafts tokens, which the model verifies several at a time; the answers stay the same.

    In each step the core calls :meth:`wants`, :meth:`propose` if that is true, and :meth:`observe`. A drafter
    that raises an error is dropped; the requests go on without drafts.
    """

    def start(self, runner: ModelRunner) -> None:
        """The caches are new: forget all sequences."""
        ...

    def wants(self, num_sequences: int) -> bool:
        """Whether to ask for drafts in this step, while ``num_sequences`` run. It must be fast."""
        ...

    def propose(self, limits: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Drafts for each running answer, at most as many as its limit."""
        ...

    def observe(self, works: Seq[Work], kept: Seq[int], batch: ForwardBatch, hidden: Tensor) -> None:
        """After a step: ``kept`` tokens of each work were accepted; ``hidden [T, H]`` is the trunk's output.

        A work whose sequence has no slot any more has ended.
        """
        ...

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended or was preempted."""
        ...


@dataclass(frozen=True)
class CoreSettings:
    """Settings of an engine; see :class:`~godwit.engine.engine.Engine`."""

    num_blocks: int
    num_rows: int
    max_rollback: int
    snapshot_bytes: int
    chunk_size: int
    step_seconds: float


@dataclass
class Counts:
    """Counts since the start; ``failures``: steps in which something failed."""

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
    """Requests, the scheduler and the runner.

    An error in the work for one request ends that request alone. An error in the step itself, such as in the
    forward pass, ends all running requests, and the caches are made anew.

    Attributes:
        failed_steps: steps in a row in which something failed.
        last_error: what failed last: for logs, not for clients.
    """

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
        self.failed_steps = 0
        self._failed = False  # in this step
        self._generations: dict[Sequence, Generation] = {}
        self._late: dict[Sequence, Tensor] = {}  # scores [V] of next tokens whose masks are not ready
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
        """End cancelled requests, then do a step. No error gets out of here."""
        self._failed, steps = False, self.counts.steps
        try:
            for generation in list(self._generations.values()):
                if generation.channel.cancelled:
                    self._finish(generation, "cancelled")
            if self._generations:
                self._step()
            if self._failed:
                self.check_integrity()  # a failed request may have left something behind
        except Exception as error:
            self._recover(error)
        if self.counts.steps > steps and not self._failed:
            self.failed_steps = 0

    def cancel_all(self) -> None:
        """End all requests in good order."""
        for generation in list(self._generations.values()):
            self._finish(generation, "cancelled")

    def fail_all(self, error: str) -> None:
        """End all requests without touching the caches; nothing can be run any more."""
        for generation in list(self._generations.values()):
            self._forget(generation.sequence)
            self._end(generation, "error", error=error)

    def check_integrity(self) -> None:
        """Every request, block, row and snapshot is accounted for.

        Raises:
            RuntimeError: the books do not balance, which is a bug.
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
        works = self._arrange(self.scheduler.plan(self.runner, self._budget(), draft))
        if not works:
            self._await_background()
            return
        batch, hidden, logits, firsts = self.runner.run(works)
        self.counts.steps += 1  # before any event of this step goes out
        rows = as_rows(logits)
        self._mask_deadline = perf_counter() + MASK_SECONDS
        kept = [0] * len(works)
        for i, (work, start, first) in enumerate(zip(works, batch.cu_seqlens, firsts, strict=False)):
            with self._guard(work.sequence):
                self._score(work, hidden[start : start + len(work.tokens)])
                kept[i] = self._pass(work) if first is None else self._answer(work, logits, rows, first)
        if self.drafter is not None:
            with self._guard_drafter():
                self.drafter.observe(works, kept, batch, hidden)
        self._measure(batch, perf_counter() - began)

    def _arrange(self, plan: Plan) -> list[Work]:
        """Note who came and went for a step; what it is to run."""
        for seq in plan.preempted:
            self._forget_drafts(seq)
            self._late.pop(seq, None)
        for seq, error in plan.failed:
            self._fail(seq, error)
        for seq in plan.admitted:
            if seq in self._generations:
                with self._guard(seq):
                    self._begin(seq)
        works = [work for work in plan.works if work.sequence in self._generations]
        if self._failed:
            self.runner.check_integrity(self.scheduler.running, works)
        return works

    def _score(self, work: Work, hidden: Tensor) -> None:
        if work.sequence.scored:
            self._generations[work.sequence].score(self.model, work.sequence.num_computed, hidden)

    def _drafts(self) -> dict[Sequence, list[int]]:
        """Drafts for the running answers."""
        drafts: dict[Sequence, list[int]] = {}
        if self.drafter is None:
            return drafts
        with self._guard_drafter():
            if self.drafter.wants(len(self.scheduler.running)):
                limits = self._draft_limits()
                proposed = self.drafter.propose(limits)
                drafts = {seq: tokens[: limits[seq]] for seq, tokens in proposed.items()}
        return drafts

    def _draft_limits(self) -> dict[Sequence, int]:
        """How many tokens may be drafted for each running answer."""
        most = self.settings.max_rollback
        limits = {
            seq: min(most, seq.limit - len(seq.ids) - 1)
            for seq in self.scheduler.running
            if seq.remaining == 1 and len(seq.ids) > seq.num_prompt and not self._generations[seq].foreseen
        }
        return {seq: limit for seq, limit in limits.items() if limit > 0}

    def _begin(self, seq: Sequence) -> None:
        """A sequence was admitted; it may get its next token without a step."""
        hit, logits = self.runner.hits.pop(seq, None), self.runner.ready.pop(seq, None)
        if hit is not None:
            self._generations[seq].begin(hit)
        if logits is not None:
            self._answer(Work(seq, []), logits[None], as_rows(logits[None]), 0)

    def _answer_late(self) -> None:
        """Go on with answers whose masks have become ready."""
        for seq in [seq for seq in self._late if self._generations[seq].ready(0)]:
            logits = self._late.pop(seq)[None]
            with self._guard(seq):
                self._answer(Work(seq, []), logits, as_rows(logits), 0)

    def _await_background(self) -> None:
        """There is nothing to compute: wait for a mask, or for a file of the disk cache."""
        masks = [self._generations[seq].masks for seq in self._late]
        if masks:
            wait_for_any([one for one in masks if one is not None], MASK_SECONDS)
        elif self.runner.disk is not None:
            self.runner.disk.wait(MASK_SECONDS)

    def _pass(self, work: Work) -> int:
        """Take in a step that read a part of a prompt; returns how many tokens it ran."""
        seq = work.sequence
        self.runner.settle(work, len(work.tokens))
        if seq.is_cut(seq.num_computed):
            self.runner.remember(seq)
        if (report := self._generations[seq].request.on_read) is not None:
            report(seq.num_computed)
        return len(work.tokens)

    def _answer(self, work: Work, logits: Tensor, rows: Row, first: int) -> int:
        """Choose tokens as long as the drafts agree and undo the rest; returns how many that ran are kept.

        Tokens are drawn as they would be without drafts, so these change neither an answer nor its
        distribution. If a mask is not ready in time, the scores are kept and the answer goes on in a later
        step.

        Args:
            work: what ran.
            logits: scores ``[R, V]``.
            rows: the same scores as an array.
            first: row after the last known token; the rows after each draft follow.
        """
        seq, generation = work.sequence, self._generations[work.sequence]
        sure = len(work.tokens) - work.num_drafts
        made, late = 0, False
        reason: Reason | None = None
        fault: Exception | None = None
        guesses: tuple[int | None, ...] = (*work.tokens[sure:], None)
        if len(seq.ids) >= seq.limit:  # no answer was asked for
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
        try:
            if seq.slot is not None:
                self.runner.release(seq, keep=reason != "error", last=True)
        except Exception as error:  # it is not kept for reuse, but the answer is complete
            self._report(error)
            self.runner.discard(seq)
        self.scheduler.remove(seq)
        self._forget(seq)
        if fault is None:
            self._end(generation, reason)
            return
        refused = isinstance(fault, UsageError)
        if not refused:
            self._report(fault)
        self._end(generation, reason, fault, refused=refused)

    def _end(
        self,
        generation: Generation,
        reason: Reason,
        fault: Exception | None = None,
        *,
        error: str | None = None,
        refused: bool = False,
    ) -> None:
        error = error if fault is None else client_message(fault)
        try:
            generation.finish(reason, error, refused=refused, fault=fault)
        except Exception as another:
            self._report(another)
            generation.finish("error", client_message(another), fault=another, flush=False)

    def _forget(self, seq: Sequence) -> None:
        """Remove a request and add up its counts."""
        generation, counts = self._generations.pop(seq), self.counts
        self._forget_drafts(seq)
        self._late.pop(seq, None)
        counts.finished += 1
        counts.prompt += seq.num_prompt
        counts.cached += generation.num_cached
        counts.completion += len(seq.ids) - seq.num_prompt
        counts.drafted += generation.drafted
        counts.accepted += generation.accepted

    def _forget_drafts(self, seq: Sequence) -> None:
        if self.drafter is not None:
            with self._guard_drafter():
                self.drafter.forget(seq)

    # errors

    @contextmanager
    def _guard(self, seq: Sequence) -> Iterator[None]:
        """An error inside ends the request of ``seq`` alone."""
        try:
            yield
        except Exception as error:
            self._fail(seq, error)

    @contextmanager
    def _guard_drafter(self) -> Iterator[None]:
        """An error inside turns speculation off; no request depends on it."""
        try:
            yield
        except Exception as error:
            self._report(error)
            self.drafter = None

    def _report(self, error: Exception) -> None:
        """Note that something failed in this step, before any client hears of it."""
        _log.error("a step of the engine failed", exc_info=error)
        if not self._failed:
            self._failed = True
            self.last_error = f"{type(error).__name__}: {error}"  # what follows in this step is due to it
            self.counts.failures += 1
            self.failed_steps += 1

    def _fail(self, seq: Sequence, error: Exception) -> None:
        """End a request because of an error; the scheduler may have dropped it already."""
        self._report(error)
        self.runner.discard(seq)
        if (generation := self._generations.get(seq)) is None:
            return
        if seq in self.scheduler.running or seq in self.scheduler.waiting:
            self.scheduler.remove(seq)
        self._forget(seq)
        self._end(generation, "error", error)

    def _recover(self, error: Exception) -> None:
        """End all requests but those that wait, and go on with new caches."""
        self._report(error)
        self.scheduler.running.clear()
        for seq, generation in list(self._generations.items()):
            seq.restart()
            if seq not in self.scheduler.waiting:
                self._forget(seq)
                self._end(generation, "error", error)
        self.runner.reset()
        if self.drafter is not None:
            with self._guard_drafter():
                self.drafter.start(self.runner)

    # how much a step may do

    def _budget(self) -> int:
        """Token budget of the next step, reduced where reading prompts would delay answers for too long."""
        chunk, each = self.settings.chunk_size, self._seconds_per_token
        answers = sum(seq.remaining == 1 for seq in self.scheduler.running)
        if not answers or not each:
            return chunk
        return min(chunk, answers + max(MIN_PREFILL, int(self.settings.step_seconds / each)))

    def _measure(self, batch: ForwardBatch, seconds: float) -> None:
        num_tokens = len(batch.input_ids)
        if num_tokens < MIN_PREFILL:  # reading the weights takes most of such a step
            return
        newest = seconds / num_tokens
        each = self._seconds_per_token
        self._seconds_per_token = newest if not each else each + _NEWEST * (newest - each)


def divide(size: CacheSize, max_context: int, max_bytes: int | None, max_sequences: int) -> tuple[int, int]:
    """Blocks and rows that fit ``max_bytes``: first one whole context, then rows from half of the rest.

    Raises:
        MemoryBudgetError: one row and two blocks do not fit.
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
