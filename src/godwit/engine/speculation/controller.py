"""How many drafts are worth verifying: what was accepted, what verifying cost, and the choice by both.

All costs are relative to a step without drafts for as many sequences, which real steps tell. For each size of
batch drafting is on or off. Off, only a rare look is taken whether it may pay by now; looks and tries are
paid from a small share of the time, and each try that lost makes the next one dearer.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from godwit.engine.speculation.estimates import Curve, Median, Patience

#: Share of the time that looks may take, and share that may be lost on tries.
LOOK_SHARE = 0.003
TRY_SHARE = 0.007
#: Drafting begins where so much more speed than without is expected, and a step has drafts for so much.
BEGIN_GAIN = 1.2
STEP_GAIN = 1.1
#: Steps without drafts that are measured before any with them.
WARM_UP = 3
#: Steps with drafts after which one without measures anew what those are compared with.
REFRESH = 32
#: Steps with drafts after which one draft more than seems best is tried.
DEEPER = 32
#: Steps in a row without a draft after which drafting ends.
IDLE = 4
#: Steps in a row that try drafts of which nobody knows yet how many are right.
BURST = 8
#: What a step has to gain beyond what is measured of it, in steps: not all that it costs is seen.
SURCHARGE = 0.04
#: Steps between two of which the time is taken while drafting is off.
REST = 14
_KEEP = 0.95  # what is left of a gain or loss one step later
_MOST_LOST = 1.0  # steps that may be lost of late before drafting ends
_MOST_GAINED = 4.0  # steps that make up for losses later
_MOST_CREDIT = 4.0  # steps
_MOST_CHARGED = 10.0  # steps: what took longer was a disturbance
_FIRST_TRY = 1024  # the same of drafts that promise nothing, at first
_NEGLIGIBLE = 0.02


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
    Before it ``num_slept`` steps went by unseen.
    """

    num_sequences: int
    num_drafts: int
    num_tokens: int
    seconds: float
    draft_depth: int = 0
    draft_seconds: float | None = 0.0
    num_slept: int = 0


@dataclass
class Level:
    """What is known of batches of about the same size; gains are in steps without drafts.

    Attributes:
        on: drafts are considered in every step.
        hopeful: MTP drafts would pay if all of them were right.
        begins, tries: when drafting may begin again after it lost, and when drafts may be tried that do not
            promise enough.
        look_seconds: what a look takes.
        balance, net: gained by drafts of late, and since drafting began, in steps.
        idle: steps in a row for which no draft was worth it.
        deepened: steps since one draft more than seems best was tried.
    """

    rows: Curve
    drafting: Curve
    on: bool = False
    hopeful: bool = True
    begins: Patience = field(default_factory=Patience)
    tries: Patience = field(default_factory=lambda: Patience(0, _FIRST_TRY, _FIRST_TRY))
    look_seconds: float = 0.0
    balance: float = 0.0
    net: float = 0.0
    idle: int = 0
    deepened: int = 0


