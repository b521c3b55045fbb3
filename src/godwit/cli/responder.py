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

# The engine logs its errors, and `answer` raises them. Without a handler the log would go to stderr.
logging.getLogger("godwit").addHandler(logging.NullHandler())


class Responder:
    """Answers prompts one at a time, reusing cached prefixes of earlier ones. Close it when done.

    Args:
        model, tokenizer: from the same checkpoint.
        max_context: tokens of prompt and answer together; None: as many as the model supports.
        max_bytes: limit for the caches; None: no limit. Half of what the context does not need is for
            snapshots of recurrent states, from which later prompts can continue.
        chunk_size: prompt tokens processed per step.
        speculate: use speculative decoding when it is faster; answers stay the same.
        reuse: keep the cache for later prompts; False is faster if there is only one.

    Raises:
        UsageError: the model does not support the context.
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
            params: sampling parameters and stop conditions.
            thinking: limits of thinking; None: treat all text as the answer.
            shown_ids: special tokens to include in the text.
            progress: called with (tokens read, total tokens) while a long prompt is being read.

        Raises:
            UsageError: the prompt is empty or leaves no room for an answer, or ``params`` are invalid.
            Exception: an internal error of the engine.
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
        """End the current answer after this step; safe to call from signal handlers and other threads."""
        if self._stream is not None:
            self._stream.cancel()

    def forget(self) -> None:
        """Do not reuse anything cached so far."""
        self._num_forgotten += 1

    def close(self) -> None:
        """Stop the engine after the current step."""
        self.engine.close()

    def __enter__(self) -> Responder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
