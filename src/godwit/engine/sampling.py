"""Sampling: the parameters, and a sampler that chooses the tokens of one sequence.

The order is fixed: logit bias, repetition penalty, presence and frequency penalties, temperature, top-k,
top-p, min-p, draw. Each filter sees the probabilities of what the one before it has left, as in
``transformers``. Scores are float32; the probabilities of the candidates are float64.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from godwit.errors import GodwitError, UsageError
from godwit.kernels import native

#: Lower temperatures count as 0: the division would overflow, and the likeliest token wins anyway.
MIN_TEMPERATURE = 1e-5
MAX_BIAS = 1e6
MAX_TOKENS = 1 << 24
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_LOGPROBS = 20
#: This many of the likeliest tokens are filtered first; only if they do not suffice, the whole vocabulary is.
FEW = 64
#: Beyond this, sorting is faster than a partial selection.
MANY = 200
#: Ids per partial sum of probabilities.
STRETCH = 512

Row = NDArray[np.float32]
Ids = NDArray[np.int64]
Weights = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop; the defaults sample from the model's own distribution.

    Attributes:
        temperature: divides the scores, 0 to 100; 0 always takes the likeliest token, the lowest id on ties.
        top_k: keep the k likeliest tokens and those equal to the last of them; 0: no limit.
        top_p: keep the fewest tokens whose probabilities reach this, but at least one; 0 to 1.
        min_p: drop tokens whose probability is below this share of the highest one, 0 to 1.
        repetition_penalty: for tokens in prompt or answer, positive scores are divided by this and negative
            ones multiplied, as in ``transformers``; 0.01 to 100; 1 is off.
        presence_penalty, frequency_penalty: subtracted from the score of a token in the answer, once and for
            each occurrence; the prompt does not count. Both -2 to 2, as in OpenAI's API and vLLM.
        logit_bias: id -> what is added to its score; -inf bans it.
        seed: the same seed, prompt and machine give the same answer; None: a random seed.
        stop: the answer ends before any of these texts.
        max_tokens: length of the answer; 0 only reads the prompt; None: what the context has room for.
        min_tokens: no stop token is chosen and no stop text ends the answer before it has this many tokens.
        ignore_eos: the model's own stop tokens do not end the answer.
        stop_token_ids: more tokens that end the answer; their text is left out.
        logprobs: report each token's log probability, and those of this many likeliest tokens, 0 to 20; None
            reports nothing.
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
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises: UsageError for a value that is out of range."""
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS if self.max_tokens is None else self.max_tokens)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_ids(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


def _number(name: str, value: object, low: float, high: float) -> None:
    # The bounds are finite, so infinities and NaN are refused, too.
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


def _checked_ids(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, list | tuple) or len(ids) > MAX_STOP_IDS:
        raise UsageError(f"stop_token_ids has to be a list of up to {MAX_STOP_IDS} token ids")
    for token in ids:
        _integer("a token id in stop_token_ids", token, 0, 2**31 - 1)
    return tuple(ids)


class Sampler:
    """Chooses the tokens of one sequence.

    The filters look at the likeliest tokens only where those suffice, since sorting the whole vocabulary for
    each token would take longer than a step of a small model.

    Args:
        params: how to choose.
        vocab_size: number of ids; rows that only pad the model's head are never chosen.
        prompt_ids: count for the repetition penalty, besides the answer.

    Raises:
        UsageError: ``logit_bias`` names an unknown id.
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
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._repeating = params.repetition_penalty != 1
        self._counting = bool(params.presence_penalty or params.frequency_penalty)
        self._changing = self._repeating or self._counting or bool(params.logit_bias)
        self._filtering = bool(params.top_k or params.top_p < 1 or params.min_p)
        self._seen = Tally(token for token in set(prompt_ids) if self._repeating and token < vocab_size)
        self._made = Tally()

    def sample(self, logits: Tensor | Row, allowed: Tensor | None = None) -> int:
        """Choose an id by ``logits [V]``, of any dtype and device; V may exceed the vocabulary.

        Args:
            logits: raw scores of the model.
            allowed: bool ``[vocab_size]``, the tokens that a constraint allows; None: all.

        Raises:
            UsageError: the bias, the penalties or ``allowed`` leave no token.
            GodwitError: the logits are not finite numbers.
        """
        scores, peak = self._scores(logits, allowed)
        if self.params.greedy:
            return int(scores.argmax())
        point = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        if not self._filtering:
            return _draw(scores, peak, self.params.temperature, point)
        ids, weights = self._kept(scores, peak)
        return ids.item(_place(weights.cumsum(), point))

    def record(self, token: int) -> None:
        """Count ``token`` as part of the answer."""
        if self._repeating:
            self._seen.add(token)
        if self._counting:
            self._made.add(token)

    def candidates(
        self, logits: Tensor | Row, allowed: Tensor | None = None
    ) -> tuple[list[int], list[float]]:
        """The ids that may be chosen, ascending, and their probabilities.

        Raises: as :meth:`sample`.
        """
        scores, peak = self._scores(logits, allowed)
        if self.params.greedy:
            return [int(scores.argmax())], [1.0]
        ids, weights = self._kept(scores, peak)
        return ids.tolist(), (weights / weights.sum()).tolist()

    def scores(self, logits: Tensor | Row, allowed: Tensor | None = None) -> Row:
        """``logits`` with bias and penalties, ``[vocab_size]``; -inf where not allowed. It may be a view.

        Raises: as :meth:`sample`.
        """
        return self._scores(logits, allowed)[0]

    def _scores(self, logits: Tensor | Row, allowed: Tensor | None) -> tuple[Row, float]:
        """The scores and the largest of them."""
        scores = as_rows(logits)[: self.vocab_size]
        peak = float(scores.max())
        if not math.isfinite(peak):
            raise GodwitError(f"the model's scores are not numbers ({peak}); try --dtype float32")
        if not self._changing and allowed is None:
            return scores, peak
        scores = scores.copy()
        if len(self._bias):
            scores[self._bias_ids] += self._bias
        if self._repeating:
            ids = self._seen.ids
            scores[ids] = penalized(scores[ids], self.params.repetition_penalty)
        if self._counting:
            ids, params = self._made.ids, self.params
            scores[ids] -= params.presence_penalty + params.frequency_penalty * self._made.counts
        if allowed is not None:
            scores[~allowed.numpy()] = -math.inf
        peak = float(scores.max())
        if not math.isfinite(peak):
            raise UsageError("logit_bias and the penalties leave no token to choose; weaken them")
        return scores, peak

    def _kept(self, scores: Row, peak: float) -> tuple[Ids, Weights]:
        """The ids that the filters leave, ascending, and weights proportional to their probabilities."""
        params, size = self.params, len(scores)
        mass = None
        if params.top_p < 1 and not params.top_k:
            mass = float(_weights(scores, peak, params.temperature).sum())
        count, width = 0, max(FEW, params.top_k + 1)
        if self._filtering and width < min(size, MANY):
            values, likely = native.top_k(scores, width)
            count = num_kept(np.array(values), params, mass, whole=False)
        if count:
            ids = np.array(sorted(likely[:count]))
        else:
            ordered = np.sort(scores)[::-1]
            count = num_kept(ordered.astype(np.float64), params, mass, whole=True)
            ids = _largest(scores, ordered.item(count - 1), count)
        return ids, np.exp((scores[ids].astype(np.float64) - peak) / params.temperature)


class Tally:
    """Ids and how often each occurred, in arrays that grow."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        known = list(ids)
        self._places = {token: place for place, token in enumerate(known)}
        self._ids = np.array([*known, *[0] * 64], dtype=np.int64)
        self._counts = np.ones(len(self._ids), dtype=np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Row:
        return self._counts[: len(self._places)]

    def add(self, token: int) -> None:
        place = self._places.get(token)
        if place is not None:
            self._counts[place] += 1
            return
        place = self._places[token] = len(self._places)
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.ones_like(self._counts)))
        self._ids[place] = token


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities by the model itself: before bias, penalties, temperature and filters.

    Attributes:
        token_id, logprob: the chosen token and its log probability.
        top: the likeliest tokens and theirs, descending, on ties the lowest id first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @staticmethod
    def of(logits: Tensor | Row, vocab_size: int, token: int, num_top: int) -> TokenLogprobs:
        """From raw ``logits [V]``, of which the first ``vocab_size`` count."""
        logprobs = torch.tensor(as_rows(logits)[:vocab_size]).log_softmax(0).numpy()
        values, ids = native.top_k(logprobs, min(num_top, vocab_size))
        return TokenLogprobs(token, logprobs.item(token), tuple(zip(ids, values, strict=True)))


