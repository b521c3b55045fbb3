"""Session: one conversation with a model, its caches kept from answer to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch

from godwit.engine.answer import StopMatcher
from godwit.engine.cache import HybridCache
from godwit.engine.ending import Ending
from godwit.engine.sampling import Sampler, SamplingParams
from godwit.engine.thinking import ThinkingEnd, ThinkingGuide, ThinkingRules, shown
from godwit.errors import UsageError
from godwit.models.causal_lm import CausalLM
from godwit.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prefill:
    """Reading a prompt: ``num_tokens`` are in the caches now, ``num_cached`` of them were before."""

    num_tokens: int
    num_cached: int
    seconds: float


@dataclass(frozen=True)
class Piece:
    """A part of the answer's text, never empty."""

    text: str


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: "stop" (a stop token or text), "length" (max_tokens or the context) or "cancelled".
        token_ids: all that were chosen, a stop token included.
        prompt_tokens, cached_tokens: ids of the prompt, and how many of them needed no work.
        prefill_tokens, prefill_seconds: tokens that were read (all others unless cancelled), and the time.
        decode_seconds: time of all tokens of the answer but the first, which follows from the prompt.
        seed: repeats the answer.
        stop: the stop text that ended it, if one did.
        thinking_tokens: of the answer's tokens, those of its thinking; the tags do not count.
        thinking_ended: why its thinking was over; None: there was none, or it was cut off.
    """

    reason: Literal["stop", "length", "cancelled"]
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

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return _rate(self.prefill_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float | None:
        return _rate(self.completion_tokens - 1, self.decode_seconds)


Event = Piece | Finish


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


class Session:
    """One conversation. A prompt that continues what is cached is read from there, others from their start.

    Where all layers are attention, a prompt that departs from the cached text is read from the point where it
    departs; a recurrent state cannot be wound back like that. Not for several threads, but :meth:`cancel` is.

    Args:
        model, tokenizer: of the same checkpoint.
        max_context: tokens of prompt and answer together; None takes all that the model is made for.
        max_bytes: limit for the caches.
        chunk_size: tokens of a prompt that are read in one step.

    Raises:
        UsageError: a context that the model is not made for.
        MemoryBudgetError: the caches do not fit ``max_bytes``.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        max_context: int | None = None,
        *,
        max_bytes: int | None = None,
        chunk_size: int = 2048,
    ) -> None:
        limit = model.config.max_position
        self.max_context = limit if max_context is None else max_context
        if not 1 < self.max_context <= limit:
            raise UsageError(f"a context of {self.max_context} tokens is not possible; take 2 to {limit}")
        if chunk_size < 1:
            raise UsageError(f"a prompt cannot be read in steps of {chunk_size} tokens; take at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self.chunk_size = chunk_size
        self.cache = HybridCache.sized(model, self.max_context, max_bytes=max_bytes)
        self._seq: int | None = None
        self._ids: list[int] = []
        self._logits = torch.empty(0)
        self._cancelled = False
        self._turn = 0

    @property
    def num_cached(self) -> int:
        """Tokens in the caches."""
        return len(self._ids)

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called since the last answer began."""
        return self._cancelled

    def cancel(self) -> None:
        """End the answer under way after the step it is in; also for signal handlers and other threads."""
        self._cancelled = True

    def reset(self) -> None:
        """Forget the conversation; an answer under way cannot go on."""
        self._turn += 1
        self._drop()

    def _drop(self) -> None:
        self._ids, self._logits = [], torch.empty(0)
        seq, self._seq = self._seq, None
        if seq is not None:
            self.cache.free(seq)

    def feed(self, ids: Sequence[int], progress: Progress | None = None) -> Prefill:
        """Read a prompt ahead of its answer, or the beginning of one.

        Args:
            ids: the whole text from the start of the conversation.
            progress: called with (tokens read, tokens to read) after each step.

        Raises:
            UsageError: no tokens, ids that do not exist, or more than the context holds.
        """
        self._check(ids)
        self._cancelled = False
        self._turn += 1
        return self._feed(ids, progress)

    def stream(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        progress: Progress | None = None,
        thinking: ThinkingRules | None = None,
    ) -> Iterator[Event]:
        """Answer a prompt: pieces of text as they come, then one :class:`Finish`.

        No part of a stop text is ever given out, nor are stop tokens and other special tokens. The iterator
        may be dropped at any point; the session stays usable.

        Args:
            ids, progress: as for :meth:`feed`.
            params: how to choose tokens, and when to end.
            thinking: what holds for the thinking of the answer; None: its whole text is the answer.

        Raises:
            UsageError: as :meth:`feed`; no room for an answer; an unknown id in ``logit_bias``.
        """
        self._check(ids)
        if len(ids) == self.max_context:
            raise UsageError(
                f"the text of {len(ids)} tokens fills the whole context, so there is no room for an answer; "
                "shorten it"
            )
        params = params or SamplingParams()
        sampler = Sampler(params, self.vocab_size, ids)
        self._cancelled = False
        self._turn += 1
        return _Run(self, list(ids), sampler, progress, thinking).events()

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("a model continues at least one token, and the prompt has none")
        if len(ids) > self.max_context:
            raise UsageError(
                f"the text has {len(ids)} tokens and the context only {self.max_context}; "
                "shorten it or start a new conversation"
            )
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
            raise UsageError(f"the prompt has token ids outside 0 to {self.model.config.vocab_size - 1}")

    def _feed(self, ids: Sequence[int], progress: Progress | None) -> Prefill:
        began = perf_counter()
        cached = self._keep_prefix(ids)
        while len(self._ids) < len(ids) and not self._cancelled:
            self._forward(ids[len(self._ids) : len(self._ids) + self.chunk_size])
            if progress is not None:
                progress(len(self._ids) - cached, len(ids) - cached)
        return Prefill(len(self._ids), cached, perf_counter() - began)

    def _keep_prefix(self, ids: Sequence[int]) -> int:
        """Wind back to what ``ids`` has in common with the caches; how many tokens stay."""
        pairs = zip(self._ids, ids, strict=False)
        common = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._ids), len(ids)))
        if common == len(self._ids):
            return common
        if not self.cache.can_crop or self._seq is None:
            self._drop()
            return 0
        kept = min(common, len(ids) - 1)  # the last token has to be read again for its logits
        self.cache.rollback(self._seq, len(self._ids) - kept)
        del self._ids[kept:]
        return kept

    def _forward(self, piece: Sequence[int]) -> None:
        """Append ``piece`` to the caches and keep the logits after it."""
        try:
            if self._seq is None:
                self._seq = self.cache.add_sequence()
            self.cache.extend(self._seq, len(piece))
            batch = self.cache.batch({self._seq: piece})
            with torch.inference_mode():
                hidden = self.model(batch, self.cache.caches)
                self._logits = self.model.compute_logits(hidden, batch.last_rows)[0]
            self._ids += piece
        except BaseException:
            # Some layers may have advanced and others not, also where Ctrl-C came in between.
            self._drop()
            raise


class _Run:
    """One answer under way."""

    def __init__(
        self,
        session: Session,
        ids: list[int],
        sampler: Sampler,
        progress: Progress | None,
        thinking: ThinkingRules | None,
    ) -> None:
        self.session = session
        self.ids = ids
        self.sampler = sampler
        self.progress = progress
        self.turn = session._turn
        self.made: list[int] = []
        self.decode_seconds = 0.0
        self.decoder = session.tokenizer.stream()
        self.matcher = StopMatcher(sampler.params.stop)
        room, asked = session.max_context - len(ids), sampler.params.max_tokens
        self.limit = room if asked is None else min(room, asked)
        self.guide = None if thinking is None else ThinkingGuide(thinking, session.tokenizer, self.limit)
        self.ending = Ending(sampler.params, session.tokenizer.stop_ids, sampler.vocab_size)

    def events(self) -> Iterator[Event]:
        self._refuse_stale()
        prefill = self.session._feed(self.ids, self.progress)
        reason: Literal["stop", "length", "cancelled"] = "length"
        while len(self.made) < self.limit:
            self._refuse_stale()
            if self.session.cancelled:
                reason = "cancelled"
                break
            token = self._step()
            if self.ending.ends(token):
                reason = "stop"
                if self.guide is not None:
                    self.guide.stop()
                break
            text = self.decoder.push(token)
            matcher = None if self.ending.too_early(len(self.made)) else self.matcher
            if text := shown(self.guide, matcher, text, complete=self.decoder.complete):
                yield Piece(text)
            if self.matcher.matched is not None:
                reason = "stop"
                break
        if text := self.matcher.push(self.decoder.flush()) + self.matcher.flush():
            yield Piece(text)
        yield Finish(
            reason,
            tuple(self.made),
            len(self.ids),
            prefill.num_cached,
            prefill.num_tokens - prefill.num_cached,
            prefill.seconds,
            self.decode_seconds,
            self.sampler.seed,
            self.matcher.matched,
            0 if self.guide is None else self.guide.num_tokens,
            None if self.guide is None else self.guide.ended,
        )

    def _step(self) -> int:
        """Choose the next token; the one before it enters the caches only now, when it is needed."""
        began = perf_counter()
        if self.made:
            self.session._forward(self.made[-1:])
        token = self._sample() if self.guide is None else self.guide.choose(self._sample)
        self.sampler.record(token)
        if self.made:
            self.decode_seconds += perf_counter() - began
        self.made.append(token)
        return token

    def _sample(self) -> int:
        return self.sampler.sample(self.session._logits, self.ending.allowed(len(self.made), None))

    def _refuse_stale(self) -> None:
        if self.turn != self.session._turn:
            raise UsageError("this answer cannot go on: another one has begun in the same session")
