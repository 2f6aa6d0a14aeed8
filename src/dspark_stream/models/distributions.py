"""What tokens are drawn from, as the algorithm sees it: rows of distributions over the target's or the draft
vocabulary.

Two kinds: torch's tensors (torch/distributions.py) and weights on the CPU's kernels (native/distributions.py). Symbols:
ℓ verification length, V vocabulary, Vd draft vocabulary. Uniforms are in [0, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

from torch import Tensor


class Judged(NamedTuple):
    """What stands of a draft block: x_1 … x_accepted, then ``bonus``."""

    accepted: int
    bonus: int
    """-1: the row that it comes from has no token."""


class Distributions(ABC):
    """Distributions of some rows."""

    @abstractmethod
    def probability(self, row: int, token: int) -> float:
        """Of one token of a row; NaN where the row has no token."""

    @abstractmethod
    def probabilities(self, row: int) -> Tensor:
        """Of a row [V], float32."""

    @abstractmethod
    def draw(self, row: int, uniform: float) -> int:
        """A token of a row, by inverse transform; never one of probability 0. -1 where there is no other."""

    @abstractmethod
    def overlap(self, row: int, share: float, q: Tensor, draft_ids: Tensor | None) -> float:
        """Σ min(share · p, q) over the vocabulary; q and draft_ids as for `draw_rest`."""

    @abstractmethod
    def draw_rest(self, row: int, uniform: float, share: float, q: Tensor, draft_ids: Tensor | None) -> int:
        """A token of max(share · p - q, 0), of p where rounding leaves nothing of that.

        Args:
            row: p.
            uniform: what decides.
            share: in (0, 1].
            q: probabilities [Vd], taken to be 0 for all other tokens.
            draft_ids: the tokens that they are of [Vd], ascending; None: all.
        """

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
        """Block verification: the longest prefix of the drafts that is accepted ("stands"); then the bonus token.

        share[k], w_k = min(1, w_{k-1} · p_t(x_k)/p_d(x_k)) with w_0 = 1, is the probability that at least x_1 … x_k
        stand (given these drafts). So all ℓ stand with probability w_ℓ. If no longer prefix stands, x_1 … x_k stand
        with what is missing from w_k: (w_k - s_k)/(1 - s_k), where s_k = Σ min(w_k p_t, p_d) is the probability that a
        longer prefix stands. The bonus token is drawn from max(w_k p_t - p_d, 0), after ℓ drafts from the next p_t.

        This is Algorithm 2 of Sun et al., arXiv 2403.10444, where w is called p (docs/decisions/019).

        Args:
            first: p_t's row of the first draft; the ℓ after it are the others' and the bonus token's.
            tokens: x_1 … x_ℓ, target ids.
            q: what they were drawn from, row k-1 for x_k.
            indices: the same drafts in q's vocabulary.
            draft_ids: see `draw_rest`.
            accept: uniforms [ℓ or more].
            uniform: what the bonus token is drawn by.
        """
        length, share = len(tokens), [1.0]
        for k in range(length):
            p_x, q_x = self.probability(first + k, tokens[k]), q.probability(k, indices[k])
            if isnan(p_x):  # no token at all: nothing can follow, so what stands is judged up to here
                length = k
                break
            share.append(min(share[k] * p_x / q_x, 1.0))  # what was drawn has q_x > 0
        if length == 0 or accept[length - 1] < share[length]:
            return Judged(length, self.draw(first + length, uniform))
        for k in range(length - 1, 0, -1):
            if accept[k - 1] >= share[k]:
                continue  # what is missing from w_k is at most w_k
            missing = share[k] - self.overlap(first + k, share[k], q.probabilities(k), draft_ids)  # below 0 by rounding
            if accept[k - 1] * (missing + 1.0 - share[k]) < missing:
                return Judged(k, self.draw_rest(first + k, uniform, share[k], q.probabilities(k), draft_ids))
        return Judged(0, self.draw_rest(first, uniform, 1.0, q.probabilities(0), draft_ids))
