"""Fitting a calibration: Sequential Platt Scaling, one position after the other, by maximum likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dspark_stream.decoding.calibration import LARGEST_LOGIT, Scaling

SEARCHED = [2.0 ** (i / 16) for i in range(-32, 33)]
"""Temperatures that are tried: 1/4 … 4, each 4 % above the one before."""
PRIOR = 10.0
"""Weight of log² T / 2 and b² / 2 beside the rounds' log-likelihood: it pulls towards T = 1, b = 0.

For b it weighs as much as some 40 rounds at c = ½. Thousands of rounds overrule it. A position that few rounds reach
hardly changes.
"""

Floats = NDArray[np.float64]


class Observed(NamedTuple):
    """One round in which every draft token was verified."""

    logits: Sequence[float]
    accepted: int


def fit_scaling(rounds: Sequence[Observed], gamma: int) -> Scaling:
    """T and b of every position; empty without rounds.

    Position k is fitted to the rounds that accepted 1 … k-1: their outcome at k is a coin of probability c_k. If all
    factors are right, so is the product a_k.
    """
    if not rounds:
        return Scaling([], [])
    logits = np.array([r.logits for r in rounds], dtype=np.float64)  # [rounds, γ]
    accepted = np.array([r.accepted for r in rounds])
    fitted = [_fit_position(logits[accepted >= k, k], accepted[accepted >= k] > k) for k in range(gamma)]
    return Scaling([round(t, 4) for t, _ in fitted], [round(b, 4) for _, b in fitted])


def _fit_position(logits: Floats, held: NDArray[np.bool_]) -> tuple[float, float]:
    """T and b of least penalised log-loss: a search over T; for each T the best b is a convex problem."""
    y = held.astype(np.float64)

    def loss(t: float, b: float) -> float:
        x = np.clip(logits / t + b, -LARGEST_LOGIT, LARGEST_LOGIT)
        return float((np.logaddexp(0, x) - y * x).sum()) + PRIOR * (log(t) ** 2 + b * b) / 2

    tried = [(t, _fit_bias(logits / t, y)) for t in SEARCHED]
    return min(tried, key=lambda one: loss(*one))


def _fit_bias(x: Floats, y: Floats) -> float:
    """The b of least penalised log-loss of σ(x + b) against y, by Newton's method."""
    b = 0.0
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x + b, -LARGEST_LOGIT, LARGEST_LOGIT)))
        step = (float((p - y).sum()) + PRIOR * b) / (float((p * (1 - p)).sum()) + PRIOR)
        b -= max(-1.0, min(1.0, step))
        if abs(step) < 1e-6:
            break
    return b
