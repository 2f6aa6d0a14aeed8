"""Rounds captured for a ladder of sizes, and how long each takes. On a CPU the same sizes run eagerly."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from dspark_stream.engine.gpu.round import RoundModels, run_round
from dspark_stream.engine.gpu.state import RoundState

log = logging.getLogger(__name__)

WARM_UPS, TIMED = 3, 9


class Size(NamedTuple):
    """What a captured round is made for."""

    seats: int
    rows: int
    """Rows of the target pass, padding included."""
    drafting: bool


def seat_ladder(largest: int) -> list[int]:
    """1, 2, 4, … up to and including ``largest``."""
    sizes = {largest}
    step = 1
    while step < largest:
        sizes.add(step)
        step *= 2
    return sorted(sizes)


def row_ladder(seats: int, gamma: int) -> list[int]:
    """Rows of the target pass for ``seats`` streams: from the anchors alone to whole blocks, few steps between."""
    whole = seats * (gamma + 1)
    return sorted({seats, whole, *(n for n in (seats * 3 // 2, seats * 2, seats * 3, seats * 5) if n < whole)})


class RoundLadder:
    """Replays the captured round of a size; captures it at its first use (`warm` does all of them at the start).

    Args:
        models, state: what the rounds work on; their tensors must stay where they are.
        fixed: verify this many drafts in every round; None where the number of rows may be chosen.
        replace: another round in place of `run_round` (benches put a synthetic one here).
    """

    def __init__(
        self,
        models: RoundModels,
        state: RoundState,
        *,
        fixed: int | None = None,
        replace: Callable[[RoundModels, RoundState, int, int, bool], None] = run_round,
    ) -> None:
        self.models, self.state = models, state
        self.round_ms: dict[Size, float] = {}
        """Measured by `warm`, without what attention reads of long contexts."""
        self._round = replace
        self._fixed = fixed
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # the memory that all captures share

    def sizes(self) -> list[Size]:
        """Every size that a round may have, the largest first: memory that it took serves the smaller ones."""
        gamma = self.models.drafter.gamma if self.models.drafter else 0
        found = []
        for seats in seat_ladder(self.state.seats):
            found.append(Size(seats, seats, False))
            if gamma:
                fixed = self._fixed
                rows = row_ladder(seats, gamma) if fixed is None else [seats * (1 + min(fixed, gamma))]
                found += [Size(seats, n, True) for n in rows]
        return sorted(found, reverse=True)

    def fit_seats(self, streams: int) -> int:
        """The smallest number of seats that holds ``streams``."""
        return next(s for s in seat_ladder(self.state.seats) if s >= streams)

    def warm(self, on_size: Callable[[], None] = lambda: None) -> None:
        """Capture and time every size. Nobody may be seated: no stream's cache is touched."""
        self.state.clear()
        for size in self.sizes():
            self.run(size)
            times = []
            for _ in range(TIMED):
                begun = time.perf_counter()
                self.run(size)
                self._wait()
                times.append((time.perf_counter() - begun) * 1e3)
            self.round_ms[size] = median(times)
            on_size()
        longest = max(self.round_ms.items(), key=lambda item: item[1])
        log.info("rounds ready in %d sizes; the largest %s takes %.2f ms", len(self.round_ms), *longest)

    def run(self, size: Size) -> None:
        """One round of that size, in the order of the current stream; returns before it is done."""
        if self.state.device.type != "cuda":
            self._round(self.models, self.state, *size)
            return
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        self._graphs[size].replay()

    def _capture(self, size: Size) -> torch.cuda.CUDAGraph:
        """Kernels are compiled and libraries set up by rounds of nobody, then one round is recorded, not run."""
        seated = self.state.active.clone()
        self.state.clear()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._round(self.models, self.state, *size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._round(self.models, self.state, *size)
        self._pool = self._pool or graph.pool()
        self.state.active.copy_(seated)
        return graph

    def _wait(self) -> None:
        if self.state.device.type == "cuda":
            torch.cuda.synchronize()
