"""Answers under way: what the engine gives, taken apart, for one request with one or more answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request

from godwit.dialect.parser import AnswerParser, CallArguments, CallEnd, CallStart, Delta, Text, Thinking
from godwit.engine import Stream, TokenLogprobs
from godwit.engine.stream import Event, Finish, PromptScored, Started
from godwit.server.clients import while_there
from godwit.server.errors import INTERNAL, ApiError, bad_request, failed_answer, overloaded
from godwit.server.journal import Record
from godwit.server.mailbox import Mailbox

_log = logging.getLogger("godwit.server")


@dataclass(frozen=True)
class Update:
    """Something new in one of the answers.

    Attributes:
        index: which answer it is.
        deltas: what is certain now; may be none.
        logprobs: of the tokens that came, where they were asked for.
        said: those of them that are no thinking, tag or call.
        cached: the answer begins: so many tokens of its prompt were cached.
        prompt_logprobs: of the prompt's tokens, where they were asked for; None for the first.
        finish: the end, with the reason in OpenAI's words.
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
class Answer:
    """An answer as far as it has come.

    Attributes:
        reason: "stop", "length" or "tool_calls"; "" as long as it goes on.
        num_tokens: that have come.
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
        """Take an update in."""
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
    """The answers to one request, as one stream of updates; None stands for a while without any.

    Whoever stops reading calls :meth:`cancel`.

    Args:
        streams: of the engine.
        num_prompt: tokens of the first prompt.
        parser: makes what takes an answer apart; None: it is plain text.
        parallel: an answer may call several tools; otherwise it ends with the first call.
        record: the request's.
        mailbox: brings the events of the streams.
        keep_alive: seconds without an update until None comes.
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
        self.answers = [Answer() for _ in streams]
        self.record = record
        self.num_prompt = num_prompt
        self._streams = list(streams)
        self._parsers = [parser() if parser else None for _ in streams]
        self._parallel = parallel
        self._keep_alive = keep_alive
        self._satisfied: set[int] = set()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        mailbox.open()
        queue = self._queue  # and not self: who drops the streams, ends the answers

        def listener(index: int) -> Callable[[Event], None]:
            return lambda event: mailbox.put(queue, (index, event))

        for index, stream in enumerate(streams):
            stream.on_event(listener(index))
        mailbox.deliver()  # what came before somebody listened

    def cancel(self) -> None:
        """End what still goes on; its memory is free after the engine's step."""
        for stream, answer in zip(self._streams, self.answers, strict=True):
            if answer.finish is None:
                stream.cancel()
                self.record.left = self.num_prompt, sum(answer.num_tokens for answer in self.answers)

    def failed(self, error: Exception) -> None:
        """Note that the response had to end with ``error``; the log explains it if it is our fault."""
        if not isinstance(error, ApiError):
            _log.exception("a streamed answer failed")
        self.record.error = self.record.error or str(error) or type(error).__name__

    async def updates(self) -> AsyncIterator[Update | None]:
        """What comes, until all answers have ended.

        Raises:
            ApiError: the engine failed, or ends.
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

    async def collect(self, request: Request) -> list[Answer]:
        """The whole answers; a client that goes meanwhile ends them.

        Raises:
            ApiError: the engine failed, or the client is gone.
        """

        async def read() -> None:
            async for _ in self.updates():
                pass

        try:
            await while_there(request, read())
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
        spoke = parser.speaks
        deltas = self._keep_one_call(index, parser.push(event.text))
        return Update(index, deltas, logprobs, logprobs if spoke and parser.speaks else ())

    def _end(self, index: int, finish: Finish, parser: AnswerParser | None) -> Update:
        self.record.finishes.append(finish)
        self.record.note_generated(finish.completion_tokens - self.answers[index].num_tokens)  # without text
        if finish.reason == "error":
            self.record.error = finish.error or INTERNAL
            raise failed_answer(finish.error, refused=finish.refused)
        satisfied = index in self._satisfied
        if finish.reason == "cancelled" and not satisfied:
            raise overloaded("the server is shutting down, so this answer was ended; send the request again")
        deltas: list[Delta] = []
        if parser is not None and not satisfied:
            deltas = self._keep_one_call(index, parser.flush())
        calls = bool(self.answers[index].calls) or any(isinstance(delta, CallStart) for delta in deltas)
        reason = "tool_calls" if calls and finish.reason != "length" else finish.reason
        self.record.reasons.append(reason)
        return Update(index, deltas, finish=finish, reason=reason)

    def _keep_one_call(self, index: int, deltas: list[Delta]) -> list[Delta]:
        """Without parallel calls, nothing behind the first whole call."""
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
    """Tokens of a request with all its answers."""

    prompt: int
    cached: int
    completion: int
    thinking: int
    drafted: int
    accepted: int

    @staticmethod
    def of(answers: Sequence[Answer], num_prompts: int = 1) -> Usage:
        """Sums; a prompt with several answers counts once, and as cached what its first answer found."""
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


def check_choices(num_choices: int, limit: int) -> None:
    """Refuse more answers than a request may ask for.

    Raises:
        ApiError: there are more.
    """
    if num_choices > limit:
        raise bad_request(
            f"a request may ask for {limit} answers in all, and this one asks for {num_choices}", "n"
        )
