"""Prefix survival: how likely a draft token and all before it are to be accepted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul


def prefix_survival(confidence: Sequence[float]) -> list[float]:
    """a_k = c_1·…·c_k."""
    return list(accumulate(confidence, mul))


class AcceptanceHistory:
    """Acceptance by position over past rounds: the confidence of a drafter that has no confidence head.

    Only the past is used, so scheduling by it is lossless. It starts from a prior of 2 accepted in 4. Every round moves
    it a little back towards the prior, even if nothing was verified. So a position that was given up is tried again.
    """

    PRIOR = (2.0, 4.0)
    FADE = 0.005
    """Share of what was seen that a round forgets: the memory is some 200 rounds long."""

    def __init__(self, gamma: int) -> None:
        self._accepted = [self.PRIOR[0]] * gamma
        self._seen = [self.PRIOR[1]] * gamma

    def confidence(self) -> list[float]:
        """Estimated c_1 … c_γ."""
        return [a / n for a, n in zip(self._accepted, self._seen, strict=True)]

    def record(self, scheduled: int, accepted: int) -> None:
        """One round's outcome: x_1 … x_accepted were accepted; x_accepted+1 was not, if it was verified."""
        for k in range(len(self._seen)):
            self._accepted[k] += self.FADE * (self.PRIOR[0] - self._accepted[k])
            self._seen[k] += self.FADE * (self.PRIOR[1] - self._seen[k])
        for k in range(min(accepted + 1, scheduled)):
            self._seen[k] += 1.0
            self._accepted[k] += k < accepted
