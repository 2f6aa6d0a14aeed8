"""Confidence and prefix survival: how likely draft tokens are to be accepted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import exp
from operator import mul
from pathlib import Path

import msgspec

from dspark_stream.errors import ModelLoadError
from dspark_stream.types import Verification

CALIBRATION_FILE = "calibration.json"


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sequential Temperature Scaling: one temperature a position, c_k = σ(logit_k / T_k), for each verification."""

    rejection: list[float] = []
    coupled: list[float] = []

    def confidence(self, logits: Sequence[float], verification: Verification) -> list[float]:
        """c_1 … c_γ from confidence logits; a position without a temperature counts as T = 1."""
        temperatures = self.coupled if verification == "coupled" else self.rejection
        padded = [*temperatures, *[1.0] * (len(logits) - len(temperatures))]
        return [sigmoid(x / t) for x, t in zip(logits, padded, strict=False)]


def load_calibration(folder: Path) -> Calibration:
    """The calibration that lies beside a drafter's weights; the identity where there is none.

    Raises:
        ModelLoadError: the file is there and broken.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return Calibration()
    try:
        calibration = msgspec.json.decode(path.read_bytes(), type=Calibration)
        for name, temperatures in (("rejection", calibration.rejection), ("coupled", calibration.coupled)):
            if not all(0 < t < float("inf") for t in temperatures):
                raise msgspec.ValidationError(f"temperatures must be above 0 - at `$.{name}`")
        return calibration
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelLoadError(f"{path}: {error}", param="drafter") from error


def sigmoid(x: float) -> float:
    """σ(x), safe at both ends."""
    return 1.0 / (1.0 + exp(-x)) if x >= 0 else exp(x) / (1.0 + exp(x))


def prefix_survival(confidence: Sequence[float]) -> list[float]:
    """a_k = c_1·…·c_k."""
    return list(accumulate(confidence, mul))


class AcceptanceHistory:
    """Acceptance by position over past rounds: the confidence of a drafter that has no confidence head.

    Only the past goes in, so scheduling by it is lossless. Starts from a prior of 2 accepted in 4, and every round
    fades a little back towards it, also one that sent nothing: so a position that was given up is tried again.
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
        """One round's outcome: positions 1 … accepted passed, the next one failed if it was sent."""
        for k in range(len(self._seen)):
            self._accepted[k] += self.FADE * (self.PRIOR[0] - self._accepted[k])
            self._seen[k] += self.FADE * (self.PRIOR[1] - self._seen[k])
        for k in range(min(accepted + 1, scheduled)):
            self._seen[k] += 1.0
            self._accepted[k] += k < accepted
