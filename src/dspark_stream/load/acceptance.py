"""What drafts promise, and how well promises are kept: by each stream, and by all streams together.

Only past rounds are used, so decisions by it are lossless under every verification. Symbols: m streams, γ the draft
block's size, T thresholds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import isfinite
from typing import get_args

import numpy as np

from dspark_stream.decoding.repeats import FADE, HOPE, LEAN, Repeats
from dspark_stream.load.costs import Array
from dspark_stream.types import Acceptance as Way

THRESHOLDS: Array = np.array([0.0, 0.2, 0.5])  # one: -1.0 %, seven: +0.2 % of replays' throughput (decision 037)
"""Which drafts will be verified is not known before drafting. So plans suppose that all drafts of at least such a
survival are, and take the best of these thresholds."""
BLOCKS = 32  # 16: -0.1 %, 64: +0.1 %
"""Blocks that count of a stream; of all streams together twice as many."""


class _Ledger:
    """What blocks promised in the mean; and sums of promised and of accepted tokens. The latest count most."""

    def __init__(self, hope: Sequence[float], blocks: int, count: int = 0) -> None:
        self.mean = _by_threshold(hope)  # [2, T, γ]
        self.count = count
        self.promised = self.accepted = 0.0
        self._blocks = blocks

    def add(self, block: Array, promised: float, accepted: int) -> None:
        """One block; what was promised of the tokens that were verified, and how many were accepted."""
        self.count += 1
        self.mean += (block - self.mean) / min(self.count, self._blocks)
        if promised:
            keep = 1.0 - 1.0 / self._blocks
            self.promised = keep * self.promised + promised
            self.accepted = keep * self.accepted + accepted


class Past(_Ledger):
    """What one stream's drafts have been like. Kept by the stream, written by `Acceptance`."""

    def __init__(self, gamma: int, way: Way) -> None:
        super().__init__([0.0] * gamma, BLOCKS)
        self.way: Way = way
        """How its drafts are accepted; each way accepts another share."""
        self.survivals: deque[Sequence[float]] = deque([(), ()], maxlen=2)
        """Of the last two rounds that were told, oldest first; empty for one without drafts."""


class Acceptance:
    """Of all streams; one for an engine. ``gamma``: the drafter's block size."""

    def __init__(self, gamma: int) -> None:
        hope = [HOPE**k for k in range(1, gamma + 1)]
        self._pools: dict[Way, _Ledger] = {way: _Ledger(hope, 2 * BLOCKS, 1) for way in get_args(Way)}
        self.repeats = Repeats(FADE)
        """What looked-up drafts have been worth, of all streams."""

    def learn(self, past: Past, survival: Sequence[float], verified: int, accepted: int) -> None:
        """Learn from a stream's round: what its draft promised (empty if it had none), and what was accepted."""
        past.survivals.append(survival)
        if survival and isfinite(survival[-1]):
            pool = self._pools[past.way]
            # slots that were not drafted go on as blocks do in the mean
            usual: list[float] = pool.mean[0, 0].tolist()
            onward = survival[-1] / max(usual[len(survival) - 1], 1e-9)
            block = _by_threshold([*survival, *(onward * a for a in usual[len(survival) :])])
            for ledger in (past, pool):
                ledger.add(block, sum(survival[:verified]), accepted)

    def worth(self, past: Past) -> float:
        """Accepted over promised tokens: of this stream, and of all streams as long as it has few."""
        pool = self._pools[past.way]
        shared = (pool.accepted + LEAN) / (pool.promised + LEAN)
        return (past.accepted + LEAN * shared) / (past.promised + LEAN)

    def corrected(self, past: Past, survival: Sequence[float]) -> list[float]:
        """Promises times what such promises have been worth so far."""
        worth = self.worth(past)
        return [min(1.0, worth * a) if isfinite(a) else 0.0 for a in survival]

    def expected(self, pasts: Sequence[Past]) -> Array:
        """Accepted and verified tokens that each stream's next draft brings, by threshold and slots, [2, m, T, γ]."""
        own, shared = (np.array([x.mean for x in some]) for some in (pasts, [self._pools[p.way] for p in pasts]))
        # all blocks that it ever drafted count, not the latest alone: the pool is mostly of streams that draft well,
        # and would make a bad one look better than it is
        count = np.array([past.count for past in pasts])[:, None, None, None]
        shares = ((count * own + LEAN * shared) / (count + LEAN)).swapaxes(0, 1)
        shares[0] *= np.array([self.worth(past) for past in pasts])[:, None, None]
        expected: Array = np.minimum(shares, 1.0).cumsum(axis=3)
        return expected


def _by_threshold(row: Sequence[float]) -> Array:
    """A block's survivals where they reach a threshold, and whether they do, [2, T, γ]."""
    above = np.asarray(row) >= THRESHOLDS[:, None]
    return np.array([above * row, above], dtype=float)
