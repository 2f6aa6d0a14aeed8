"""How many draft tokens of each stream are worth verifying at this load (paper, Algorithm 1).

Pure Python over the streams' prefix survivals: no tensor, no clock, no randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Survival = Sequence[float]
"""a_1 ≥ a_2 ≥ … of one stream; empty for a stream that did not draft."""


class Schedule(Protocol):
    """Chooses the verification length ℓ of every stream together."""

    def lengths(self, survival: Sequence[Survival], sps: Callable[[int], float]) -> list[int]:
        """ℓ_r for each stream, 0 ≤ ℓ_r ≤ len(survival[r]).

        Args:
            survival: each stream's prefix survivals.
            sps: rounds a second as a function of the batch tokens B.
        """


def admit(survival: Sequence[Survival], sps: Callable[[int], float], *, early_stop: bool = True) -> list[int]:
    """Algorithm 1: maximise Θ = τ·SPS(B), admitting (r, j) by falling survival, ties by j then r.

    ``early_stop``: end at the first admission that does not raise Θ. That is what keeps rejection verification
    lossless: c_{j+1} depends on the sampled x_j, so a search that looks past a drop would let x_j decide its own
    admission. Without it the global maximum is found, which is lossless only where verification is coupled.
    """
    order = sorted((-a, j, r) for r, row in enumerate(survival) for j, a in enumerate(row, 1))
    lengths = [0] * len(survival)
    batch_tokens = len(survival)
    expected = float(len(survival))  # τ of the whole batch: one bonus token a stream
    best = expected * sps(batch_tokens) if batch_tokens else 0.0
    admitted = 0
    for count, (negative, _, _) in enumerate(order, 1):
        expected -= negative
        theta = expected * sps(batch_tokens + count)
        if theta > best:
            best, admitted = theta, count
        elif early_stop:
            break
    for _, j, r in order[:admitted]:
        lengths[r] = j
    return lengths


@dataclass(frozen=True)
class Adaptive:
    """Algorithm 1 with early stop."""

    def lengths(self, survival: Sequence[Survival], sps: Callable[[int], float]) -> list[int]:
        """See `Schedule`."""
        return admit(survival, sps)


@dataclass(frozen=True)
class Fixed:
    """Always ``length`` draft tokens, or the whole block where it is shorter."""

    length: int

    def lengths(self, survival: Sequence[Survival], sps: Callable[[int], float]) -> list[int]:
        """See `Schedule`."""
        return [min(self.length, len(row)) for row in survival]


def parse_schedule(text: str) -> Schedule:
    """``adaptive`` or ``fixed:N``; the configuration has checked it already."""
    kind, _, length = text.partition(":")
    return Fixed(int(length)) if kind == "fixed" else Adaptive()
