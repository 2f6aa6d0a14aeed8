"""How many draft tokens of each stream are worth verifying at this load (paper, Algorithm 1, and its variants).

Pure Python over the streams' prefix survivals: no tensor, no clock, no randomness. Which of these are lossless, and
why, is docs/decisions/010-schedules-that-keep-the-law.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

Survival = Sequence[float]
"""a_1 ≥ a_2 ≥ … of one stream; empty for a stream that did not draft."""
Worth = Callable[[float, float], float]
"""How good a round is, from the tokens that it is expected to commit and the milliseconds that it takes."""


class Candidate(NamedTuple):
    """What a schedule knows of one stream in a round."""

    survival: Survival
    """Of this round's draft."""
    exact: bool = False
    """Greedy, coupled or looked up: nothing that decides about ℓ can bias the text, so the search may be global."""
    earlier: Survival = ()
    """Survivals of the stream's drafts two rounds ago; empty where it had none."""


class RoundCost:
    """One round's milliseconds as a function of B, from ``first`` = R tokens on. All else is fixed."""

    def __init__(self, first: int, ms: Sequence[float]) -> None:
        self.first = first
        self.ms = list(ms)
        self._hull: RoundCost | None = None

    def __call__(self, batch_tokens: int) -> float:
        """Milliseconds at B."""
        return self.ms[batch_tokens - self.first]

    def within(self, slowest_ms: float) -> RoundCost:
        """The same, but sizes that take more than ``slowest_ms`` cost so much that none is chosen; B = R stays."""
        if max(self.ms) <= slowest_ms:
            return self
        return RoundCost(self.first, [self.ms[0], *(ms if ms <= slowest_ms else 1e9 for ms in self.ms[1:])])

    @property
    def hull(self) -> RoundCost:
        """The greatest convex function below it: without steps, on which an admission with early stop gets stuck."""
        if self._hull is None:
            self._hull = RoundCost(self.first, convex(self.ms))
        return self._hull


class Schedule(Protocol):
    """Chooses the verification length ℓ of every stream together."""

    looks_up: ClassVar[bool]
    """Whether drafts are also looked up in the streams' own texts: the paper's schedules know the drafter alone."""

    def slots(self, gamma: int) -> int | None:
        """Draft tokens that every stream proposes in every round; None: only where it pays (load/controller.py)."""

    def lengths(self, candidates: Sequence[Candidate], cost: RoundCost, price: float) -> list[int]:
        """ℓ_r for each stream, 0 ≤ ℓ_r ≤ len(survival).

        Args:
            candidates: the streams.
            cost: what the round takes as a function of B.
            price: tokens that a millisecond is worth at this load, from the past alone.
        """


def tokens_a_second(tokens: float, ms: float) -> float:
    """Θ = τ·SPS of Algorithm 1."""
    return tokens / ms


def admit(
    survival: Sequence[Survival],
    cost: Callable[[int], float],
    *,
    early_stop: bool = True,
    worth: Worth = tokens_a_second,
    already: Sequence[Survival] = (),
) -> list[int]:
    """Algorithm 1: admit (r, j) by falling survival, ties by j then r, to where the round is worth most.

    ``early_stop``: end at the first admission that does not raise the worth. That is what keeps rejection verification
    lossless: c_{j+1} depends on the sampled x_j, so a search that looks past a drop would let x_j decide its own
    admission. Without it the global maximum is found, which is lossless only for exact streams.

    Args:
        survival: what is up for admission; empty for a stream that is not.
        cost: milliseconds of a round over B tokens.
        early_stop: see above.
        worth: what is maximised.
        already: what has been admitted before of each stream, and stays.
    """
    lengths = [len(row) for row in already] or [0] * len(survival)
    batch_tokens = len(survival) + sum(lengths)
    expected = len(survival) + sum(map(sum, already))  # τ of the whole batch: one bonus token a stream
    best = worth(expected, cost(batch_tokens)) if batch_tokens else 0.0
    admitted = 0
    for count, a in enumerate(sorted((a for row in survival for a in row), reverse=True), 1):
        expected += a
        value = worth(expected, cost(batch_tokens + count))
        if value > best:
            best, admitted = value, count
        elif early_stop:
            break
    if admitted:
        order = sorted((-a, j, r) for r, row in enumerate(survival) for j, a in enumerate(row, 1))
        for _, j, r in order[:admitted]:
            lengths[r] = j
    return lengths


def pays(drafts: Iterable[Survival], cost: RoundCost, price: float) -> bool:
    """Whether any choice of these exact drafts' tokens is worth its time: what `Adaptive` finds out, sooner."""
    tokens = accumulate(sorted((a for row in drafts for a in row), reverse=True))
    return any(promised > price * (ms - cost.ms[0]) for promised, ms in zip(tokens, cost.ms[1:], strict=False))


