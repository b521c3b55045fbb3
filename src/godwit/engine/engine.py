"""Engine: many requests at a time on one model, in its own thread."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from godwit.engine.cache import CacheSize, num_blocks
from godwit.engine.cache.disk import DiskCache, DiskStats, buffer_bytes
from godwit.engine.core import CoreSettings, Drafter, EngineCore, divide
from godwit.engine.generation import Generation
from godwit.engine.sampling import Sampler
from godwit.engine.scheduler import Sequence
from godwit.engine.speculation.speculator import MAX_DEPTH, Speculator, leaves_room
from godwit.engine.stream import Channel, GenerationRequest, Stream
from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.batch import BLOCK_SIZE
from godwit.models.causal_lm import CausalLM
from godwit.text.tokenizer import Tokenizer

DEFAULT_SNAPSHOT_BYTES = 1 << 30
DEFAULT_CACHE_BYTES = 8 << 30
SNAPSHOT_SPACING = 1024
#: Boundaries closer than this to the one before are skipped, except the first and the last two.
MIN_BOUNDARY_GAP = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """Whether the engine serves.

    Attributes:
        alive: its thread runs.
        failed_steps: steps in a row in which something failed, up to now.
        num_failures: all such steps. Each ended at least one request, or turned speculation off.
        last_error: what failed last: for logs, not for clients.
    """

    alive: bool
    failed_steps: int
    num_failures: int
    last_error: str | None

    @property
    def ok(self) -> bool:
        """It is alive, and nothing failed in the last step."""
        return self.alive and not self.failed_steps


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, of requests that have ended, and what is in use now."""

    num_waiting: int
    num_running: int
    num_steps: int
    num_finished: int
    num_preemptions: int
    num_failures: int
    num_checks: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted: int
    accepted: int
    num_blocks: int
    free_blocks: int
    cached_blocks: int
    num_rows: int
    free_rows: int
    num_snapshots: int
    snapshot_bytes: int
    max_snapshot_bytes: int
    evicted_blocks: int
    evicted_snapshots: int
    disk_files_written: int
    disk_files_skipped: int
    disk_files_read: int
    disk_queued_bytes: int


