"""When to draft and how much: acceptance rates against measured costs, within a budget of lost time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from godwit.engine.speculation.estimates import RecentMedian

#: Share of the time that each source of drafts may lose; there are two, so drafting costs 1 % at most.
SHARE = 0.005
#: Drafts have to promise so much more speed: estimates of what seems best are optimistic.
MARGIN = 0.1
#: Gains that may be lost again, in steps: a few refused drafts in a row do not end drafting that pays.
MAX_GAIN = 4.0
#: Losses that have to be made good, in steps: a stall during a probe does not end drafting for long.
MAX_LOSS = 10.0
#: A step is charged at most so many times its expected duration; what takes longer is a disturbance.
MAX_CHARGE = 2.0
#: Steps without drafts that are timed before any drafts are compared with them: the first ones are cold.
WARM_UP = 3
#: Steps with drafts after which one without is timed, so that the comparison stays current.
REFRESH = 32
#: Steps that pass untimed while drafting is off: timing them all takes 1 to 3 % of a small model's time.
MAX_REST = 15


class BatchKind(NamedTuple):
    """Batches whose plain steps take about equally long: sequences, and bits of their total length."""

    size: int
    length: int


class DraftChoice(NamedTuple):
    """Drafts for the next step: the number of the source, and how many for each sequence."""

    source: int
    depths: list[int]


@dataclass
class TimedStep:
    """A step that decodes; times in seconds.

    Attributes:
        num_tokens: tokens of answers that came of it.
        seconds: its whole duration.
        source, num_drafts: what is verified in it.
        search_seconds: spent looking for drafts where none were found worth verifying.
        catch_up_seconds: spent on what is done only once before drafting begins.
        num_untimed: steps that passed untimed before it.
    """

    kind: BatchKind
    num_tokens: int = 0
    seconds: float = 0.0
    source: int = 0
    num_drafts: int = 0
    search_seconds: float = 0.0
    catch_up_seconds: float = 0.0
    num_untimed: int = 0


@dataclass
class SourceAccount:
    """What one source of drafts costs and has gained.

    Attributes:
        costs: by batch size, the cost of one draft for each sequence, as a share of a plain step.
        balance: seconds gained by its drafts and granted to it, less those lost; drafts need a positive one.
    """

    costs: defaultdict[int, RecentMedian] = field(default_factory=lambda: defaultdict(RecentMedian))
    balance: float = 0.0


class Controller:
    """Drafts where that is expected to be faster; otherwise probes rarely whether it has become so.

    Whatever drafts cost and however few are accepted, decoding takes at most :data:`SHARE` longer for each
    source than without any: a source that has lost more may not draft until time has made up for it.

    For each step :meth:`wants_drafts` comes first, :meth:`choose` if so, :meth:`learn` at the end.
    """

    def __init__(self, num_sources: int = 2) -> None:
        self._plain: defaultdict[BatchKind, RecentMedian] = defaultdict(RecentMedian)
        self._accounts = [SourceAccount() for _ in range(num_sources)]
        self._step_seconds = 0.0
        self._since_plain = 0
        self._rest = 0
        self._may_probe = True
        self._num_probes = 0

    def plain_seconds(self, kind: BatchKind) -> float | None:
        """Duration of a step without drafts; None until it is known."""
        times = self._plain[kind]
        return times.value if len(times) >= WARM_UP else None

    def wants_drafts(self, kind: BatchKind) -> bool:
        """Whether to look for drafts in the next step."""
        if self.plain_seconds(kind) is None or self._since_plain >= REFRESH:
            return False
        return any(map(self.may_draft, range(len(self._accounts))))

    def may_draft(self, source: int, ahead: int = 0) -> bool:
        """Whether the balance of a source permits drafts, now or after ``ahead`` steps."""
        return self._accounts[source].balance + ahead * SHARE * self._step_seconds > 0

    def choose(self, size: int, rates: Seq[Seq[Seq[float]]]) -> DraftChoice | None:
        """Drafts for the next step, or None.

        Args:
            size: sequences in the step.
            rates: of each source, for each sequence, the rates of its drafts; none for a source or a sequence
                without drafts.
        """
        best, best_gain = None, 1 + MARGIN
        for source, (account, of_source) in enumerate(zip(self._accounts, rates, strict=False)):
            if costs := account.costs[size]:
                gain, depths = best_depths(size, of_source, costs.value)
                if gain > best_gain:
                    best, best_gain = DraftChoice(source, depths), gain
        return best or self._probe(size, rates)

    def learn(self, step: TimedStep) -> int:
        """Learn from a step; how many of the next ones may pass untimed while the batch stays the same."""
        times, num_plain = self._plain[step.kind], self._since_plain
        if step.num_drafts:
            self._since_plain += 1
        else:
            times.add(step.seconds - step.search_seconds)
            self._since_plain = 0
        plain = self.plain_seconds(step.kind)
        if plain is None:
            return 0
        self._step_seconds = plain
        self._grant((1 + step.num_untimed) * SHARE * plain, plain)
        if step.num_drafts:
            self._charge(step, plain)
        for account in self._accounts:
            account.balance -= step.search_seconds / len(self._accounts)
        self._rest = 0 if step.num_drafts or num_plain >= REFRESH else min(2 * self._rest + 1, MAX_REST)
        all_accepted = step.num_drafts > 0 and step.num_tokens == step.kind.size + step.num_drafts
        self._may_probe = all_accepted or self._rest == MAX_REST
        return self._rest

    def _probe(self, size: int, rates: Seq[Seq[Seq[float]]]) -> DraftChoice | None:
        """One draft for each sequence, to learn what drafts cost and whether they are accepted now.

        Probes are rare: after a full rest, after one that was accepted, and where the cost is unknown.
        """
        possible = [
            source
            for source, (account, of_source) in enumerate(zip(self._accounts, rates, strict=False))
            if any(of_source) and (self._may_probe or not account.costs[size])
        ]
        if not possible:
            return None
        self._num_probes += 1
        source = possible[self._num_probes % len(possible)]
        return DraftChoice(source, [min(1, len(each)) for each in rates[source]])

    def _grant(self, seconds: float, plain: float) -> None:
        for account in self._accounts:
            account.balance = min(account.balance + seconds, MAX_GAIN * plain)

    def _charge(self, step: TimedStep, plain: float) -> None:
        account, size = self._accounts[step.source], step.kind.size
        costs, depth = account.costs[size], step.num_drafts / size
        seconds = step.seconds - step.catch_up_seconds
        costs.add(max(0.0, seconds / plain - 1) / depth)
        expected = plain * (1 + costs.value * depth)
        lost = min(seconds, MAX_CHARGE * expected) + step.catch_up_seconds - plain * step.num_tokens / size
        account.balance = min(max(account.balance - lost, -MAX_LOSS * plain), MAX_GAIN * plain)


def best_depths(size: int, rates: Seq[Seq[float]], cost: float) -> tuple[float, list[int]]:
    """How many drafts of each sequence give the most tokens in a time, and how many times as many as none.

    Args:
        size: sequences in the step, each of which gives a token in any case.
        rates: for each sequence the rates of its drafts.
        cost: of one draft for each sequence, as a share of a step without drafts.
    """
    chances = [(chance, number) for number, each in enumerate(rates) for chance in accumulate(each, mul)]
    depths, tokens, seconds = [0] * len(rates), 1.0, 1.0
    for chance, number in sorted(chances, reverse=True):
        if chance * seconds <= cost * tokens:
            break
        tokens, seconds = tokens + chance / size, seconds + cost / size
        depths[number] += 1
    return tokens / seconds, depths
