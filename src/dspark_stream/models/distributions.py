"""What tokens are drawn from: torch's tensors (`spec/sampling.py`), or rows of weights on the CPU kernels (here).

Symbols: N rows, V vocabulary, Vd draft vocabulary. Uniforms are in [0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_kernels.cpu import Walked, Weights

Ints = npt.NDArray[np.int32]


class Distributions(Protocol):
    """Distributions of some rows."""

    def probability(self, row: int, token: int) -> float:
        """Of one token of a row."""

    def probabilities(self, row: int) -> Tensor:
        """Of a row [V], float32."""

    def draw(self, row: int, uniform: float) -> int:
        """A token of a row, by inverse transform; never one of probability 0."""

    def overlap(self, row: int, share: float, q: Tensor, draft_ids: Tensor | None) -> float:
        """Σ min(share · p, q) over the vocabulary; q and draft_ids as for `draw_rest`."""

    def draw_rest(self, row: int, uniform: float, share: float, q: Tensor, draft_ids: Tensor | None) -> int:
        """A token of max(share · p - q, 0), of p where rounding leaves nothing of that.

        Args:
            row: p.
            uniform: what decides.
            share: in (0, 1].
            q: probabilities [Vd], taken to be 0 for all other tokens.
            draft_ids: the tokens that they are of [Vd], ascending; None: all.
        """


class NativeDistributions:
    """`Distributions` on the CPU kernels: rows of `Weights` from ``first`` on, over the tokens ``ids`` (None: all)."""

    def __init__(self, weights: Weights, first: int = 0, ids: Ints | None = None) -> None:
        self._weights, self._first, self._draft_ids = weights, first, ids

    def probability(self, row: int, token: int) -> float:
        """See `Distributions.probability`."""
        return self._weights.probability(self._first + row, token)

    def probabilities(self, row: int) -> Tensor:
        """See `Distributions.probabilities`."""
        return torch.from_numpy(self._weights.probabilities(self._first + row))

    def draw(self, row: int, uniform: float) -> int:
        """See `Distributions.draw`."""
        return self._weights.draw(self._first + row, uniform)

    def overlap(self, row: int, share: float, q: Tensor, draft_ids: Tensor | None) -> float:
        """See `Distributions.overlap`."""
        return self._weights.overlap(self._first + row, share, q.numpy(), _ids(draft_ids))

    def draw_rest(self, row: int, uniform: float, share: float, q: Tensor, draft_ids: Tensor | None) -> int:
        """See `Distributions.draw_rest`."""
        return self._weights.draw_rest(self._first + row, uniform, share, q.numpy(), _ids(draft_ids))

    def judge(
        self,
        first: int,
        tokens: Sequence[int],
        q: NativeDistributions,
        indices: Sequence[int],
        accept: Sequence[float],
        uniform: float,
    ) -> tuple[int, int]:
        """How many of the drafts ``tokens`` stand, and the bonus token: `spec.accept.rejection` in one call."""
        return self._weights.judge(
            self._first + first, tokens, q._weights, q._first, indices, q._draft_ids, accept, uniform
        )


def _ids(draft_ids: Tensor | None) -> Ints | None:
    return None if draft_ids is None else draft_ids.numpy().astype(np.int32)


class Walk(NamedTuple):
    """Blocks of R streams, g ≤ γ slots each, drafted in one call."""

    tokens: list[list[int]]  # [R, g], target ids
    logits: list[list[float]] | None  # [R, g], of confidence
    walked: Walked
    draft_ids: Ints | None  # [Vd]

    def indices(self, r: int) -> list[int]:
        """A stream's drafts as draft vocabulary indices."""
        own: list[int] = self.walked.indices[r].tolist()
        return own

    def q(self, r: int) -> NativeDistributions:
        """What a stream that sampled drew from, a row a slot."""
        assert self.walked.weights is not None
        return NativeDistributions(self.walked.weights, r * len(self.tokens[r]), self.draft_ids)
