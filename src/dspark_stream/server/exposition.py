"""Prometheus' text format 0.0.4 and OpenMetrics 1.0: what a page of metrics looks like, whatever is on it."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Literal

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Labels = Sequence[tuple[str, str]]
Kind = Literal["gauge", "counter"]


class Histogram:
    """Prometheus' cumulative histogram; ``bounds`` ascend, and one without end is added."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self._counts)

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value``, as often as ``times`` says."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> Iterable[tuple[str, int]]:
        """Upper bounds as they are written, and how many observations are not above."""
        total = 0
        for bound, count in zip((*map(float, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield str(bound), total


class Page:
    """A page of families. ``common``: labels of every sample. Counters may be named with ``_total`` or without."""

    def __init__(self, common: Labels, *, open_metrics: bool) -> None:
        self._common = tuple(common)
        self._open_metrics = open_metrics
        self._lines: list[str] = []

    def add(self, name: str, kind: Kind, text: str, value: float) -> None:
        """A family of one sample."""
        self.add_all(name, kind, text, [((), value)])

    def add_all(self, name: str, kind: Kind, text: str, samples: Iterable[tuple[Labels, float]]) -> None:
        """A family with a sample for each set of further labels."""
        name = name.removesuffix("_total") if kind == "counter" else name
        sample = f"{name}_total" if kind == "counter" else name
        self._head(name if self._open_metrics else sample, kind, text)
        self._lines.extend(self._line(sample, labels, value) for labels, value in samples)

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        """A family of buckets, sum and count."""
        self._head(name, "histogram", text)
        for bound, total in histogram.buckets():
            self._lines.append(self._line(f"{name}_bucket", (("le", bound),), total))
        self._lines.append(self._line(f"{name}_sum", (), histogram.sum))
        self._lines.append(self._line(f"{name}_count", (), histogram.count))

    def text(self) -> str:
        """All of it."""
        end = ["# EOF"] if self._open_metrics else []
        return "\n".join([*self._lines, *end]) + "\n"

    def _head(self, name: str, kind: str, text: str) -> None:
        self._lines += (f"# HELP {name} {text}", f"# TYPE {name} {kind}")

    def _line(self, name: str, labels: Labels, value: float) -> str:
        shown = ",".join(f'{key}="{_escape(label)}"' for key, label in (*self._common, *labels))
        return f"{name}{{{shown}}} {value:.12g}"


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
