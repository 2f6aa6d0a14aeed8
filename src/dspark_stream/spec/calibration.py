"""Calibration of the confidence head: Sequential Temperature Scaling (design/algorithm.md, "Calibration").

c_k = σ(logit_k / T_k). The temperatures are chosen one position after the other, each so that the prefix survival
a_k = c_1·…·c_k comes closest to the share of rounds that really accepted 1 … k. Greedy decoding, rejection and
coupled verification accept with different probabilities, so each has temperatures of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, log
from pathlib import Path
from typing import NamedTuple

import msgspec

from dspark_stream.errors import ConfigError, ModelLoadError
from dspark_stream.types import Acceptance

CALIBRATION_FILE = "calibration.json"
BINS = 10
"""Equal bins of promised survival, in which promise and outcome are compared."""
SEARCHED = [2.0 ** (i / 16) for i in range(-48, 49)]
"""Temperatures that are tried: 1/8 … 8, each 4 % above the one before."""
LARGEST_LOGIT = 30.0


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One temperature a position, for each way to accept; the file beside a drafter's weights."""

    greedy: list[float] = []
    rejection: list[float] = []
    coupled: list[float] = []

    def confidence(self, logits: Sequence[float], acceptance: Acceptance) -> list[float]:
        """c_1 … c_γ from confidence logits; a position without a temperature counts as T = 1."""
        temperatures: list[float] = getattr(self, acceptance)
        padded = [*temperatures, *[1.0] * (len(logits) - len(temperatures))]
        return [sigmoid(x / t) for x, t in zip(logits, padded, strict=False)]


def load_calibration(folder: Path) -> Calibration | None:
    """The calibration that lies beside a drafter's weights; None where there is none.

    Raises:
        ModelLoadError: the file is there and broken.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return None
    try:
        calibration = msgspec.json.decode(path.read_bytes(), type=Calibration)
        for name in Calibration.__struct_fields__:
            if not all(0 < t < inf for t in getattr(calibration, name)):
                raise msgspec.ValidationError(f"temperatures must be above 0 - at `$.{name}`")
        return calibration
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelLoadError(f"{path}: {error}", param="drafter") from error


def save_calibration(calibration: Calibration, folder: Path) -> Path:
    """Write it beside a drafter's weights, whole or not at all.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = folder / CALIBRATION_FILE
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}", param="drafter") from error
    return path


class Observed(NamedTuple):
    """One round in which every draft token was verified."""

    logits: Sequence[float]
    accepted: int


def fit_temperatures(rounds: Sequence[Observed], gamma: int) -> list[float]:
    """T_1 … T_γ; of equally good temperatures the one nearest to 1. [] without rounds."""
    if not rounds:
        return []
    before = [1.0] * len(rounds)  # a_{k-1} of each round, by the temperatures found so far
    temperatures: list[float] = []
    for k in range(gamma):
        logits, held = [r.logits[k] for r in rounds], [r.accepted > k for r in rounds]
        tried = {t: [a * sigmoid(x / t) for a, x in zip(before, logits, strict=True)] for t in SEARCHED}
        best = min(SEARCHED, key=lambda t: (expected_calibration_error(tried[t], held), abs(log(t))))
        temperatures.append(round(best, 4))
        before = tried[best]
    return temperatures


class Bin(NamedTuple):
    """Rounds whose promised survival falls between two bounds: a row of a reliability diagram."""

    promised: float
    held: float
    rounds: int


def reliability(promised: Sequence[float], held: Sequence[bool]) -> list[Bin]:
    """Mean promise and share that held in `BINS` equal bins; empty bins are left out."""
    sums = [[0.0, 0.0, 0.0] for _ in range(BINS)]
    for promise, outcome in zip(promised, held, strict=True):
        into = sums[min(int(promise * BINS), BINS - 1)]
        into[0] += promise
        into[1] += outcome
        into[2] += 1
    return [Bin(p / n, h / n, int(n)) for p, h, n in sums if n]


def expected_calibration_error(promised: Sequence[float], held: Sequence[bool]) -> float:
    """Σ over bins of |mean promise − share that held|, weighted by how much falls into the bin."""
    bins = reliability(promised, held)
    return sum(b.rounds * abs(b.promised - b.held) for b in bins) / max(1, len(promised))


def sigmoid(x: float) -> float:
    """σ(x), safe at both ends."""
    return 1.0 / (1.0 + exp(-x)) if x >= 0 else exp(x) / (1.0 + exp(x))


def logit(c: float) -> float:
    """The x of which σ(x) = c, within ± `LARGEST_LOGIT`."""
    if not 0 < c < 1:
        return LARGEST_LOGIT if c >= 1 else -LARGEST_LOGIT
    return max(-LARGEST_LOGIT, min(LARGEST_LOGIT, log(c / (1 - c))))
