"""Rounds captured for a ladder of sizes, and how long each takes. On a CPU the same sizes run eagerly."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from dspark_stream.engine.captured.round import RoundModels, run_round
from dspark_stream.engine.captured.state import RoundState
from dspark_stream.errors import ConfigError

log = logging.getLogger(__name__)

WARM_UPS, TIMED = 3, 9


class Size(NamedTuple):
    """What a captured round is made for."""

    seats: int
    rows: int
    """Rows of the target pass, padding included."""
    drafting: bool
    context: bool = False
    """Without drafting: whether the drafter gets the round's context features all the same, to go on from later."""


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


Round = Callable[[RoundModels, RoundState, int, int, bool, bool], None]
"""`run_round`, or what a bench puts in its place."""


class RoundLadder:
    """Replays the captured round of a size; captures it at its first use (`warm` does all of them at the start).

    Args:
        models, state: what the rounds work on; their tensors must stay where they are.
        replace: another round in place of `run_round` (benches put a synthetic one here).
    """

    def __init__(
        self,
        models: RoundModels,
        state: RoundState,
        *,
        replace: Round = run_round,
    ) -> None:
        self.models, self.state = models, state
        self.round_ms: dict[Size, float] = {}
        """Measured by `warm`, without what attention reads of long contexts."""
        self.fixed: int | None = None
        """Drafts that every round verifies; None where the number of rows may be chosen."""
        self._round = replace
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # the memory that all captures share

    def sizes(self, seats: int | None = None) -> list[Size]:
        """Every size that a round may have, the largest first: memory that it took serves the smaller ones.

        ``seats``: of this many alone.
        """
        found = []
        for n in seat_ladder(self.state.seats) if seats is None else [seats]:
            found.append(Size(n, n, False))
            if drafted := self.drafting_sizes(n):
                found += [Size(n, n, False, context=True), *drafted]
        return sorted(found, reverse=True)

    def drafting_sizes(self, seats: int) -> list[Size]:
        """Sizes of rounds that draft, by rising rows; none without a drafter, or where nothing is to be verified."""
        gamma = self.models.drafter.gamma if self.models.drafter else 0
        if not gamma or self.fixed == 0:
            return []
        rows = row_ladder(seats, gamma) if self.fixed is None else [seats * (1 + min(self.fixed, gamma))]
        return [Size(seats, n, True) for n in rows]

    def fit_seats(self, streams: int) -> int:
        """The smallest number of seats that holds ``streams``."""
        return next(s for s in seat_ladder(self.state.seats) if s >= streams)

    def warm(self, on_size: Callable[[], None] = lambda: None, *, seats: int | None = None) -> None:
        """Capture and time every size that is new, or those of ``seats`` alone. Everybody loses their seats: no
        stream's cache is touched.
        """
        self.state.clear()
        for size in self.sizes(seats):
            if size in self.round_ms:
                on_size()
                continue
            self.run(size)
            times = []
            for _ in range(TIMED):
                begun = time.perf_counter()
                self.run(size)
                self._wait()
                times.append((time.perf_counter() - begun) * 1e3)
            self.round_ms[size] = median(times)
            on_size()
        size, ms = max(self.round_ms.items(), key=lambda item: item[1])
        log.info("rounds ready in %d sizes; the largest takes %.2f ms: %s", len(self.round_ms), ms, size)

    def run(self, size: Size) -> None:
        """One round of that size, in the order of the current stream; returns before it is done.

        With streams that are adjusted it is run operation by operation.
        """
        if self.state.device.type != "cuda" or self.state.adjustments:
            self._round(self.models, self.state, *size)
            return
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        self._graphs[size].replay()

    def _capture(self, size: Size) -> torch.cuda.CUDAGraph:
        """Kernels are compiled and libraries set up by rounds of nobody, then one round is recorded, not run.

        Raises:
            ConfigError: the round cannot be captured, because of the model's own code or for lack of memory.
        """
        try:
            return self._record(size)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"cuda_graphs: a round of {size.seats} streams and {size.rows} rows cannot be captured "
                f"({str(error).strip().splitlines()[0]}); --cuda-graphs off runs rounds operation by operation",
                param="cuda_graphs",
            ) from error

    def _record(self, size: Size) -> torch.cuda.CUDAGraph:
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
