"""Engine: many requests at a time on one model, in a thread of its own."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from godwit.engine.cache import CacheSize, num_blocks
from godwit.engine.core import CoreSettings, Drafter, EngineCore, divide
from godwit.engine.generation import Generation
from godwit.engine.sampling import Sampler
from godwit.engine.scheduler import Sequence
from godwit.engine.speculative import MAX_DEPTH, Speculator, leaves_room
from godwit.engine.spill import DiskCache
from godwit.engine.stream import Channel, GenerationRequest, Stream
from godwit.errors import MemoryBudgetError, UsageError
from godwit.models.batch import BLOCK_SIZE
from godwit.models.causal_lm import CausalLM
from godwit.text.tokenizer import Tokenizer

DEFAULT_SNAPSHOT_BYTES = 1 << 30
DEFAULT_CACHE_BYTES = 8 << 30
SNAPSHOT_SPACING = 1024
#: Boundaries closer than this to the one before are passed over, but for the first and the last two.
MIN_BOUNDARY_GAP = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """Whether the engine serves.

    Attributes:
        alive: its thread runs.
        ok: alive, and the last step did not fail.
        num_failures: steps that failed; each ended the requests that were running.
        last_error: what the last of them said: for logs, not for clients.
    """

    alive: bool
    ok: bool
    num_failures: int
    last_error: str | None


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, of requests that have ended; and what is in use now."""

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


class Engine:
    """Answers many requests together. Blocks and rows for them are allocated once.

    With a packed model each request gets the very answer that it gets when it is alone.

    Args:
        model, tokenizer: of the same checkpoint.
        max_context: tokens of prompt and answer together; None takes all that the model is made for.
        max_bytes: for keys, values and recurrent states of what runs and of what is remembered.
        max_sequences: requests that run at a time, where there is memory for so many.
        chunk_size: tokens of a step.
        step_seconds: how long reading prompts may hold up answers; steps are made smaller for that.
        snapshot_bytes: for copies of recurrent states where texts may be resumed, besides ``max_bytes``.
        snapshot_spacing: the state of a prompt is copied every so many tokens, besides its boundaries.
        cache_dir: keeps what is remembered in files too, so that it survives a restart.
        cache_bytes: of these files.
        speculate: guess tokens ahead where measurements say that it pays, beside few other answers; only with
            packed weights, whose answers stay the same, and where there is memory for it.
        max_rollback: tokens that may be drafted for a sequence in a step by ``drafter``.
        drafter: drafts them, instead of what ``speculate`` asks for.
        debug: check the books whenever there is nothing to do.

    Attributes:
        capacity: tokens of prompt and answer that fit the caches.

    Raises:
        UsageError: arguments that make no sense.
        MemoryBudgetError: ``max_bytes`` has no room for even a short text.
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
        wanted = self.max_context, max_bytes, max_sequences
        if drafter is None and speculate and model.stack is not None and leaves_room(model, *wanted):
            drafter, max_rollback = Speculator(), MAX_DEPTH
        self.size = CacheSize.of(model, max_rollback)
        blocks, rows = divide(self.size, *wanted)
        self.settings = CoreSettings(blocks, rows, max_rollback, snapshot_bytes, chunk_size, step_seconds)
        self.capacity = min(self.max_context, blocks * BLOCK_SIZE)
        self._disk = None if cache_dir is None else DiskCache(cache_dir, model, cache_bytes)
        self.core = EngineCore(model, self.settings, drafter, self._disk)
        self.debug = debug
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards the five below
        self._inbox: list[Generation] = []
        self._errands: list[Future[None]] = []
        self._poked = False
        self._closing = False
        self._ended = False
        self._fault: str | None = None
        self._on_turn: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._live, name="godwit-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request.

        Raises:
            UsageError: it makes no sense, or the engine is closed.
            MemoryBudgetError: it can never fit the caches.
        """
        limit = self._limit(request)
        sampler = Sampler(request.params, self.vocab_size, request.prompt_ids)
        ids, cuts = list(request.prompt_ids), self._cuts(request)
        channel = Channel(self._poke)
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
        """Call ``callback`` in the engine's thread after each step, when all its events are out."""
        self._on_turn = callback

    def stats(self) -> EngineStats:
        """What was done and what is in use; does not wait for the step under way."""
        core = self.core
        counts, scheduler, cache, kept = (
            core.counts,
            core.scheduler,
            core.runner.cache,
            core.runner.index.stats,
        )
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
        )

    @property
    def health(self) -> Health:
        """Whether the engine serves, and what went wrong last."""
        core, alive = self.core, self._thread.is_alive()
        return Health(alive, alive and core.ok, core.counts.failures, self._fault or core.last_error)

    def check_integrity(self) -> None:
        """Every request, block, row and snapshot is accounted for; looked at between two steps.

        Raises:
            RuntimeError: it is not so, which is a fault of the program.
        """
        checked: Future[None] = Future()
        with self._changed:
            if self._ended or threading.current_thread() is self._thread:
                return self.core.check_integrity()
            self._errands.append(checked)
            self._changed.notify_all()
        return checked.result()

    def close(self) -> None:
        """Cancel all requests and end the thread."""
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
        """Where the answer ends at the latest, as a position in the whole text.

        Raises: as :meth:`submit`.
        """
        ids, asked = request.prompt_ids, request.params.max_tokens
        if not ids:
            raise UsageError("a model continues at least one token, and the prompt has none")
        if len(ids) >= self.max_context:
            raise UsageError(
                f"the text has {len(ids)} tokens and the context {self.max_context}, so there is no room for "
                "an answer; shorten it"
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
        """Where the state of a prompt is worth keeping: at boundaries, and at a spacing."""
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

    def _poke(self) -> None:
        with self._changed:
            self._poked = True
            self._changed.notify_all()

    # in the engine's thread

    def _live(self) -> None:
        try:
            while self._wait():
                self._take()
                self.core.turn()
                self._on_turn()
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
            self._on_turn()
            self.core.masks.close()
            if self._disk is not None:
                self._disk.close()

    def _take(self) -> None:
        with self._changed:
            arrived, self._inbox = self._inbox, []
            errands, self._errands = self._errands, []
        for generation in arrived:
            self.core.add(generation)
        for checked in errands:
            try:
                self.core.check_integrity()
                checked.set_result(None)
            except RuntimeError as error:
                checked.set_exception(error)

    def _wait(self) -> bool:
        """Until there is something to do; False when the engine is to end."""
        if self.debug and not self.core.busy:
            self.core.check_integrity()
        with self._changed:
            self._changed.wait_for(
                lambda: self._inbox or self._errands or self._poked or self._closing or self.core.busy
            )
            self._poked = False
            return not self._closing
