"""Generation: one request in progress, from its tokens to the events of its stream."""

from __future__ import annotations

from collections import deque
from time import perf_counter

from torch import Tensor

from godwit.engine.cache.prefix import Hit
from godwit.engine.constraint.masks import MaskPool, Masks
from godwit.engine.ending import Ending
from godwit.engine.sampling import Row, Sampler, TokenLogprobs
from godwit.engine.scheduler import Sequence
from godwit.engine.scoring import PromptScores
from godwit.engine.stop_matcher import StopMatcher
from godwit.engine.stream import Channel, Finish, GenerationRequest, Piece, PromptScored, Reason, Started
from godwit.engine.thinking import ThinkingGuide, shown
from godwit.errors import GodwitError
from godwit.models.causal_lm import CausalLM
from godwit.text.tokenizer import Tokenizer


class Generation:
    """What one request needs besides its place in the caches: sampling, text, and times.

    No part of a stop text is emitted, nor a token whose text would be cut by one.
    """

    def __init__(
        self,
        request: GenerationRequest,
        sequence: Sequence,
        sampler: Sampler,
        tokenizer: Tokenizer,
        channel: Channel,
        pool: MaskPool,
    ) -> None:
        self.request = request
        self.sequence = sequence
        self.channel = channel
        self.drafted = self.accepted = 0
        self._sampler = sampler
        self._stop_ids = tokenizer.stop_ids
        self._ending = Ending(request.params, tokenizer.stop_ids, sampler.vocab_size)
        self._decoder = tokenizer.stream(shown=request.shown_ids)
        self._matcher = StopMatcher(request.params.stop)
        room = sequence.limit - sequence.num_prompt
        rules = request.thinking
        self._guide = None if rules is None else ThinkingGuide(rules, tokenizer, room)
        self.masks = None if request.constraint is None else Masks(request.constraint, pool)
        self._unshown: deque[tuple[int, int, TokenLogprobs | None]] = deque()  # (end in the text, token, ...)
        self._num_decoded = self._num_shown = 0
        self._submitted = perf_counter()
        self._admitted: float | None = None
        self._first: float | None = None
        self._last = self._submitted
        self._hit = Hit(0, None, "")
        self._stop_logprobs: TokenLogprobs | None = None
        self._scores: PromptScores | None = None
        if sequence.scored:
            self._scores = PromptScores(request.prompt_ids, sampler.vocab_size, request.params.logprobs or 0)

    @property
    def made(self) -> list[int]:
        """Tokens of the answer."""
        return self.sequence.ids[self.sequence.num_prompt :]

    @property
    def _num_made(self) -> int:
        return len(self.sequence.ids) - self.sequence.num_prompt

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that were cached."""
        return self._hit.position

    @property
    def foreseen(self) -> bool:
        """Whether the next token is already known, so that drafts are of no use."""
        return self._guide is not None and self._guide.forcing

    def begin(self, hit: Hit) -> None:
        """Note that it was admitted; ``hit``: what was cached of its prompt. Only the first time counts."""
        if self._admitted is None:
            self._admitted = perf_counter()
            self._hit = hit
            if self.masks is not None:
                self.masks.begin()
            self.channel.put(Started(hit.position))

    def score(self, model: CausalLM, first: int, hidden: Tensor) -> None:
        """Score the prompt by the trunk's output ``hidden [T, H]`` for the tokens from ``first`` on."""
        if self._scores is not None:
            self._scores.read(model, first, hidden)
            if self._scores.complete:
                self.channel.put(PromptScored(self._scores.whole()))
                self._scores = None

    def ready(self, seconds: float) -> bool:
        """Whether the next token can be chosen; waits up to ``seconds`` for its mask."""
        return self.masks is None or self.masks.ready(seconds)

    def choose(self, logits: Row) -> int:
        """Choose the next token by ``logits [V]`` and append it to the answer.

        Raises:
            GodwitError: no token can be chosen.
        """
        mask, guide = None if self.masks is None else self.masks.take(), self._guide
        token = (
            self._sample(logits, mask) if guide is None else guide.choose(lambda: self._sample(logits, mask))
        )
        self._sampler.record(token)
        self._last = perf_counter()
        if self._first is None:
            self._first = self._last
        self.sequence.ids.append(token)
        return token

    def _sample(self, logits: Row, allowed: Tensor | None) -> int:
        if allowed is not None and self._guide is not None and self._guide.mends_end:
            allowed = allowed.clone()
            allowed[[id for id in self._stop_ids if id < len(allowed)]] = True
        return self._sampler.sample(logits, self._ending.allowed(self._num_made, allowed))

    def push(self, token: int, logits: Row) -> Reason | None:
        """Emit the text that is certain after ``token``, which was chosen by ``logits``.

        Returns:
            Why the answer ends here; None if it goes on.
        """
        reason = self._push(token, logits)
        if reason is None and self.masks is not None:
            self.masks.accept(token, foreseen=self.foreseen)
        return reason

    def _push(self, token: int, logits: Row) -> Reason | None:
        top = self.request.params.logprobs
        logprobs = None if top is None else TokenLogprobs.of(logits, self._sampler.vocab_size, token, top)
        if self._ending.ends(token):
            self._stop_logprobs = logprobs
            if self._guide is not None:
                self._guide.stop()
            return "stop"
        text = self._decoder.push(token)
        self._num_decoded += len(text)
        self._unshown.append((self._num_decoded, token, logprobs))
        matcher = None if self._ending.too_early(self._num_made) else self._matcher
        if ready := shown(self._guide, matcher, text, complete=self._decoder.complete):
            self._show(ready)
        if self._matcher.matched is not None:
            return "stop"
        return "length" if len(self.sequence.ids) >= self.sequence.limit else None

    def finish(
        self,
        reason: Reason,
        error: str | None = None,
        *,
        refused: bool = False,
        fault: Exception | None = None,
        flush: bool = True,
    ) -> None:
        """Emit the remaining text, and the end; see :class:`Finish`. Without ``flush`` only the end."""
        if flush and self.masks is not None:
            self.masks.end()
        if flush:
            self._show(self._matcher.push(self._decoder.flush()) + self._matcher.flush())
        now = perf_counter()
        admitted = self._admitted or now
        first = self._first or now
        cached, num_prompt = self._hit.position, self.sequence.num_prompt
        self.channel.put(
            Finish(
                reason,
                tuple(self.made),
                num_prompt,
                cached,
                num_prompt - cached if self._first or reason == "length" else 0,
                first - admitted,
                max(0.0, self._last - first),
                self._sampler.seed,
                self._matcher.matched,
                0 if self._guide is None else self._guide.num_tokens,
                None if self._guide is None else self._guide.ended,
                queue_seconds=admitted - self._submitted,
                drafted=self.drafted,
                accepted=self.accepted,
                preemptions=self.sequence.num_preemptions,
                reuse_note=self._hit.note,
                error=error,
                refused=refused,
                fault=fault,
                stop_logprobs=self._stop_logprobs,
                speedup=self._speedup(max(0.0, self._last - first)),
            )
        )

    def _speedup(self, seconds: float) -> float | None:
        """Time without drafts over time with them, for the same number of running sequences."""
        saved = self.sequence.saved_seconds
        return None if saved is None or not seconds else max(0.0, seconds + saved) / seconds

    def _show(self, text: str) -> None:
        self._num_shown += len(text)
        ready = []
        while self._unshown and self._unshown[0][0] <= self._num_shown:
            ready.append(self._unshown.popleft())
        if text or ready:
            logprobs = tuple(one for _, _, one in ready if one is not None)
            asked = self.request.params.logprobs is not None
            self.channel.put(Piece(text, tuple(token for _, token, _ in ready), logprobs if asked else None))


def client_message(error: Exception) -> str:
    """The message about an error for clients."""
    return str(error) if isinstance(error, GodwitError) else "an internal error ended this request; try again"
