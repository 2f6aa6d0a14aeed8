"""Distributions as torch's tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_kernels.drawing.reference import draw, residual
from dspark_stream.models.distributions import Distributions


class Dense(Distributions):
    """As a tensor of probabilities [N, V]."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def probability(self, row: int, token: int) -> float:
        """See `Distributions.probability`."""
        return float(self._rows[row, token])

    def probabilities(self, row: int) -> Tensor:
        """See `Distributions.probabilities`."""
        return self._rows[row]

    def draw(self, row: int, uniform: float) -> int:
        """See `Distributions.draw`."""
        return draw(self._rows[row], uniform)

    def overlap(self, row: int, share: float, q: Tensor, draft_ids: Tensor | None) -> float:
        """See `Distributions.overlap`."""
        p = self._rows[row] if draft_ids is None else self._rows[row][draft_ids]
        return float(torch.minimum(p * share, q).sum())

    def draw_rest(self, row: int, uniform: float, share: float, q: Tensor, draft_ids: Tensor | None) -> int:
        """See `Distributions.draw_rest`."""
        device = self._rows.device
        ids = None if draft_ids is None else draft_ids.to(device)
        return draw(residual(self._rows[row], share, q.to(device), ids), uniform)
