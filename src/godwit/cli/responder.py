"""Responder: an engine that answers one prompt at a time, for the terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from godwit.engine import (
    CacheSize,
    Engine,
    Event,
    Finish,
    GenerationRequest,
    Piece,
    Prompt,
    SamplingParams,
    Stream,
    ThinkingRules,
)
from godwit.engine.engine import DEFAULT_SNAPSHOT_BYTES
from godwit.engine.stream import Started
from godwit.models.causal_lm import CausalLM
from godwit.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

# The engine logs its faults, and `answer` raises them again. Without a handler the log would go to stderr.
logging.getLogger("godwit").addHandler(logging.NullHandler())


class Responder:
    """Answers prompts one after another and reuses what is cached of earlier ones. Close it when done.

    Args:
        model, tokenizer: of the same checkpoint.
        max_context: tokens of prompt and answer together; None takes all that the model is made for.
        max_bytes: limit for the caches; half of what the context leaves of it may hold copies of recurrent
            states, at which later prompts continue. None is no limit.
        chunk_size: tokens of a prompt that are read in one step.
        speculate: guess tokens ahead where that pays; the answers stay the same.
        reuse: keep what later prompts may continue; False saves the work where there is only one prompt.

    Raises:
        UsageError: a context that the model is not made for.
        MemoryBudgetError: the context does not fit ``max_bytes``.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        max_context: int | None = None,
        *,
        max_bytes: int | None = None,
        chunk_size: int = 2048,
        speculate: bool = True,
        reuse: bool = True,
    ) -> None:
        context = model.config.max_position if max_context is None else max_context
        size = CacheSize.of(model)
        size.check(context, max_bytes)
        spare = DEFAULT_SNAPSHOT_BYTES if max_bytes is None else (max_bytes - size.total(context)) // 2
        self.tokenizer = tokenizer
        self.max_context = context
        self.chunk_size = chunk_size
        self.engine = Engine(
            model,
            tokenizer,
            max_context=context,
            max_sequences=1,
            chunk_size=chunk_size,
            snapshot_bytes=min(DEFAULT_SNAPSHOT_BYTES, spare) if reuse else 0,
            snapshot_spacing=chunk_size,
            speculate=speculate,
        )
        self._stream: Stream | None = None
        self._num_forgotten = 0

    def answer(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        thinking: ThinkingRules | None = None,
        shown_ids: frozenset[int] = frozenset(),
        progress: Progress | None = None,
    ) -> Iterator[Piece | Finish]:
        """Answer a prompt: pieces of text as they come, then one :class:`Finish`.

        Dropping the iterator cancels the answer.

        Args:
            prompt: the whole text.
            params: how to choose tokens, and when to end.
            thinking: limits of the thinking of the answer; None: its whole text is the answer.
            shown_ids: special tokens that are a part of the answer's text.
            progress: called with (tokens read, tokens to read) while a long prompt is being read.

        Raises:
            UsageError: the prompt is empty or leaves no room for an answer, or ``params`` make no sense.
            Exception: whatever went wrong in the engine.
        """
        events = SimpleQueue[Event | int]()
        self._stream = stream = self.engine.submit(
            GenerationRequest(
                prompt.ids,
                params or SamplingParams(),
                prompt.boundaries,
                salt=str(self._num_forgotten),
                shown_ids=shown_ids,
                thinking=thinking,
                on_read=None if progress is None else events.put,
            )
        )
        stream.on_event(events.put)
        cached = 0
        try:
            while not isinstance(event := events.get(), Finish):
                if isinstance(event, Started):
                    cached = event.cached_tokens
                elif isinstance(event, Piece) and event.text:
                    yield event
                elif isinstance(event, int) and progress is not None:
                    progress(event - cached, len(prompt.ids) - cached)
            if event.reason == "error":
                raise event.fault or RuntimeError(event.error)
            yield event
        finally:
            stream.cancel()

    def cancel(self) -> None:
        """End the answer under way after the current step; also for signal handlers and other threads."""
        if self._stream is not None:
            self._stream.cancel()

    def forget(self) -> None:
        """Reuse nothing of what was read before."""
        self._num_forgotten += 1

    def close(self) -> None:
        """End the engine; waits for the step under way."""
        self.engine.close()

    def __enter__(self) -> Responder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