def as_rows(logits: Tensor | Row) -> Row:
    """Scores as a float32 NumPy array, on which small operations cost less than on a tensor."""
    if isinstance(logits, np.ndarray):
        return logits
    if logits.dtype != torch.float32 or logits.device.type != "cpu":
        logits = logits.to("cpu", torch.float32)
    rows: Row = (logits.detach() if logits.requires_grad else logits).numpy()
    return rows


def penalized(scores: Row, penalty: float) -> Row:
    """Scores reduced by the repetition penalty."""
    return np.where(scores > 0, scores / penalty, scores * penalty)


def num_kept(values: Weights, params: SamplingParams, mass: float | None, *, whole: bool) -> int:
    """How many of the largest scores the filters keep; 0 if ``values`` are too few to tell.

    Top-k also keeps what equals the k-th score. Top-p keeps the fewest whose probabilities reach p; on ties
    the first.

    Args:
        values: the largest scores, descending; more of them than top-k asks for.
        params: the filters.
        mass: sum of all weights, where the largest has weight 1; None: of those that top-k leaves.
        whole: these are all scores.
    """
    cut, peak = len(values), values.item(0)
    if values.item(-1) == -math.inf:
        cut, whole = int(np.count_nonzero(values > -math.inf)), True
    if 0 < params.top_k < cut:
        cut = int(np.count_nonzero(values >= values[params.top_k - 1]))
        if cut == len(values) and not whole:
            return 0
        whole = True
    if params.top_p < 1:
        reached = np.exp((values[:cut] - peak) / params.temperature).cumsum()
        place = int(reached.searchsorted(params.top_p * (reached.item(-1) if mass is None else mass)))
        if place < cut:
            cut, whole = place + 1, True
    if params.min_p:
        likely = int(np.count_nonzero(values[:cut] >= peak + params.temperature * math.log(params.min_p)))
        cut, whole = likely, whole or likely < cut
    return cut if whole else 0