@dataclass
class Controller:
    """Chooses drafts so that tokens come fastest; none where they do not pay, but for rare tries.

    In each step :meth:`wants` comes first; if it says so, :meth:`choose` follows. :meth:`learn` ends it.

    Args:
        max_depth: drafts for a sequence in a step, at most.
    """

    max_depth: int
    credit: float = 2.0  # steps that tries may cost now
    stake: float = 2.0  # steps that drafting may lose now
    look_credit: float = 0.0  # seconds that looks may take now
    trying: bool = False
    _looked: bool = False
    _plain: dict[int, Median] = field(default_factory=dict)
    _levels: dict[int, Level] = field(default_factory=dict)
    _since_plain: int = 0
    _fresh: bool = False
    _again: bool = False
    _tried: int = 0

    def plain_seconds(self, num_sequences: int) -> float | None:
        """Of a step without drafts, as far as it was measured."""
        known = self._plain.get(num_sequences)
        return None if known is None or known.count < WARM_UP else known.value

    def wants(self, num_sequences: int) -> bool:
        """Whether drafts of the next step are worth a thought."""
        self._looked = self.trying = False
        if self.plain_seconds(num_sequences) is None:
            return False
        level = self.level(num_sequences)
        if level.on:
            self._looked = self._since_plain < REFRESH
        else:  # a step without a look first, so that what drafts are compared with is new
            self._looked = self._again or (self._fresh and self.look_credit >= level.look_seconds)
        return self._looked

    def rest(self, num_sequences: int) -> int:
        """After a step: how many of the next ones need not be seen, as long as no sequence comes or goes."""
        level = self.level(num_sequences)
        if level.on or self._again or self.plain_seconds(num_sequences) is None:
            return 0
        if self._fresh and not self._looked and self.look_credit >= level.look_seconds:
            return 0
        self._fresh = False
        return REST

    def allows_mtp(self, num_sequences: int, ahead: int = 0) -> bool:
        """Whether MTP drafts could pay if all were right, or may be tried ``ahead`` steps from now."""
        level = self.level(num_sequences)
        return level.hopeful if level.on else self._again or level.tries.wait <= ahead

    def looked(self, num_sequences: int, seconds: float) -> None:
        """A look that led to no draft has taken so long."""
        level = self.level(num_sequences)
        level.look_seconds = seconds if not level.look_seconds else 0.5 * (level.look_seconds + seconds)
        self.look_credit -= seconds
        if level.on:
            level.idle += 1
            plain = self.plain_seconds(num_sequences) or seconds
            self._judge(level, -seconds / plain)
            if level.on and level.idle >= IDLE:
                self._end(level)

    def choose(self, options: Seq[Option]) -> list[Choice]:
        """How many drafts for each sequence of the next step."""
        level = self.level(len(options))
        gain, choices = self._best(options)
        if not level.on:
            return self._begin(level, gain, options, choices)
        if gain <= STEP_GAIN:
            return [Choice()] * len(options)
        level.idle = 0
        return self._carefully(self._deepen(level, options, choices))

    def learn(self, step: Measured) -> None:
        """Take in how a step went."""
        count, seconds = step.num_sequences, step.seconds
        known = self._plain.setdefault(count, Median())
        level = self.level(count)
        if not step.num_drafts and not self._looked:
            self._since_plain, self._fresh = 0, True
            known.learn(seconds)
        if not known.count:
            return
        plain, num_steps = known.value, 1 + step.num_slept
        self.look_credit = min(self.look_credit + LOOK_SHARE * num_steps * plain, plain)
        self.credit = min(self.credit + TRY_SHARE * num_steps, _MOST_CREDIT)
        self.stake = min(self.stake + TRY_SHARE * num_steps, _MOST_CREDIT)
        level.begins.wait -= num_steps
        level.tries.wait -= num_steps
        if level.on:
            self._since_plain += 1
        if step.num_drafts:
            if step.draft_seconds is not None:
                verified = (seconds - step.draft_seconds) / plain - 1
                level.rows.learn(step.num_drafts / count, verified)
                level.drafting.learn(step.draft_depth, step.draft_seconds / plain)
                level.hopeful = any(
                    1 + depth > STEP_GAIN * (1 + level.drafting.at(depth) + level.rows.at(depth))
                    for depth in range(1, self.max_depth)
                )
            gained = max(-_MOST_CHARGED, step.num_tokens / count - seconds / plain)
            if level.on:
                self._judge(level, max(-_MOST_LOST - 1, gained))
            else:
                self.credit += min(gained, -0.1)
                # where the module had to read much first, or may pay, one step does not tell
                self._tried += step.draft_seconds is not None
                self._again = not self._tried or (level.hopeful and self.credit > 0 and self._tried < BURST)
                if not self._again:
                    self._tried = 0
                    level.tries.fail()

    def gain(self, options: Seq[Option], choices: Seq[Choice]) -> float:
        """How many times as fast as without drafts, as it is expected."""
        tokens = float(len(options))
        for option, choice in zip(options, choices, strict=True):
            tokens += sum(_expected((option.mtp if choice.mtp else option.lookup)[: choice.depth]))
        level = self.level(len(options))
        depth = max((choice.depth for choice in choices if choice.mtp), default=0)
        rows = sum(choice.depth for choice in choices)
        return tokens / len(options) / (1 + level.drafting.at(depth) + level.rows.at(rows / len(options)))

    def level(self, num_sequences: int) -> Level:
        """What is known of batches of about this size."""
        size = num_sequences.bit_length()
        if size not in self._levels:
            self._levels[size] = Level(Curve(self.max_depth, 0.2), Curve(self.max_depth, 0.2))
        return self._levels[size]

    # on and off

    def _begin(self, level: Level, gain: float, options: Seq[Option], choices: list[Choice]) -> list[Choice]:
        """Begin to draft where that promises much, or try what is not known well; else nothing."""
        none = [Choice()] * len(options)
        if gain > BEGIN_GAIN and level.begins.wait <= 0 < self.stake:
            level.on = True
            return self._carefully(choices)
        if not self._again and (level.tries.wait > 0 or self.credit <= 0):
            return none
        self.trying, self._again = True, False
        return [Choice(min(1, len(option.mtp or option.lookup)), bool(option.mtp)) for option in options]

    def _judge(self, level: Level, gained: float) -> None:
        """A step with drafts gained so many steps without, or lost them."""
        gained -= SURCHARGE
        level.net += gained
        level.balance = min(_KEEP * level.balance + gained, _MOST_GAINED)
        if level.balance < -_MOST_LOST:
            self._end(level)

    def _end(self, level: Level) -> None:
        """Drafting is off; how it went tells when it may begin again."""
        if level.net > 0:
            level.begins.succeed()
            level.tries.succeed()
        else:
            level.begins.fail()
            self.stake += min(level.net, -0.1)
        level.on, level.idle, level.balance, level.net = False, 0, 0.0, 0.0

    # which drafts

    def _best(self, options: Seq[Option]) -> tuple[float, list[Choice]]:
        """The choice that promises most: for each depth of MTP drafts, the drafts likeliest to be right."""
        count, level = len(options), self.level(len(options))
        lookups = [_expected(option.lookup) for option in options]
        mtps = [_expected(option.mtp) for option in options]
        best, picked = 1.0, (0, list[tuple[float, int, bool]]())
        for depth in range(1 + max(map(len, mtps))):
            fixed = 1 + level.drafting.at(depth)
            if depth and 1 + max(map(sum, (*(mtp[:depth] for mtp in mtps), *lookups))) < best * fixed:
                continue  # not even if all could be as sure as the surest
            gains = list[tuple[float, int, bool]]()
            for number, (lookup, mtp) in enumerate(zip(lookups, mtps, strict=True)):
                by_mtp = depth > 0 and sum(mtp[:depth]) > sum(lookup)
                found = mtp[:depth] if by_mtp else lookup
                gains += [(gain, number, by_mtp) for gain in found if gain > _NEGLIGIBLE]
            gains.sort(key=lambda one: -one[0])
            tokens = float(count)
            for rows, (gain, _, _) in enumerate(gains, 1):
                tokens += gain
                speed = tokens / count / (fixed + level.rows.at(rows / count))
                if speed > best:
                    best, picked = speed, (rows, gains)
        depths = [0] * count
        by_mtps = [False] * count
        for _, number, by_mtp in picked[1][: picked[0]]:
            depths[number] += 1
            by_mtps[number] = by_mtp
        return best, [Choice(*one) for one in zip(depths, by_mtps, strict=True)]

    def _carefully(self, choices: list[Choice]) -> list[Choice]:
        """Not more than one draft beyond what was measured."""
        most = self.level(len(choices)).rows.known + 1
        return [Choice(min(choice.depth, most), choice.mtp) for choice in choices]

    def _deepen(self, level: Level, options: Seq[Option], choices: list[Choice]) -> list[Choice]:
        """Now and then one draft more, of which nothing would be learned otherwise."""
        level.deepened += 1
        if level.deepened % DEEPER:
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
