"""Everything that a captured round reads and writes of its streams, at addresses that never change.

A seat is a row of every column. The host writes a seat when a stream sits down (`bind`); from then on the round moves
anchor and position on by itself. Symbols: S seats, γ block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dspark_kernels.admission import BUDGET
from dspark_kernels.noise.reference import signed
from dspark_kernels.streams import COUPLED, GREEDY, REJECTION, Sampling
from dspark_stream.models.adjustment import Adjustment
from dspark_stream.types import Acceptance, SamplingParams

MODES: dict[Acceptance, int] = {"greedy": GREEDY, "rejection": REJECTION, "coupled": COUPLED}
ALL_THAT_FITS = 1 << 30
"""The budget of the BUDGET rule where the rows of the pass are the limit."""


@dataclass(frozen=True)
class Seat:
    """What a stream brings when it sits down."""

    anchor: int
    position: int
    limit: int
    """The position at which its last allowed token stands: no round starts there."""
    slot: int
    """Store slot of its position 0."""
    drafts: bool
    acceptance: Acceptance
    sampling: SamplingParams
    round_key: int
    """64 unsigned bits."""
    temperatures: Sequence[float]
    """T_1 … T_γ of its way to accept."""
    biases: Sequence[float] = ()
    """b_1 … b_γ of it."""


class RoundState:
    """Static columns for S seats. All tensors are on the models' device."""

    def __init__(self, seats: int, gamma: int, rows: int, device: torch.device) -> None:
        self.seats, self.gamma, self.device = seats, gamma, device
        self._longs = torch.zeros(5, seats, dtype=torch.long, device=device)
        self._ints = torch.zeros(5, seats, dtype=torch.int32, device=device)
        self._reals = torch.ones(3, seats, dtype=torch.float32, device=device)
        self.position, self.limit, self.slot, self.seed, self.round_key = self._longs.unbind(0)
        self.anchor, self.mode, self.top_k, self.active, self.drafting = self._ints.unbind(0)
        self.temperature, self.top_p, self.min_p = self._reals.unbind(0)
        self.calibration = torch.ones(seats, gamma, dtype=torch.float32, device=device)
        self.shift = torch.zeros(seats, gamma, dtype=torch.float32, device=device)
        """b_k·T_k, added to confidence logits before T_k divides them: σ(x/T + b)."""
        self.history = torch.zeros(gamma, dtype=torch.float32, device=device)
        """Confidence logits of the past, for a drafter without a confidence head."""
        self.rule = torch.tensor([BUDGET, ALL_THAT_FITS], dtype=torch.int32, device=device)
        self.sps = torch.ones(rows + 1, dtype=torch.float32, device=device)
        # accepted, bonus, ℓ, then x_1 … x_γ
        self.outcome = torch.zeros(seats, 3 + gamma, dtype=torch.int32, device=device)
        self.survival = torch.zeros(seats, gamma, dtype=torch.float32, device=device)
        self.adjustments: list[Adjustment | None] = []
        """Of each seat, for a round that is run operation by operation, since the host knows what was generated. Empty:
        nobody is adjusted, as in every captured round."""

    def sampling(self, seats: int) -> Sampling:
        """The first seats' columns as operations take them."""
        return Sampling(
            self.mode[:seats],
            self.temperature[:seats],
            self.top_k[:seats],
            self.top_p[:seats],
            self.min_p[:seats],
            self.seed[:seats],
            self.round_key[:seats],
            self.position[:seats],
        )

    def bind(self, taken: Sequence[Seat]) -> None:  # on the way between two rounds: no tensor is made a seat
        """Seat streams at 0, 1, …; every other seat is nobody's. One small copy a kind of column."""
        longs = np.zeros((5, self.seats), np.int64)
        ints = np.zeros((5, self.seats), np.int32)
        reals = np.ones((3, self.seats), np.float32)
        calibration = np.ones((self.seats, self.gamma), np.float32)
        shift = np.zeros((self.seats, self.gamma), np.float32)
        for i, s in enumerate(taken):
            p = s.sampling
            longs[:, i] = s.position, s.limit, s.slot, p.seed, signed(s.round_key)
            ints[:, i] = s.anchor, MODES[s.acceptance], min(p.top_k, 1 << 30), 1, s.drafts
            reals[:, i] = p.temperature if s.acceptance != "greedy" else 1.0, p.top_p, p.min_p
            fitted = s.temperatures[: self.gamma]
            calibration[i, : len(fitted)] = fitted
            biases = s.biases[: self.gamma]
            shift[i, : len(biases)] = biases * calibration[i, : len(biases)]
        for device, host in (
            (self._longs, longs),
            (self._ints, ints),
            (self._reals, reals),
            (self.calibration, calibration),
            (self.shift, shift),
        ):
            device.copy_(torch.from_numpy(host))

    def clear(self) -> None:
        """Nobody sits anywhere: a round over this state changes no stream's cache."""
        self.active.zero_()
        self.adjustments = []
