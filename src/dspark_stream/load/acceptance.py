"""What drafts promise, and how well promises are kept: by each stream, and by all streams together.

Only past rounds are used: decisions by it are lossless under every verification. γ: block size, T: thresholds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from math import isfinite
from typing import get_args

from dspark_stream.decoding.repeats import FADE, HOPE, Repeats
from dspark_stream.types import Acceptance as Way

THRESHOLDS = (0.0, 0.2, 0.5)  # one: -0.7 %, seven: +0.1 % of replays' throughput (decision 037)
"""Plans suppose that all drafts of at least such a survival will be verified, and take the best of these thresholds."""
LEAN = 4.0  # as many blocks of a stream, or promised tokens, count half, all streams half; 2: +0.2 %, 8: +0.1 %
BLOCKS = 32  # so many count of a stream, of all streams together twice as many; 16: 0.0 %, 64: +0.3 %


class _Ledger:
    """What blocks promised in the mean; and sums of promised and of accepted tokens. The latest count most."""

    def __init__(self, hope: Sequence[float], blocks: int, count: int = 0) -> None:
        self.mean = _by_threshold(hope)
        self.count, self._blocks = count, blocks
        self.promised = self.accepted = 0.0

    def add(self, block: list[float], promised: float, accepted: int) -> None:
        """One block; what was promised of the tokens that were verified, and how many were accepted."""
        self.count += 1
        part = 1.0 / min(self.count, self._blocks)
        self.mean = [mean + part * (now - mean) for mean, now in zip(self.mean, block, strict=True)]
        if promised:
            keep = 1.0 - 1.0 / self._blocks
            self.promised = keep * self.promised + promised
            self.accepted = keep * self.accepted + accepted


class Past(_Ledger):
    """What one stream's drafts have been like. Kept by the stream, written by `Acceptance`."""

    def __init__(self, gamma: int, way: Way) -> None:
        super().__init__([0.0] * gamma, BLOCKS)
        self.way: Way = way  # how its drafts are accepted; each way accepts another share
        self.survivals: deque[Sequence[float]] = deque([(), ()], maxlen=2)
        """Of the last two rounds that were told, oldest first; empty for one without drafts."""


class Acceptance:
    """Of all streams; one for an engine. ``gamma``: the drafter's block size."""

    def __init__(self, gamma: int) -> None:
        self._gamma, hope = gamma, [HOPE**k for k in range(1, gamma + 1)]
        self._pools: dict[Way, _Ledger] = {way: _Ledger(hope, 2 * BLOCKS, 1) for way in get_args(Way)}
        self._onward = {way: [(LEAN, LEAN * HOPE)] * gamma for way in get_args(Way)}  # survival before a slot and in it
        self.repeats = Repeats(FADE)  # what looked-up drafts have been worth, of all streams
        self.expected = lru_cache(maxsize=256)(self._expected)  # until a draft is learnt from

    def learn(self, past: Past, survival: Sequence[float], verified: int, accepted: int) -> None:
        """Learn from a stream's round: what its draft promised (empty if it had none), and what was accepted."""
        past.survivals.append(survival)
        if survival and isfinite(survival[-1]):
            onward, keep, whole = self._onward[past.way], 1.0 - 0.5 / BLOCKS, [*survival]
            for k, (before, own) in enumerate(pairwise(survival), 1):
                onward[k] = keep * onward[k][0] + before, keep * onward[k][1] + own
            for before, own in onward[len(survival) :]:  # slots that were not drafted go on as they did where they were
                whole.append(whole[-1] * own / max(before, 1e-9))
            block = _by_threshold(whole)
            for ledger in (past, self._pools[past.way]):
                ledger.add(block, sum(survival[:verified]), accepted)
            self.expected.cache_clear()

    def worth(self, past: Past) -> float:
        """Accepted over promised tokens: of this stream, and of all streams as long as it has few."""
        pool = self._pools[past.way]
        shared = (pool.accepted + LEAN) / (pool.promised + LEAN)
        return (past.accepted + LEAN * shared) / (past.promised + LEAN)

    def corrected(self, past: Past, survival: Sequence[float]) -> list[float]:
        """Promises times what such promises have been worth so far."""
        worth = self.worth(past)
        return [min(1.0, worth * a) if isfinite(a) else 0.0 for a in survival]

    def _expected(self, past: Past) -> tuple[list[list[float]], list[list[float]]]:
        """Accepted and verified tokens that a stream's next draft brings, each by threshold and slots, [T][γ]."""
        pool, worth = self._pools[past.way], self.worth(past)
        # all blocks that it ever drafted count: the pool is mostly of streams that draft well, and flatters a bad one
        own = past.count / (past.count + LEAN)
        shares = [theirs + own * (mine - theirs) for mine, theirs in zip(past.mean, pool.mean, strict=True)]
        rows = [shares[first : first + self._gamma] for first in range(0, len(shares), self._gamma)]
        accepted = [list(accumulate(min(1.0, worth * a) for a in row)) for row in rows[: len(THRESHOLDS)]]
        return accepted, [list(accumulate(row)) for row in rows[len(THRESHOLDS) :]]


def _by_threshold(row: Sequence[float]) -> list[float]:
    """A block's survivals where they reach a threshold, and whether they do, 2·T·γ."""
    reach = [a if a >= least else 0.0 for least in THRESHOLDS for a in row]
    return reach + [float(a >= least) for least in THRESHOLDS for a in row]
