"""The answers to one request: parsed events of the engine's streams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request

from godwit.dialect.parser import AnswerParser, CallArguments, CallEnd, CallStart, Delta, Text, Thinking
from godwit.engine import Stream, TokenLogprobs
from godwit.engine.stream import Event, Finish, PromptScored, Started
from godwit.server.connections.clients import while_connected
from godwit.server.errors import INTERNAL, ApiError, failed_answer, overloaded
from godwit.server.log import Record
from godwit.server.mailbox import Mailbox

_log = logging.getLogger("godwit.server")


@dataclass(frozen=True)
class Update:
    """News of one of the answers.

    Attributes:
        index: of the answer.
        deltas: parsed text, thinking and calls; may be empty.
        logprobs: of the new tokens, if requested.
        said: those of them that are not part of thinking, tags or calls.
        cached: cached tokens of the prompt, when the answer begins.
        prompt_logprobs: of the prompt's tokens, if requested; None for the first.
        finish: the end of the answer, with ``reason`` as OpenAI's finish_reason.
    """

    index: int
    deltas: Sequence[Delta] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    said: Sequence[TokenLogprobs] = ()
    cached: int | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    finish: Finish | None = None
    reason: str = ""


@dataclass
class Call:
    """A tool call of an answer."""

    name: str
    arguments: str = ""
    complete: bool = False
    raw: str = ""


@dataclass
class AnswerState:
    """An answer so far.

    Attributes:
        reason: "stop", "length" or "tool_calls"; "" while it goes on.
        num_tokens: generated so far.
        logprobs, said, prompt_logprobs: as in :class:`Update`.
    """

    text: str = ""
    thinking: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    said: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    finish: Finish | None = None
    reason: str = ""
    num_tokens: int = 0

    def add(self, update: Update) -> None:
        """Add an update."""
        for delta in update.deltas:
            if isinstance(delta, Text):
                self.text += delta.text
            elif isinstance(delta, Thinking):
                self.thinking += delta.text
            elif isinstance(delta, CallStart):
                self.calls.append(Call(delta.name))
            elif isinstance(delta, CallArguments):
                self.calls[delta.index].arguments += delta.text
            else:
                self.calls[delta.index].complete, self.calls[delta.index].raw = delta.complete, delta.raw
        self.logprobs += update.logprobs
        self.said += update.said
        self.prompt_logprobs = update.prompt_logprobs or self.prompt_logprobs
        self.finish, self.reason = update.finish, update.reason


class Answers:
    """The answers to one request, as one stream of updates.

    A reader that stops early must call :meth:`cancel`.

    Args:
        streams: the engine's, one for each answer.
        record: of the request.
        mailbox: delivers the events of the streams.
        num_prompt: tokens of the first prompt.
        parser: makes the parser of an answer; None: the answers are plain text.
        parallel: an answer may have several tool calls; otherwise it ends after the first.
        keep_alive: seconds without an update until None is yielded.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        record: Record,
        mailbox: Mailbox,
        num_prompt: int = 0,
        parser: Callable[[], AnswerParser] | None = None,
        parallel: bool = True,
        keep_alive: float = 15.0,
    ) -> None:
        self.answers = [AnswerState() for _ in streams]
        self.record = record
        self.num_prompt = num_prompt
        self._streams = list(streams)
        self._parsers = [parser() if parser else None for _ in streams]
        self._parallel = parallel
        self._keep_alive = keep_alive
        self._satisfied: set[int] = set()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        mailbox.open()
        queue = self._queue  # not self: dropping the answers drops the streams, which cancels them

        def listener(index: int) -> Callable[[Event], None]:
            return lambda event: mailbox.put(queue, (index, event))

        for index, stream in enumerate(streams):
            stream.on_event(listener(index))
        mailbox.deliver()  # what came before the listeners were set

    def cancel(self) -> None:
        """Cancel the answers that go on; the engine frees their memory after its step."""
        for stream, answer in zip(self._streams, self.answers, strict=True):
            if answer.finish is None:
                stream.cancel()
                self.record.left = self.num_prompt, sum(answer.num_tokens for answer in self.answers)

    def failed(self, error: Exception) -> None:
        """Record the error that ended the response; unexpected ones are logged with a traceback."""
        if not isinstance(error, ApiError):
            _log.exception("a streamed answer failed")
        self.record.error = self.record.error or str(error) or type(error).__name__

    async def updates(self) -> AsyncIterator[Update | None]:
        """Updates until all answers have ended; None after each period of silence.

        Raises:
            ApiError: the engine failed or is shutting down.
        """
        while any(answer.finish is None for answer in self.answers):
            try:
                async with asyncio.timeout(self._keep_alive):
                    index, event = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            update = self._read(index, event)
            if update is not None:
                self.answers[index].add(update)
                yield update

    async def collect(self, request: Request) -> list[AnswerState]:
        """The whole answers. They are cancelled when the client leaves.

        Raises:
            ApiError: the engine failed, or the client left.
        """

        async def read() -> None:
            async for _ in self.updates():
                pass

        try:
            await while_connected(request, read())
        finally:
            self.cancel()
        return self.answers

    def _read(self, index: int, event: Event) -> Update | None:
        parser = self._parsers[index]
        if isinstance(event, Finish):
            return self._end(index, event, parser)
        if isinstance(event, Started):
            return Update(index, cached=event.cached_tokens)
        if isinstance(event, PromptScored):
            return Update(index, prompt_logprobs=event.logprobs)
        if index in self._satisfied:
            return None
        self.record.note_first()
        self.record.note_generated(len(event.token_ids))
        self.answers[index].num_tokens += len(event.token_ids)
        logprobs = event.logprobs or ()
        if parser is None:
            return Update(index, [Text(event.text)] if event.text else [], logprobs, logprobs)
        before = parser.speaks
        deltas = self._keep_one_call(index, parser.push(event.text))
        return Update(index, deltas, logprobs, logprobs if before and parser.speaks else ())

    def _end(self, index: int, finish: Finish, parser: AnswerParser | None) -> Update:
        self.record.finishes.append(finish)
        self.record.note_generated(finish.completion_tokens - self.answers[index].num_tokens)  # without text
        if finish.reason == "error":
            self.record.error = finish.error or INTERNAL
            raise failed_answer(finish.error, refused=finish.refused)
        satisfied = index in self._satisfied
        if finish.reason == "cancelled" and not satisfied:
            raise overloaded("the server is shutting down and ended this answer; send the request again")
        deltas: list[Delta] = []
        if parser is not None and not satisfied:
            deltas = self._keep_one_call(index, parser.flush())
        calls = bool(self.answers[index].calls) or any(isinstance(delta, CallStart) for delta in deltas)
        reason = "tool_calls" if calls and finish.reason != "length" else finish.reason
        self.record.reasons.append(reason)
        return Update(index, deltas, finish=finish, reason=reason)

    def _keep_one_call(self, index: int, deltas: list[Delta]) -> list[Delta]:
        """Without parallel calls, drop everything after the first complete call."""
        if self._parallel:
            return deltas
        place = next(
            (i for i, delta in enumerate(deltas) if isinstance(delta, CallEnd) and delta.complete), None
        )
        if place is None:
            return deltas
        self._satisfied.add(index)
        self._streams[index].cancel()
        return deltas[: place + 1]


@dataclass(frozen=True)
class Usage:
    """Token counts of a request, over all its answers."""

    prompt: int
    cached: int
    completion: int
    thinking: int
    drafted: int
    accepted: int

    @staticmethod
    def of(answers: Sequence[AnswerState], num_prompts: int = 1) -> Usage:
        """The sums. A prompt with several answers counts once, with the cached tokens of its first answer."""
        finishes = [answer.finish for answer in answers if answer.finish is not None]
        firsts = finishes[:: max(1, len(answers) // num_prompts)]
        return Usage(
            prompt=sum(finish.prompt_tokens for finish in firsts),
            cached=sum(finish.cached_tokens for finish in firsts),
            completion=sum(finish.completion_tokens for finish in finishes),
            thinking=sum(finish.thinking_tokens for finish in finishes),
            drafted=sum(finish.drafted for finish in finishes),
            accepted=sum(finish.accepted for finish in finishes),
        )
