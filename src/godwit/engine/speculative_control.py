"""How many drafts are worth verifying: what was accepted, what verifying cost, and the choice by both.

All costs are relative to a step without drafts for as many sequences, which is measured too, now and then.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

#: Share of the time that may be lost on trying whether drafts pay after all.
PROBE_SHARE = 0.01
#: A choice has to promise so much more speed than none.
MARGIN = 1.04
#: Steps with drafts after which one without measures anew what those are compared with.
REFRESH = 32
#: Steps with drafts after which one draft more than seems best is tried.
DEEPER = 24
#: Steps without drafts that are measured before any with them.
WARM_UP = 3
_MAX_CREDIT = 4.0  # steps that tries may cost at once
_LEAST_LOSS = 0.1  # steps that a try counts at least
_NEWEST = 0.15  # share of the newest measurement, at least
_NEGLIGIBLE = 0.02


@dataclass
class Mean:
    """A mean that follows what it measures, but not far for a value that is out of all proportion."""

    value: float
    count: int = 0

    def learn(self, value: float, tolerance: float) -> None:
        self.count += 1
        error = value - self.value
        if self.count > 1:
            error = max(-tolerance, min(tolerance, error))
        self.value += error * max(1 / self.count, _NEWEST)


class Curve:
    """A cost by the number of drafts: 0 for none, straight between whole numbers.

    Where nothing was measured yet, it is proportional to the nearest that was.
    """

    def __init__(self, size: int, slope: float) -> None:
        self._points = [Mean(slope * x) for x in range(size + 2)]

    def at(self, x: float) -> float:
        low = min(int(x), len(self._points) - 2)
        first, second = self._points[low].value, self._points[low + 1].value
        return first + (x - low) * (second - first)

    @property
    def known(self) -> int:
        """The largest number of drafts that was measured."""
        return max((number for number, point in enumerate(self._points) if point.count), default=0)

    def learn(self, x: float, value: float) -> None:
        """Between whole numbers the nearer one learns, in proportion."""
        if x <= 0:
            return
        place = min(max(1, round(x)), len(self._points) - 1)
        point = self._points[place]
        value = max(0.0, value) * place / x
        if not point.count:  # it may be a disturbance
            value = min(value, point.value + place)
        point.learn(value, max(0.5, abs(point.value)))
        known = [number for number, other in enumerate(self._points) if other.count]
        for number, other in enumerate(self._points):
            if number and not other.count:
                nearest = min(known, key=lambda one: abs(one - number))
                other.value = self._points[nearest].value * number / nearest


class Acceptance:
    """Shares of drafts that were accepted, by kind: of one sequence, leaning on those of all before.

    Each is of the drafts of which all before were accepted; old ones count ever less.
    """

    PRIOR = 0.5
    _OWN, _ALL = 0.9, 0.99  # what is left of the weight of a draft when the next one comes
    _LEAN = 3.0

    def __init__(self, shared: Acceptance | None = None) -> None:
        self._shared = shared
        self._counts: dict[int, tuple[float, float]] = {}

    def learn(self, kind: int, accepted: bool) -> None:
        hits, trials = self._counts.get(kind, (0.0, 0.0))
        keep = self._ALL if self._shared is None else self._OWN
        self._counts[kind] = hits * keep + accepted, trials * keep + 1
        if self._shared is not None:
            self._shared.learn(kind, accepted)

    def estimate(self, kind: int) -> float:
        """The probability that the next draft of this kind is accepted."""
        before = self.PRIOR if self._shared is None else self._shared.estimate(kind)
        hits, trials = self._counts.get(kind, (0.0, 0.0))
        return (hits + self._LEAN * before) / (trials + self._LEAN)


@dataclass(frozen=True)
class Option:
    """For one sequence the probability of each further draft, all before accepted, by where it comes from."""

    lookup: Seq[float] = ()
    mtp: Seq[float] = ()


@dataclass(frozen=True)
class Choice:
    """Drafts for one sequence."""

    depth: int = 0
    mtp: bool = False


@dataclass(frozen=True)
class Measured:
    """A step: how many sequences, drafts among them, tokens that came of it, and how long it took.

    ``draft_seconds`` of it the MTP module took for ``draft_depth`` passes; None: it did more than usual.
    """

    num_sequences: int
    num_drafts: int
    num_tokens: int
    seconds: float
    draft_depth: int = 0
    draft_seconds: float | None = 0.0


@dataclass
class _Costs:
    """Of about as many sequences, in steps without drafts."""

    rows: Curve
    drafting: Curve


@dataclass
class Controller:
    """Chooses drafts so that tokens come fastest; none where they do not pay, but for rare tries.

    Args:
        max_depth: drafts for a sequence in a step, at most.
    """

    max_depth: int
    credit: float = 0.0  # seconds that tries may cost now
    probing: bool = False
    _plain: dict[int, Mean] = field(default_factory=dict)
    _costs: dict[int, _Costs] = field(default_factory=dict)
    _since_plain: int = 0
    _deepened: int = 0
    _tried: int = 0

    def plain_seconds(self, num_sequences: int) -> float | None:
        """Of a step without drafts, as far as it was measured."""
        known = self._plain.get(num_sequences)
        return None if known is None or known.count < WARM_UP else known.value

    def choose(self, options: Seq[Option]) -> list[Choice]:
        """How many drafts for each sequence of the next step."""
        self.probing = False
        none = [Choice()] * len(options)
        plain = self.plain_seconds(len(options))
        if plain is None or self._since_plain >= REFRESH or not any(o.lookup or o.mtp for o in options):
            return none
        gain, choices = self._best(options)
        if gain <= MARGIN:
            return self._probe(options, plain) or none
        self.probing = not self._of(len(options)).rows.known
        return self._carefully(self._deepen(options, choices))

    def learn(self, step: Measured) -> None:
        """Take in how a step went."""
        count, seconds = step.num_sequences, step.seconds
        plain = self._plain.setdefault(count, Mean(seconds))
        if not step.num_drafts:
            self._since_plain = 0
            plain.learn(seconds, plain.value)
            self.credit = min(self.credit + PROBE_SHARE * seconds, _MAX_CREDIT * plain.value)
            return
        self._since_plain += 1
        costs = self._of(count)
        if step.draft_seconds is not None:
            costs.rows.learn(step.num_drafts / count, (seconds - step.draft_seconds) / plain.value - 1)
            costs.drafting.learn(step.draft_depth, step.draft_seconds / plain.value)
        if self.probing:
            loss = seconds - step.num_tokens / count * plain.value
            loss = min(loss, 2 * plain.value + loss / 4)  # a disturbance must not end all tries
            self.credit -= max(loss, _LEAST_LOSS * plain.value)

    def gain(self, options: Seq[Option], choices: Seq[Choice]) -> float:
        """How many times as fast as without drafts, as it is expected."""
        tokens = float(len(options))
        for option, choice in zip(options, choices, strict=True):
            tokens += sum(_expected((option.mtp if choice.mtp else option.lookup)[: choice.depth]))
        costs = self._of(len(options))
        depth = max((choice.depth for choice in choices if choice.mtp), default=0)
        rows = sum(choice.depth for choice in choices)
        return tokens / len(options) / (1 + costs.drafting.at(depth) + costs.rows.at(rows / len(options)))

    def _of(self, num_sequences: int) -> _Costs:
        size = num_sequences.bit_length()
        if size not in self._costs:
            self._costs[size] = _Costs(Curve(self.max_depth, 0.2), Curve(self.max_depth, 0.15))
        return self._costs[size]

    def _best(self, options: Seq[Option]) -> tuple[float, list[Choice]]:
        """The choice that promises most: for each depth of MTP drafts, the drafts likeliest to be right."""
        count, costs = len(options), self._of(len(options))
        lookups = [_expected(option.lookup) for option in options]
        mtps = [_expected(option.mtp) for option in options]
        best, picked = 1.0, (0, list[tuple[float, int, bool]]())
        for depth in range(1 + max(len(mtp) for mtp in mtps)):
            gains = []
            for number, (lookup, mtp) in enumerate(zip(lookups, mtps, strict=True)):
                by_mtp = depth > 0 and sum(mtp[:depth]) > sum(lookup)
                gains += [
                    (gain, number, by_mtp)
                    for gain in (mtp[:depth] if by_mtp else lookup)
                    if gain > _NEGLIGIBLE
                ]
            gains.sort(key=lambda one: -one[0])
            tokens, fixed = float(count), 1 + costs.drafting.at(depth)
            for rows, (gain, _, _) in enumerate(gains, 1):
                tokens += gain
                speed = tokens / count / (fixed + costs.rows.at(rows / count))
                if speed > best:
                    best, picked = speed, (rows, gains)
        depths = [0] * count
        by_mtps = [False] * count
        for _, number, by_mtp in picked[1][: picked[0]]:
            depths[number] += 1
            by_mtps[number] = by_mtp
        return best, [Choice(*one) for one in zip(depths, by_mtps, strict=True)]

    def _probe(self, options: Seq[Option], plain: float) -> list[Choice] | None:
        """A try of one or two drafts, if it can be paid."""
        depth = 1 + self._tried % 2
        choices = [
            Choice(min(depth, len(option.mtp or option.lookup)), bool(option.mtp)) for option in options
        ]
        tokens = 1.0
        loss = plain * max(_LEAST_LOSS, tokens / max(self.gain(options, choices), 0.1) - tokens)
        if self.credit < min(loss, _MAX_CREDIT / 2 * plain):
            return None
        self._tried += 1
        self.probing = True
        return choices

    def _carefully(self, choices: list[Choice]) -> list[Choice]:
        """Not more than one draft beyond what was measured."""
        most = self._of(len(choices)).rows.known + 1
        return [Choice(min(choice.depth, most), choice.mtp) for choice in choices]

    def _deepen(self, options: Seq[Option], choices: list[Choice]) -> list[Choice]:
        """Now and then one draft more, of which nothing would be learned otherwise."""
        self._deepened += 1
        if self._deepened % DEEPER:
            return choices
        return [
            Choice(min(choice.depth + 1, len(option.mtp if choice.mtp else option.lookup)), choice.mtp)
            if choice.depth
            else choice
            for option, choice in zip(options, choices, strict=True)
        ]


def _expected(chances: Seq[float]) -> list[float]:
    """Tokens that each further draft is expected to give: all before it have to be right too."""
    expected, all_right = [], 1.0
    for chance in chances:
        all_right *= chance
        expected.append(all_right)
    return expected