def _weights(scores: Row, peak: float, temperature: float) -> Row:
    """Proportional to the probabilities; the largest score has weight 1."""
    weights = scores - np.float32(peak)
    weights *= np.float32(1 / temperature)
    np.exp(weights, out=weights)
    return weights


def _largest(scores: Row, least: float, count: int) -> Ids:
    """Ids of the ``count`` largest scores, the smallest of which is ``least``; on ties the lowest ids."""
    above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
    return np.sort(np.concatenate((above, equal[: count - len(above)])))


def _draw(scores: Row, peak: float, temperature: float, point: float) -> int:
    """The id at ``point``, 0 to 1, of the cumulative distribution.

    First a stretch of ids is found, then the id in it: float32 sums over a whole vocabulary would be too
    inexact, and float64 ones too slow.
    """
    weights = _weights(scores, peak, temperature)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), STRETCH)).cumsum(dtype=np.float64)
    stretch = _place(sums, point)
    before = sums.item(stretch - 1) if stretch else 0.0
    within = (point * sums.item(-1) - before) / (sums.item(stretch) - before)
    start = stretch * STRETCH
    return start + _place(weights[start : start + STRETCH].cumsum(dtype=np.float64), within)


def _place(cumulative: Weights, point: float) -> int:
    """The index at ``point``, 0 to 1, of the ``cumulative`` weights; never one of weight 0."""
    total = cumulative.item(-1)
    last = int(cumulative.searchsorted(total))
    return min(last, int(cumulative.searchsorted(point * total, "right")))
