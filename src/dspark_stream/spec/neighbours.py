"""What kinds of rounds take beside each other, told from rounds that follow one another.

A machine that others use too is faster in one second than in the next, by more than drafting could win. Rounds a few
milliseconds apart met the same machine: what one of a kind takes longer than its neighbour of another is owed to the
kinds alone. Rounds that had no neighbour of another kind say nothing about either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from statistics import median
from typing import Generic, NamedTuple, TypeVar

Kind = TypeVar("Kind", bound=Hashable)
WIDTH = 5
"""Rounds on either side of a change of kinds that are held against each other, by their medians."""


class Step(NamedTuple, Generic[Kind]):
    """What changed with the kind of round."""

    before: Kind
    after: Kind
    size: float
    """Of the later rounds' values, less the earlier ones'."""
    weight: float
    """1 where there were `WIDTH` rounds on either side, less where there were fewer."""


class Neighbours(Generic[Kind]):
    """Rounds in their order: every change of kinds is told of once, as soon as enough is known, or the next one comes.

    Values are logarithms: a machine's pace adds the same to all of them.
    """

    def __init__(self) -> None:
        self._before: tuple[Kind, deque[float]] | None = None
        self._run: tuple[Kind, deque[float]] | None = None
        self._told = True
        """Whether the step to the present run has been told of."""

    def see(self, kind: Kind, value: float) -> Step[Kind] | None:
        """One round."""
        step = None
        if self._run is None or self._run[0] != kind:
            step = self._tell()
            self._before, self._run, self._told = self._run, (kind, deque(maxlen=WIDTH)), self._run is None
        self._run[1].append(value)
        return self._tell() if len(self._run[1]) == WIDTH else step

    def move(self, by: Callable[[Kind], float]) -> None:
        """What values are held against has changed: add to those that are kept, by kind."""
        for kept in (self._before, self._run):
            if kept is not None:
                kind, values = kept
                more = by(kind)
                for i, value in enumerate(values):
                    values[i] = value + more

    def _tell(self) -> Step[Kind] | None:
        if self._told or self._before is None or self._run is None:
            return None
        self._told = True
        (before, earlier), (after, later) = self._before, self._run
        weight = min(len(earlier), len(later)) / WIDTH
        return Step(before, after, median(later) - median(earlier), weight)
