"""What drafts promise, and how well promises are kept: by each stream, and by all streams together.

Only past rounds are used, so decisions by it are lossless under every verification. Symbols: m streams, W blocks that
are remembered, γ the draft block's size, T thresholds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import isfinite
from typing import get_args

import numpy as np

from dspark_stream.decoding.repeats import FADE, HOPE, LEAN, Repeats
from dspark_stream.load.curve import Array
from dspark_stream.types import Acceptance as Way

THRESHOLDS: Array = np.array([0.0, 0.2, 0.5])
"""Which drafts will be verified is not known before drafting. So plans suppose that all drafts of at least such a
survival are, and take the best of these thresholds."""
BLOCKS = 32
"""Blocks that are remembered of a stream; of all streams together twice as many."""
WAYS: tuple[Way, ...] = get_args(Way)


class _Ledger:
    """Promised survivals of the latest blocks; and sums, which fade, of promised and of accepted tokens."""

    def __init__(self, gamma: int, blocks: int) -> None:
        self.rows: Array = np.full((blocks, gamma), -1.0)
        """[W, γ]; below 0 where there is no block yet."""
        self.count = 0
        self.promised = self.accepted = 0.0
        self._keep = 1.0 - 1.0 / blocks

    def add(self, row: Sequence[float], verified: int, accepted: int) -> None:
        """One block."""
        self.rows[self.count % len(self.rows)] = row
        self.count += 1
        if verified:
            self.promised = self._keep * self.promised + sum(row[:verified])
            self.accepted = self._keep * self.accepted + accepted


class Past:
    """What one stream's drafts have been like. Kept by the stream, written by `Acceptance`."""

    def __init__(self, gamma: int, way: Way) -> None:
        self.way: Way = way
        """How its drafts are accepted; each way accepts another share."""
        self.ledger = _Ledger(gamma, BLOCKS)
        self.survivals: deque[Sequence[float]] = deque([(), ()], maxlen=2)
        """Of the last two rounds, oldest first; empty for a round without drafts."""


class Acceptance:
    """Of all streams; one for an engine.

    Args:
        gamma: the drafter's block size.
    """

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        hope = [HOPE**k for k in range(1, gamma + 1)]
        self._pools: dict[Way, _Ledger] = {way: _Ledger(gamma, 2 * BLOCKS) for way in WAYS}
        self._usual: dict[Way, Sequence[float]] = dict.fromkeys(WAYS, hope)
        """Mean survivals of the pool's blocks when they were last asked for."""
        for pool in self._pools.values():
            pool.add(hope, 0, 0)
        self.repeats = Repeats(FADE)
        """What looked-up drafts have been worth, of all streams."""

    def learn(self, past: Past, survival: Sequence[float], verified: int, accepted: int) -> None:
        """Learn from a stream's round: what its draft promised (empty if it had none), and what was accepted."""
        past.survivals.append(survival)
        if survival and isfinite(survival[-1]):
            row = _whole(survival, self._usual[past.way])
            past.ledger.add(row, verified, accepted)
            self._pools[past.way].add(row, verified, accepted)

    def worth(self, past: Past) -> float:
        """Accepted over promised tokens: of this stream, and of all streams as long as it has few."""
        pool = self._pools[past.way]
        shared = (pool.accepted + LEAN) / (pool.promised + LEAN)
        return (past.ledger.accepted + LEAN * shared) / (past.ledger.promised + LEAN)

    def corrected(self, past: Past, survival: Sequence[float]) -> list[float]:
        """Promises times what such promises have been worth so far."""
        worth = self.worth(past)
        return [min(1.0, worth * a) if isfinite(a) else 0.0 for a in survival]

    def expected(self, pasts: Sequence[Past]) -> Array:
        """Accepted and verified tokens that each stream's next draft brings, by threshold and slots, [2, m, T, γ]."""
        pools = {}
        for way in {past.way for past in pasts}:
            rows = self._pools[way].rows[: self._pools[way].count]
            self._usual[way] = rows.mean(axis=0).tolist()
            pools[way] = _sums(rows) / len(rows)
        own = _sums(np.array([past.ledger.rows for past in pasts]))  # [2, m, T, γ]
        # all blocks that it ever drafted, not only those remembered: the pool is mostly of streams that draft well, and
        # would make a bad one look better than it is
        count = np.array([past.ledger.count for past in pasts])[:, None, None]
        shares = own * count / np.clip(count, 1, BLOCKS)
        shares += LEAN * np.array([pools[past.way] for past in pasts]).swapaxes(0, 1)
        shares /= count + LEAN
        shares[0] *= np.array([self.worth(past) for past in pasts])[:, None, None]
        expected: Array = np.minimum(shares, 1.0).cumsum(axis=3)
        return expected


def _whole(survival: Sequence[float], usual: Sequence[float]) -> Sequence[float]:
    """The survival of all γ slots if only some were drafted: the others go on as the mean of recent blocks does."""
    drafted = len(survival)
    if drafted == len(usual):
        return survival
    onward = survival[-1] / max(usual[drafted - 1], 1e-9)
    return [*survival, *(onward * a for a in usual[drafted:])]


def _sums(rows: Array) -> Array:
    """Over blocks [..., W, γ], by threshold and slot: sum of survivals above it, and their number [2, ..., T, γ]."""
    above = rows[..., None, :, :] >= THRESHOLDS[:, None, None]
    return np.array([(above * rows[..., None, :, :]).sum(axis=-2), above.sum(axis=-2)])
