"""Choosing the next token: what may be asked for, and a sampler that does it for one sequence.

The order is fixed: logit bias, repetition penalty, presence and frequency penalty, temperature, top-k, top-p,
min-p, choice. Each filter sees the probabilities of what the one before it has left, as in ``transformers``.
All arithmetic is float32.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from godwit.errors import GodwitError, UsageError
from godwit.kernels import native

#: Below this a temperature counts as 0: the division would overflow, and the likeliest token wins anyway.
MIN_TEMPERATURE = 1e-5
MAX_BIAS = 1e6
MAX_TOKENS = 1 << 24
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to end; the defaults sample from the model's own distribution.

    Attributes:
        temperature: divides the scores, 0 to 100; 0 always takes the likeliest token, of equal ones the one
            with the lowest id.
        top_k: keep the k likeliest tokens and those equal to the last of them; 0 is no limit.
        top_p: keep the fewest tokens whose probabilities reach this, more than 0 and at most 1.
        min_p: drop tokens less likely than this share of the likeliest one, 0 to 1.
        repetition_penalty: of the tokens in prompt and answer, positive scores are divided by this and
            negative ones multiplied, as in ``transformers``; 0.01 to 100, 1 is off.
        presence_penalty, frequency_penalty: taken from the score of a token once if it is in the answer, and
            once for each time it is; the prompt does not count. Both -2 to 2, as in OpenAI's API and vLLM.
        logit_bias: id -> what is added to its score; -inf bans it.
        seed: the same seed, prompt and machine give the same answer; None draws one.
        stop: texts before which an answer ends.
        max_tokens: length of an answer; None is what the context has room for.
        logprobs: report the logarithm of each token's probability, and those of the so many likeliest, 0 to
            20; None reports nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises: UsageError for a value that makes no sense."""
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1)
        if not self.top_p:
            raise UsageError("top_p has to be more than 0: no token would be left to choose")
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stops(self.stop))

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


def _number(name: str, value: object, low: float, high: float) -> None:
    # The bounds are finite, so they also refuse infinities, and NaN is within none.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UsageError(f"{name} has to be a number from {low:g} to {high:g}, and not {value!r:.50}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} has to be a whole number from {low} to {high}, and not {value!r:.50}")


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise UsageError("logit_bias has to map token ids to numbers")
    for token, value in bias.items():
        _integer("a token id in logit_bias", token, 0, 2**31 - 1)
        if value != -math.inf:
            _number(f"the logit_bias of token {token}", value, -MAX_BIAS, MAX_BIAS)
    return dict(bias)


