"""Masks of constrained answers, computed ahead of time in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from heapq import heappop, heappush
from itertools import count
from time import thread_time

from torch import Tensor

from godwit.engine.stream import Constraint

NUM_THREADS = 2
_Mask = Tensor | None
_Job = Future[_Mask]
_QueuedJob = tuple[float, int, _Job, Callable[[], _Mask]]


class MaskPool:
    """Threads that compute masks. Answers that have used little time go first, so those with costly grammars
    wait
    for each other and do not hold up the rest."""

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="godwit-masks")
        self._lock = threading.Lock()
        self._waiting: list[_QueuedJob] = []
        self._numbers = count()

    def submit(self, spent: float, work: Callable[[], _Mask]) -> _Job:
        """Run ``work`` in a thread; ``spent``: seconds of CPU time that its answer has used so far."""
        job: _Job = Future()
        with self._lock:
            heappush(self._waiting, (spent, next(self._numbers), job, work))
        self._threads.submit(self._run_first)
        return job

    def close(self) -> None:
        """Drop waiting jobs and end the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run_first(self) -> None:
        with self._lock:
            _, _, job, work = heappop(self._waiting)
        if not job.set_running_or_notify_cancel():
            return
        try:
            job.set_result(work())
        except BaseException as error:
            job.set_exception(error)


class Masks:
    """The masks of one answer, each computed while the model computes the scores that it is for.

    Call :meth:`begin` once, then for each token: :meth:`ready`, :meth:`take`, :meth:`accept`.
    """

    def __init__(self, constraint: Constraint, pool: MaskPool) -> None:
        self._constraint = constraint
        self._pool = pool
        self._spent = 0.0
        self.job: _Job | None = None

    def begin(self) -> None:
        """Start computing the first mask."""
        self._submit(self._constraint.allowed)

    def accept(self, token: int, *, foreseen: bool) -> None:
        """Add a token of the answer and start computing the next mask.

        Args:
            token: the newest.
            foreseen: the token after it is known, so it needs no mask.
        """
        self._submit(partial(self._step, token, foreseen))

    def ready(self, seconds: float) -> bool:
        """Whether the mask is ready; waits up to ``seconds`` for it."""
        return self.job is None or bool(wait([self.job], seconds).done)

    def take(self) -> _Mask:
        """The mask, bool ``[vocab_size]``; None: all tokens are allowed.

        Raises:
            GodwitError: the answer no longer fits its grammar, or that is too costly to follow.
        """
        return None if self.job is None else self.job.result()

    def end(self) -> None:
        """The answer is over."""
        if self.job is not None:
            self.job.cancel()

    def _step(self, token: int, foreseen: bool) -> _Mask:
        self._constraint.accept(token)
        return None if foreseen else self._constraint.allowed()

    def _submit(self, work: Callable[[], _Mask]) -> None:
        self.job = self._pool.submit(self._spent, partial(self._measured, work))

    def _measured(self, work: Callable[[], _Mask]) -> _Mask:
        began = thread_time()
        try:
            return work()
        finally:
            self._spent += thread_time() - began


def wait_for_any(masks: Iterable[Masks], seconds: float) -> None:
    """Wait up to ``seconds`` until one of the masks is ready."""
    wait([one.job for one in masks if one.job is not None], seconds, FIRST_COMPLETED)
