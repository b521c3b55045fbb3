"""The engine's input and output: requests, events, and the stream that carries the events."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from godwit.engine.sampling import SamplingParams, TokenLogprobs
from godwit.engine.thinking import ThinkingEnd, ThinkingRules

Reason = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """What the tokens of one answer have to obey; made for one request, and used up by it.

    Its methods are called from threads of the engine's, one at a time.
    """

    def allowed(self) -> Tensor | None:
        """Bool ``[vocab_size]``: which tokens may come next, stop tokens included; None: all."""
        ...

    def accept(self, token: int) -> None:
        """Go on by a token that was chosen."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to be continued.

    Attributes:
        prompt_ids: the whole text from its start.
        params: how to choose tokens, and when to end.
        boundaries: positions in the prompt up to which a later one may well be the same, such as the ends of
            the system prompt and of each message: there a recurrent state is worth keeping.
        salt: only requests with the same salt share what is cached.
        constraint: what the answer has to obey.
        priority: requests of a higher one come first.
        score_prompt: report how likely the prompt's tokens are, too, as ``params.logprobs`` asks of the
            answer's; the whole prompt is read for that, whatever is cached.
        shown_ids: special tokens that are a part of the answer's text, as others are not.
        thinking: what holds for the thinking of the answer; None: its whole text is the answer.
        on_read: called in the engine's thread after each step that does not reach the end of the prompt, with
            the number of its tokens that are in the caches.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    boundaries: tuple[int, ...] = ()
    salt: str = ""
    constraint: Constraint | None = None
    priority: int = 0
    score_prompt: bool = False
    shown_ids: frozenset[int] = frozenset()
    thinking: ThinkingRules | None = None
    on_read: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Started:
    """The first event: the request has its place, and so many tokens of its prompt were cached."""

    cached_tokens: int


@dataclass(frozen=True)
class PromptScored:
    """The prompt is read: how likely each of its tokens was, None for the first."""

    logprobs: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True)
class Piece:
    """A part of the answer's text, with the tokens that are complete with it.

    The text is empty only where the last tokens of an answer have none.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: "stop" (a stop token or text), "length" (max_tokens or the context), "cancelled" or "error".
        token_ids: all tokens of the answer, a stop token included.
        prompt_tokens, cached_tokens: tokens of the prompt, and how many of them an earlier request had left
            in the caches.
        prefill_tokens, prefill_seconds: tokens read before the first token of the answer came, and the time.
        decode_seconds: time for all tokens of the answer but the first.
        seed: repeats the answer.
        stop: the stop text that ended it, if one did.
        thinking_tokens: tokens of the answer's thinking, without the tags.
        thinking_ended: why its thinking ended; None: there was none, or it was cut off.
        queue_seconds: from the submission to the start of reading.
        drafted, accepted: tokens that were guessed ahead, and how many of them the model agreed with.
        preemptions: how often the request had to make room for others.
        reuse_note: why not more of the prompt was reused; empty where nothing was left to reuse.
        error: what went wrong, in words for a client, where the reason is "error".
        refused: the error is the request's own fault: its form was too costly to follow, for example.
        fault: the exception behind the error.
        speedup: how many times as fast as without drafts the answer came, as it is estimated; None where
            there were none, or nothing to compare them with.
        stop_logprobs: of the stop token that ended it, which is in no piece, where logprobs were asked for.
    """

    reason: Reason
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    prefill_tokens: int
    prefill_seconds: float
    decode_seconds: float
    seed: int
    stop: str | None
    thinking_tokens: int = 0
    thinking_ended: ThinkingEnd | None = None
    queue_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    reuse_note: str = ""
    error: str | None = None
    refused: bool = False
    fault: Exception | None = None
    speedup: float | None = None
    stop_logprobs: TokenLogprobs | None = None

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return _rate(self.prefill_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float | None:
        return _rate(self.completion_tokens - 1, self.decode_seconds)

    @property
    def first_token_seconds(self) -> float:
        """From the submission to the first token."""
        return self.queue_seconds + self.prefill_seconds


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


Event = Started | PromptScored | Piece | Finish
Callback = Callable[[Event], None]


class Channel:
    """The engine's end of a stream; it outlives the stream, and so notices that nobody listens any more."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.cancelled = False
        self._wake = wake
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._callback: Callback | None = None

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self._wake()

    def put(self, event: Event) -> None:
        """Hand out an event; a callback that fails counts as a client that is gone."""
        with self._changed:
            if self._callback is None:
                self._events.append(event)
                self._changed.notify_all()
                return
            self._call(event)

    def get(self, timeout: float | None) -> Event:
        """The next event.

        Raises:
            TimeoutError: none came in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._events, timeout):
                raise TimeoutError("no event came in time")
            return self._events.popleft()

    def listen(self, callback: Callback) -> None:
        with self._changed:
            self._callback = callback
            while self._events:
                self._call(self._events.popleft())

    def _call(self, event: Event) -> None:
        try:
            if self._callback is not None:
                self._callback(event)
        except Exception:
            self._callback = _ignore
            self.cancel()


def _ignore(result: object) -> None:
    pass


class Stream:
    """The answer to one request: an iterator of a :class:`Started`, pieces and, at last, one :class:`Finish`.

    A request that was never admitted has no :class:`Started`.

    Read it with a loop, an ``async for``, or :meth:`on_event`, but only one of them. Dropping the stream
    cancels the request.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._done = False
        self._queue: asyncio.Queue[Event] | None = None
        # not at the interpreter's exit: the engine's thread is gone by then
        weakref.finalize(self, channel.cancel).atexit = False

    def cancel(self) -> None:
        """End the request before the next step; what it holds is free then. For any thread."""
        self._channel.cancel()

    def on_event(self, callback: Callback) -> None:
        """Call ``callback`` with each event, those that have come already first.

        It is called in the engine's thread, and so has to be quick; one that raises cancels the request.
        """
        self._channel.listen(callback)

    def next_event(self, timeout: float | None = None) -> Event:
        """The next event.

        Raises:
            StopIteration: the answer has ended.
            TimeoutError: none came within ``timeout`` seconds.
        """
        if self._done:
            raise StopIteration
        event = self._channel.get(timeout)
        self._done = isinstance(event, Finish)
        return event

    def result(self) -> tuple[str, Finish]:
        """Wait for the whole answer."""
        text = ""
        for event in self:
            if isinstance(event, Finish):
                return text, event
            text += event.text if isinstance(event, Piece) else ""
        raise RuntimeError("this stream was read already")

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        return self.next_event()

    def __aiter__(self) -> Stream:
        if self._queue is None:
            queue = self._queue = asyncio.Queue()
            loop = asyncio.get_running_loop()
            self.on_event(lambda event: _ignore(loop.call_soon_threadsafe(queue.put_nowait, event)))
        return self

    async def __anext__(self) -> Event:
        if self._done or self._queue is None:
            raise StopAsyncIteration
        event = await self._queue.get()
        self._done = isinstance(event, Finish)
        return event
