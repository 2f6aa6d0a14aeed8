"""The capacity curve: how long a round takes on this machine, as a function of what it carries.

Measured at start from real passes (engine/profile.py), kept on disk. Symbols: R streams, B target tokens of a round,
p̄ the streams' mean position, γ the draft block's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
LEAST_OF_BASE = 0.25
"""Share of a measured time that is left at least for a shorter context: its slope may be measured wrong."""


class Company(NamedTuple):
    """What the cost of a round depends on, of its streams."""

    streams: int
    position: float
    """p̄: passes cost more the more context they read."""


class CapacityCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a round's two large parts, measured at streams that hold ``context`` positions.

    A round is drafting (its context features included) and a target pass with acceptance. Linear between points.
    What else differs, say between one stream's rows and many streams', is less, and learnt (costs.py).
    """

    tokens: list[int]
    verify_ms: list[float]
    """A pass over that many ``tokens``."""
    streams: list[int]
    draft_ms: list[float]
    """Drafting whole blocks for that many ``streams``."""
    slot_ms: list[float] = []
    """Of ``draft_ms``, what every slot after the first takes; empty for nothing."""
    gamma: int = 1
    context: int = 0
    read_us: float = 0.0
    """Microseconds that a position of a stream's context costs a pass, however many rows the stream has."""
    attend_us: float = 0.0
    """Microseconds that it costs for every row."""
    feature_us: float = 0.0
    """Microseconds that a position takes whose context features are handed over late."""

    def pass_ms(self, batch_tokens: Any, company: Company) -> Any:
        """A target pass over B tokens; B may be an array."""
        base = interpolated(self.tokens, self.verify_ms, batch_tokens)
        read_us = self.read_us * company.streams + self.attend_us * np.asarray(batch_tokens)
        return np.maximum(base + 1e-3 * (company.position - self.context) * read_us, LEAST_OF_BASE * base)

    def drafting_ms(self, drafting: Any, slots: Any) -> Any:
        """Drafting ``slots`` tokens for so many streams, at least one; both may be arrays."""
        spared = interpolated(self.streams, self.slot_ms, drafting) * (self.gamma - np.asarray(slots))
        return interpolated(self.streams, self.draft_ms, drafting) - spared


def interpolated(xs: Sequence[int], ys: Sequence[float], x: Any) -> Any:
    """Linear between points, flat before the first, on with the last slope after the last; 0 without points."""
    if not ys:
        return np.zeros(np.shape(x))
    inside = np.interp(x, xs, ys)
    if len(xs) == 1:
        return inside
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return inside + slope * np.maximum(np.asarray(x) - xs[-1], 0)
