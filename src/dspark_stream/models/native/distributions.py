"""Distributions on the CPU's kernels: rows of weights that are drawn from where they stand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_kernels.cpu import Context, Walked, Weights, noise_rows, sampling_rows
from dspark_stream.models.distributions import Distributions, Judged
from dspark_stream.models.protocols import Race
from dspark_stream.types import SamplingParams

Ints = npt.NDArray[np.int32]


def drawn_by(sampling: Sequence[SamplingParams]) -> npt.NDArray[np.float32]:
    """`sampling_rows` of requests' sampling."""
    return sampling_rows([(s.temperature, s.top_p, s.min_p, s.top_k) for s in sampling])


def raced_by(races: Sequence[Race | None]) -> npt.NDArray[np.int64]:
    """`noise_rows` of races, -1 for those who have none."""
    return noise_rows([(own.noise.seed, own.position) if own else (0, -1) for own in races])


class NativeDistributions(Distributions):
    """Rows of `Weights` from ``first`` on; of drafts over the tokens ``draft_ids`` (None: all)."""

    def __init__(self, weights: Weights, first: int = 0, draft_ids: Ints | None = None) -> None:
        self._weights, self._first, self._draft_ids = weights, first, draft_ids

    @classmethod
    def of(cls, context: Context, logits: Tensor, sampling: Sequence[SamplingParams]) -> NativeDistributions:
        """Of logits [N, V], which are gone then."""
        return cls(Weights.of(context, logits.numpy(), drawn_by(sampling)))

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
        q: Distributions,
        indices: Sequence[int],
        draft_ids: Tensor | None,
        accept: Sequence[float],
        uniform: float,
    ) -> Judged:
        """See `Distributions.judge`; the same in one call, of drafts that the kernels drew."""
        if not tokens or not isinstance(q, NativeDistributions):
            return super().judge(first, tokens, q, indices, draft_ids, accept, uniform)
        ids = _ids(draft_ids) if q._draft_ids is None else q._draft_ids
        found = self._weights.judge(self._first + first, tokens, q._weights, q._first, indices, ids, accept, uniform)
        return Judged(*found)


def _ids(draft_ids: Tensor | None) -> Ints | None:
    return None if draft_ids is None else draft_ids.numpy().astype(np.int32)


class NativeDrafts:
    """Blocks of R streams, g ≤ γ slots each, drafted in one call. See `Drafted`."""

    def __init__(self, walked: Walked, confidence: bool, draft_ids: Ints | None) -> None:
        self.tokens: list[list[int]] = walked.tokens.tolist()
        self.logits: list[list[float]] | None = walked.logits.tolist() if confidence else None
        self._walked, self._draft_ids = walked, draft_ids

    def indices(self, r: int) -> list[int]:
        """See `Drafted.indices`."""
        own: list[int] = self._walked.indices[r].tolist()
        return own

    def q(self, r: int) -> NativeDistributions:
        """See `Drafted.q`."""
        assert self._walked.weights is not None
        return NativeDistributions(self._walked.weights, r * len(self.tokens[r]), self._draft_ids)
