"""Calibration of the confidence head: Sequential Platt Scaling (docs/decisions/012).

c_k = σ(logit_k / T_k + b_k). The paper's Sequential Temperature Scaling is the case b = 0. A temperature alone cannot
correct a head that promises too much everywhere. Greedy decoding, rejection and coupled verification accept with
different probabilities, so each has a calibration of its own. `decoding.platt` fits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, isfinite, log
from pathlib import Path
from typing import NamedTuple

import msgspec

from dspark_stream.errors import ConfigError, ModelLoadError
from dspark_stream.files import write_whole
from dspark_stream.types import Acceptance

CALIBRATION_FILE = "calibration.json"
BINS = 10
"""Equal bins of promised survival, in which promise and outcome are compared."""
LARGEST_LOGIT = 30.0


_BIASES: dict[Acceptance, str] = {
    "greedy": "greedy_bias",
    "rejection": "rejection_bias",
    "coupled": "coupled_bias",
}


class Scaling(NamedTuple):
    """T_1 … T_γ and b_1 … b_γ of one way to accept."""

    temperatures: list[float]
    biases: list[float]


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A temperature and a bias a position, for each way to accept; the file beside a drafter's weights.

    A position without a temperature counts as T = 1, one without a bias as b = 0. So older files without biases can be
    read.
    """

    greedy: list[float] = []
    rejection: list[float] = []
    coupled: list[float] = []
    greedy_bias: list[float] = []
    rejection_bias: list[float] = []
    coupled_bias: list[float] = []

    def scaling(self, acceptance: Acceptance, positions: int) -> Scaling:
        """Of one way to accept, for so many positions."""
        temperatures: list[float] = getattr(self, acceptance)
        biases: list[float] = getattr(self, _BIASES[acceptance])
        return Scaling(
            [*temperatures[:positions], *[1.0] * (positions - len(temperatures))],
            [*biases[:positions], *[0.0] * (positions - len(biases))],
        )

    def confidence(self, logits: Sequence[float], acceptance: Acceptance) -> list[float]:
        """c_1 … c_γ from confidence logits."""
        temperatures: list[float] = getattr(self, acceptance)
        biases: list[float] = getattr(self, _BIASES[acceptance])
        if len(temperatures) < len(logits) or len(biases) < len(logits):
            temperatures, biases = self.scaling(acceptance, len(logits))
        return [sigmoid(x / t + b) for x, t, b in zip(logits, temperatures, biases, strict=False)]

    def logits(self, confidence: Sequence[float], acceptance: Acceptance) -> list[float]:
        """The confidence logits that gave c_1 … c_γ."""
        scaling = self.scaling(acceptance, len(confidence))
        return [(logit(c) - b) * t for c, t, b in zip(confidence, *scaling, strict=True)]


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
            values: list[float] = getattr(calibration, name)
            if name.endswith("_bias"):
                if not all(map(isfinite, values)):
                    raise msgspec.ValidationError(f"biases must be finite - at `$.{name}`")
            elif not all(0 < t < inf for t in values):
                raise msgspec.ValidationError(f"temperatures must be above 0 - at `$.{name}`")
        return calibration
    except (OSError, ValueError, RecursionError) as error:  # ValueError: msgspec's, too
        raise ModelLoadError(f"{path}: {error}", param="drafter") from error


def save_calibration(calibration: Calibration, folder: Path) -> Path:
    """Write it beside a drafter's weights, whole or not at all.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = folder / CALIBRATION_FILE
    try:
        write_whole(path, msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}", param="drafter") from error
    return path


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