def admit_mixed(candidates: Sequence[Candidate], cost: RoundCost, worth: Worth) -> list[int]:
    """The global maximum for exact streams, Algorithm 1 with early stop on the cost's hull for the others.

    Three steps: the best for exact streams, as if the others verified nothing; then the others beside that; then exact
    streams anew, beside what the others got. Of its own survivals, whether a rejection stream's x_j is admitted depends
    only on those up to a_j. Exact streams may depend on anything.
    """
    exact = [c.survival if c.exact else () for c in candidates]
    drawn = [() if c.exact else c.survival for c in candidates]
    if not any(exact):
        return admit(drawn, cost.hull, worth=worth)
    lengths = admit(exact, cost, early_stop=False, worth=worth)
    if not any(drawn):
        return lengths
    beside = [row[:length] for row, length in zip(exact, lengths, strict=True)]
    lengths = admit(drawn, cost.hull, worth=worth, already=beside)
    beside = [row[:length] for row, length in zip(drawn, lengths, strict=True)]
    return admit(exact, cost, early_stop=False, worth=worth, already=beside)


@dataclass(frozen=True)
class Adaptive:
    """Maximises tokens - price·ms, so that the throughput of all rounds is best and not that of each by itself.

    The price comes from the past. So a round with bad drafts is cut short, and one with good drafts takes all that pay;
    the round's own Θ would do neither. The search is global for exact streams. For the others it has early stop, on a
    cost without steps.
    """

    looks_up: ClassVar[bool] = True

    def slots(self, gamma: int) -> int | None:
        """See `Schedule`."""
        return None

    def lengths(self, candidates: Sequence[Candidate], cost: RoundCost, price: float) -> list[int]:
        """See `Schedule`."""
        return admit_mixed(candidates, cost, lambda tokens, ms: tokens - price * ms)


@dataclass(frozen=True)
class EarlyStop:
    """The paper's Algorithm 1 as it is printed: Θ = τ·SPS(B) of this round, early stop, for every stream."""

    looks_up: ClassVar[bool] = False

    def slots(self, gamma: int) -> int | None:
        """See `Schedule`."""
        return None

    def lengths(self, candidates: Sequence[Candidate], cost: RoundCost, price: float) -> list[int]:
        """See `Schedule`."""
        return admit([c.survival for c in candidates], cost)


@dataclass(frozen=True)
class Lagged:
    """The paper's production variant: a budget K of draft tokens from an unconstrained search over survivals two
    rounds old, then the K likeliest of those at hand.
    """

    looks_up: ClassVar[bool] = False

    def slots(self, gamma: int) -> int | None:
        """See `Schedule`."""
        return None

    def lengths(self, candidates: Sequence[Candidate], cost: RoundCost, price: float) -> list[int]:
        """See `Schedule`."""
        last = cost.first + len(cost.ms) - 1
        budget = sum(admit([c.earlier for c in candidates], lambda b: cost(min(b, last)), early_stop=False))
        order = sorted((-a, j, r) for r, c in enumerate(candidates) for j, a in enumerate(c.survival, 1))
        lengths = [0] * len(candidates)
        for _, j, r in order[:budget]:
            lengths[r] = j
        return lengths


@dataclass(frozen=True)
class Threshold:
    """Static: every draft token whose prefix survival is at least ``least``."""

    least: float

    looks_up: ClassVar[bool] = False

    def slots(self, gamma: int) -> int | None:
        """See `Schedule`."""
        return gamma

    def lengths(self, candidates: Sequence[Candidate], cost: RoundCost, price: float) -> list[int]:
        """See `Schedule`."""
        return [sum(a >= self.least for a in c.survival) for c in candidates]


@dataclass(frozen=True)
class Fixed:
    """Always ``length`` draft tokens, or the whole block where it is shorter; 0 is plain decoding."""

    length: int

    looks_up: ClassVar[bool] = False

    def slots(self, gamma: int) -> int | None:
        """See `Schedule`."""
        return min(self.length, gamma)

    def lengths(self, candidates: Sequence[Candidate], cost: RoundCost, price: float) -> list[int]:
        """See `Schedule`."""
        return [min(self.length, len(c.survival)) for c in candidates]


def convex(values: Sequence[float]) -> list[float]:
    """The greatest convex sequence below ``values`` (their lower hull)."""
    corners: list[int] = []
    for i, value in enumerate(values):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (values[b] - values[a]) * (i - b) < (value - values[b]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    hull = np.interp(np.arange(len(values)), corners, [values[i] for i in corners])
    return [float(v) for v in hull]


def parse_schedule(text: str) -> Schedule:
    """A schedule by its name; the configuration has checked it already."""
    kind, _, number = text.partition(":")
    match kind:
        case "none":
            return Fixed(0)
        case "fixed":
            return Fixed(int(number))
        case "threshold":
            return Threshold(float(number))
        case "early-stop":
            return EarlyStop()
        case "lagged":
            return Lagged()
        case _:
            return Adaptive()