def _checked_stops(stops: object) -> tuple[str, ...]:
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise UsageError("stop has to be a list of texts")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise UsageError(f"stop takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters each")
    return tuple(stops)


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        params: what was asked for.
        vocab_size: ids below this exist; rows that only pad the model's head are never chosen.
        prompt_ids: what the repetition penalty looks at besides the answer.

    Raises:
        UsageError: ``logit_bias`` names an id that does not exist.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt_ids: Iterable[int] = ()) -> None:
        unknown = sorted(token for token in params.logit_bias if token >= vocab_size)
        if unknown:
            raise UsageError(f"logit_bias names token {unknown[0]}, but the ids end at {vocab_size - 1}")
        self.params = params
        self.vocab_size = vocab_size
        self.seed: int = secrets.randbits(32) if params.seed is None else params.seed
        self._generator = torch.Generator()
        self._generator.manual_seed(self.seed)
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen[[token for token in set(prompt_ids) if token < vocab_size]] = True
        self._counts = torch.zeros(vocab_size)

    def sample(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """An id chosen by ``logits [V]``, of any dtype and device; V may exceed the vocabulary.

        Args:
            logits: raw scores of the model.
            allowed: bool ``[vocab_size]``, the tokens that a constraint leaves; None leaves all.

        Raises:
            UsageError: the bias, the penalties or ``allowed`` leave no token to choose.
            GodwitError: the logits are not numbers.
        """
        if self.params.greedy:
            return int(self.scores(logits, allowed).argmax())
        ids, probs = self.candidates(logits, allowed)
        # One number a token, in float64: 150,000 float32 probabilities do not add up to 1 closely enough.
        cumulative = probs.double().cumsum(0)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        last = torch.searchsorted(cumulative, cumulative[-1])
        return int(ids[torch.searchsorted(cumulative, point, right=True).minimum(last)])

    def record(self, token: int) -> None:
        """Count ``token`` as a part of the answer."""
        self._seen[token] = True
        self._counts[token] += 1

    def candidates(self, logits: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ids that may be chosen, ``[C]`` ascending, and their probabilities ``[C]``, float32.

        Raises: as :meth:`sample`.
        """
        params, scores = self.params, self.scores(logits, allowed)
        if params.greedy:
            return scores.argmax()[None], torch.ones(1)
        scores = scores / params.temperature
        ids = torch.arange(self.vocab_size)
        if params.top_k:
            kept = top_k_mask(scores, params.top_k)
            scores, ids = scores[kept], ids[kept]
        if params.top_p < 1:
            kept = top_p_mask(scores, params.top_p)
            scores, ids = scores[kept], ids[kept]
        if params.min_p:
            kept = min_p_mask(scores, params.min_p)
            scores, ids = scores[kept], ids[kept]
        return ids, scores.softmax(0)

    def scores(self, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        """``logits`` with bias and penalties, ``[vocab_size]`` float32 on the CPU; -inf where not allowed.

        Raises: as :meth:`sample`.
        """
        params = self.params
        scores = logits[: self.vocab_size].to("cpu", torch.float32, copy=True)
        if not math.isfinite(peak := scores.max().item()):
            raise GodwitError(f"the model's scores are not numbers ({peak}); try --dtype float32")
        if params.logit_bias:
            scores[self._bias_ids] += self._bias
        if params.repetition_penalty != 1:
            scores = penalize_repetition(scores, self._seen, params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            scores = penalize_counts(scores, self._counts, params.presence_penalty, params.frequency_penalty)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        if not math.isfinite(scores.max().item()):
            raise UsageError("logit_bias and the penalties leave no token to choose; weaken them")
        return scores


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the model itself found a token: before bias, penalties, temperature and filters.

    Attributes:
        token_id, logprob: the token chosen, and the logarithm of its probability.
        top: the likeliest tokens with theirs, falling, of equal ones the lowest id first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @staticmethod
    def of(logits: Tensor, vocab_size: int, token: int, num_top: int) -> TokenLogprobs:
        """From raw ``logits [V]``; ids from ``vocab_size`` on do not exist."""
        logprobs = logits[:vocab_size].to("cpu", torch.float32).log_softmax(0)
        ids: list[int] = []
        if num_top:
            least = logprobs.topk(min(num_top, vocab_size)).values[-1]
            likely = (logprobs >= least).nonzero()[:, 0]
            order = logprobs[likely].argsort(descending=True, stable=True)
            ids = likely[order][:num_top].tolist()
        top = tuple((index, logprobs[index].item()) for index in ids)
        return TokenLogprobs(token, logprobs[token].item(), top)


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores ``[V]`` with those of the tokens ``seen [V]`` (bool) brought down by a factor."""
    weakened = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen, weakened, scores)


def penalize_counts(scores: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """Scores ``[V]`` less ``presence`` where ``counts [V]`` is not 0, less ``frequency`` times the count."""
    return scores - presence * (counts > 0) - frequency * counts


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Which of ``scores [C]`` are the k largest, or equal to the k-th: bool ``[C]``."""
    if k >= scores.shape[0]:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores >= native.kth_largest(scores, k)


def top_p_mask(scores: Tensor, p: float) -> Tensor:
    """Which of ``scores [C]`` are the fewest whose probabilities reach p: bool ``[C]``, at least one."""
    ordered, order = scores.sort(descending=True, stable=True)
    probs = ordered.softmax(0).double()
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, order, probs.cumsum(0) - probs < p)


def min_p_mask(scores: Tensor, share: float) -> Tensor:
    """Which of ``scores [C]`` are at least ``share`` times as likely as the largest: bool ``[C]``."""
    return scores - scores.max() >= math.log(share)