class Engine:
    """Answers many requests in batches. Blocks and rows for them are allocated once.

    With a packed model, the other requests in a batch do not change a request's answer.

    Args:
        model, tokenizer: of the same checkpoint.
        max_context: tokens of prompt and answer together; None: the model's maximum.
        max_bytes: for keys, values and recurrent states of running requests and of the prefix cache, and for
            the buffers of the disk cache.
        max_sequences: requests that run at a time, if memory allows.
        chunk_size: tokens of a step.
        step_seconds: how long reading prompts may delay answers; steps are made smaller accordingly.
        snapshot_bytes: for copies of recurrent states in the prefix cache, besides ``max_bytes``.
        snapshot_spacing: a prompt's state is copied every so many tokens, besides its boundaries.
        cache_dir: keeps the prefix cache in files, too, so that it survives a restart.
        cache_bytes: of these files.
        speculate: draft tokens where measurements say that it pays, while few requests run; only with packed
            weights, which keep the answers the same, and if memory allows.
        max_rollback: tokens that ``drafter`` may draft for a sequence in a step.
        drafter: replaces the drafter that ``speculate`` asks for.
        debug: check the integrity of the caches whenever the engine is idle.

    Attributes:
        capacity: tokens of prompt and answer that fit the caches.

    Raises:
        UsageError: an argument is out of range.
        MemoryBudgetError: not even a short text fits ``max_bytes``.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        max_context: int | None = None,
        max_bytes: int | None = None,
        max_sequences: int = 64,
        chunk_size: int = 4096,
        step_seconds: float = 0.25,
        snapshot_bytes: int = DEFAULT_SNAPSHOT_BYTES,
        snapshot_spacing: int = SNAPSHOT_SPACING,
        cache_dir: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        speculate: bool = True,
        max_rollback: int = 0,
        drafter: Drafter | None = None,
        debug: bool = False,
    ) -> None:
        limit = model.config.max_position
        self.max_context = limit if max_context is None else max_context
        if not 1 < self.max_context <= limit:
            raise UsageError(f"a context of {self.max_context} tokens is not possible; take 2 to {limit}")
        if min(chunk_size, max_sequences, snapshot_spacing) < 1 or min(snapshot_bytes, max_rollback) < 0:
            raise UsageError("an engine needs steps of at least one token and room for at least one sequence")
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self.snapshot_spacing = snapshot_spacing
        buffer = 0 if cache_dir is None else buffer_bytes(max_bytes)
        wanted = self.max_context, None if max_bytes is None else max_bytes - buffer, max_sequences
        if drafter is None and speculate and model.stack is not None and leaves_room(model, *wanted):
            drafter, max_rollback = Speculator(), MAX_DEPTH
        self.size = CacheSize.of(model, max_rollback)
        blocks, rows = divide(self.size, *wanted)
        self.settings = CoreSettings(blocks, rows, max_rollback, snapshot_bytes, chunk_size, step_seconds)
        self.capacity = min(self.max_context, blocks * BLOCK_SIZE)
        self._disk = None if cache_dir is None else DiskCache(cache_dir, model, cache_bytes, buffer)
        self.core = EngineCore(model, self.settings, drafter, self._disk)
        self.debug = debug
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards the five below
        self._inbox: list[Generation] = []
        self._checks: list[Future[None]] = []
        self._woken = False
        self._closing = False
        self._ended = False
        self._fault: str | None = None
        self._on_turn: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._live, name="godwit-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request.

        Raises:
            UsageError: the request is invalid, or the engine is closed.
            MemoryBudgetError: it can never fit the caches.
        """
        limit = self._limit(request)
        sampler = Sampler(request.params, self.vocab_size, request.prompt_ids)
        ids, cuts = list(request.prompt_ids), self._cuts(request)
        channel = Channel(self._wake)
        with self._changed:
            if self._closing:
                raise UsageError("the engine is closed")
            sequence = Sequence(
                next(self._numbers), ids, len(ids), limit, request.salt, request.priority, cuts
            )
            sequence.scored = request.score_prompt
            self._inbox.append(
                Generation(request, sequence, sampler, self.tokenizer, channel, self.core.masks)
            )
            self._changed.notify_all()
        return Stream(channel)

    def on_turn(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` in the engine's thread after each step, once all its events are out."""
        self._on_turn = callback

    def stats(self) -> EngineStats:
        """Counts and usage; does not wait for the current step."""
        counts, scheduler, runner = self.core.counts, self.core.scheduler, self.core.runner
        cache, kept = runner.cache, runner.index.stats
        disk = DiskStats() if self._disk is None else self._disk.stats
        return EngineStats(
            num_waiting=len(self._inbox) + len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_steps=counts.steps,
            num_finished=counts.finished,
            num_preemptions=scheduler.num_preemptions,
            num_failures=counts.failures,
            num_checks=counts.checks,
            prompt_tokens=counts.prompt,
            cached_tokens=counts.cached,
            completion_tokens=counts.completion,
            drafted=counts.drafted,
            accepted=counts.accepted,
            num_blocks=cache.blocks.num_blocks,
            free_blocks=cache.blocks.num_free,
            cached_blocks=kept.num_blocks,
            num_rows=cache.rows.num_rows,
            free_rows=cache.rows.num_free,
            num_snapshots=kept.num_snapshots,
            snapshot_bytes=kept.snapshot_bytes,
            max_snapshot_bytes=self.settings.snapshot_bytes,
            evicted_blocks=kept.num_evicted_blocks,
            evicted_snapshots=kept.num_evicted_snapshots,
            disk_files_written=disk.written,
            disk_files_skipped=disk.skipped,
            disk_files_read=disk.read,
            disk_queued_bytes=disk.queued_bytes,
        )

    @property
    def health(self) -> Health:
        """Whether the engine serves, and what failed last."""
        core, fault = self.core, self._fault or self.core.last_error
        return Health(self._thread.is_alive(), core.failed_steps, core.counts.failures, fault)

    def check_integrity(self) -> None:
        """Check between two steps that every request, block, row and snapshot is accounted for.

        Raises:
            RuntimeError: the books do not balance, which is a bug.
        """
        checked: Future[None] = Future()
        with self._changed:
            if self._ended or threading.current_thread() is self._thread:
                return self.core.check_integrity()
            self._checks.append(checked)
            self._changed.notify_all()
        return checked.result()

    def close(self) -> None:
        """Cancel all requests and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _limit(self, request: GenerationRequest) -> int:
        """The last possible position of the answer in the whole text.

        Raises: as :meth:`submit`.
        """
        ids, asked = request.prompt_ids, request.params.max_tokens
        if not ids:
            raise UsageError("a model continues at least one token, and the prompt has none")
        if len(ids) >= self.max_context:
            raise UsageError(
                f"the text has {len(ids)} tokens and the context {self.max_context}, which leaves no room "
                "for an answer; shorten it"
            )
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
            raise UsageError(f"the prompt has token ids outside 0 to {self.model.config.vocab_size - 1}")
        if request.params.ignore_eos and request.constraint is not None:
            raise UsageError(
                "ignore_eos cannot go with a form, which says where the answer ends; drop one of them"
            )
        if request.score_prompt and request.params.logprobs is None:
            raise UsageError("a prompt can only be scored where logprobs are asked for")
        if not all(0 <= position <= len(ids) for position in request.boundaries):
            raise UsageError(f"the boundaries have to lie within the prompt's {len(ids)} tokens")
        end = self.max_context if asked is None else min(self.max_context, len(ids) + asked)
        needed = len(ids) + 1 if asked is None else max(len(ids) + 1, end)
        if needed > self.capacity:
            each = self.size.per_block / 2**20
            raise MemoryBudgetError(
                f"{len(ids)} tokens of prompt and {needed - len(ids)} of answer take "
                f"{num_blocks(needed) * each:.2f} MiB of keys and values, but the caches have "
                f"{self.settings.num_blocks * each:.2f} MiB, for {self.capacity} tokens: shorten the text or "
                "allow more memory"
            )
        return min(end, self.capacity)

    def _cuts(self, request: GenerationRequest) -> list[int]:
        """Where the state of a prompt is kept: at boundaries, and at a spacing."""
        if not (self.core.runner.recurrent and self.core.runner.remembers):
            return []
        num_prompt = len(request.prompt_ids)
        bounds = sorted({position for position in request.boundaries if 0 < position < num_prompt})
        kept = {*bounds[:1], *bounds[-2:]}
        last = 0
        for position in bounds:
            if position - last >= MIN_BOUNDARY_GAP:
                kept.add(position)
                last = position
        kept.update(range(self.snapshot_spacing, num_prompt, self.snapshot_spacing))
        return sorted(kept)

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    # in the engine's thread

    def _live(self) -> None:
        try:
            while self._wait():
                self._take()
                self.core.turn()
                self._notify()
            self._take()
            self.core.cancel_all()
        except BaseException as fault:
            _log.exception("the engine's thread ends")
            self._fault = f"{type(fault).__name__}: {fault}"
            with self._changed:
                self._closing = True
            self._take()
            self.core.fail_all("the engine failed and cannot go on")
        finally:
            with self._changed:
                self._ended = True
            self._take()
            self._notify()
            self.core.masks.close()
            if self._disk is not None:
                self._disk.close()

    def _notify(self) -> None:
        try:
            self._on_turn()
        except Exception:
            _log.exception("a callback of the engine failed")

    def _take(self) -> None:
        with self._changed:
            arrived, self._inbox = self._inbox, []
            checks, self._checks = self._checks, []
        for generation in arrived:
            self.core.add(generation)
        for checked in checks:
            try:
                self.core.check_integrity()
                checked.set_result(None)
            except RuntimeError as error:
                checked.set_exception(error)

    def _wait(self) -> bool:
        """Wait for something to do; False when the engine is to stop."""
        if self.debug and not self.core.busy:
            self.core.check_integrity()
        with self._changed:
            self._changed.wait_for(
                lambda: self._inbox or self._checks or self._woken or self._closing or self.core.busy
            )
            self._woken = False
            return not self._closing
