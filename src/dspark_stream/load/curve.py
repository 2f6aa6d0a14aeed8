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
"""Share of a measured time that is left at least for a shorter context or fewer slots: slopes may be measured wrong."""


class Company(NamedTuple):
    """What the cost of a round depends on, of its streams."""

    streams: int
    position: float
    """p̄: passes and drafts cost more the more context they read."""
    sampled: float = 0.0
    """Share of the streams that have a temperature."""


class CapacityCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a round's parts, measured at streams that hold ``context`` positions; linear between points.

    A round is drafting (its context features included), a target pass with acceptance, and the rest. All lists over
    ``streams`` may be left empty for nothing.
    """

    tokens: list[int]
    verify_ms: list[float]
    """A target pass over that many ``tokens`` of one stream."""
    streams: list[int]
    stream_ms: list[float]
    """What the same pass costs more when its tokens belong to that many ``streams``."""
    draft_ms: list[float]
    """Drafting whole blocks for that many ``streams``."""
    slot_ms: list[float] = []
    """Of ``draft_ms``, what every slot after the first takes."""
    rest_ms: list[float] = []
    """A round of that many ``streams`` outside drafting and the pass: committing, text, hand-over."""
    gamma: int = 1
    context: int = 0
    read_us: float = 0.0
    """Microseconds that a position of a stream's context costs a pass, however many rows the stream has."""
    attend_us: float = 0.0
    """Microseconds that it costs for every row."""
    sample_us: float = 0.0
    """Microseconds that every row of a stream with a temperature costs a pass beyond a greedy one, whatever its
    verification."""
    feature_us: float = 0.0
    """Microseconds that a position takes whose context features are handed over late."""

    def pass_ms(self, batch_tokens: Any, company: Company) -> Any:
        """A target pass over B tokens; B may be an array."""
        rows = np.asarray(batch_tokens)
        base = interpolated(self.tokens, self.verify_ms, rows)
        base = base + interpolated(self.streams, self.stream_ms, company.streams)
        read_us = self.read_us * company.streams + self.attend_us * rows
        context_ms = 1e-3 * (company.position - self.context) * read_us
        return np.maximum(base + context_ms, LEAST_OF_BASE * base) + 1e-3 * self.sample_us * company.sampled * rows

    def drafting_ms(self, drafting: Any, slots: Any) -> Any:
        """Drafting ``slots`` tokens for so many streams, at least one; both may be arrays."""
        spared = interpolated(self.streams, self.slot_ms, drafting) * (self.gamma - np.asarray(slots))
        return interpolated(self.streams, self.draft_ms, drafting) - spared

    def beside_ms(self, streams: int) -> float:
        """The rest of a round of R streams."""
        return float(interpolated(self.streams, self.rest_ms, streams))


def interpolated(xs: Sequence[int], ys: Sequence[float], x: Any) -> Any:
    """Linear between points, flat before the first, on with the last slope after the last; 0 without points."""
    if not ys:
        return np.zeros(np.shape(x))
    inside = np.interp(x, xs, ys)
    if len(xs) == 1:
        return inside
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return inside + slope * np.maximum(np.asarray(x) - xs[-1], 0)
