"""Measure the capacity curve with the engine's own passes, once for each machine and model; kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from dspark_kernels.cpu import cpu_name
from dspark_stream import __version__
from dspark_stream.console import Progress
from dspark_stream.decoding.accept import accept
from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.draft import Block, draft
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.decoding.verify import verify
from dspark_stream.engine.context import PIECE, hand_over
from dspark_stream.engine.stream import Stream
from dspark_stream.files import write_whole
from dspark_stream.load.costs import CapacityCurve, Company
from dspark_stream.models.cache import GRAIN, Extent, ExtentAllocator
from dspark_stream.models.protocols import Drafter, Store, Target
from dspark_stream.types import GenerationRequest, SamplingParams

CONTEXT, LONG_CONTEXT, LONG_STREAMS = 256, 1024, 4
"""Positions that a measured stream already holds, and that so many streams hold to see what context costs; where the
model allows as many. One stream alone would not do: threads cannot share its attention evenly."""
TILE, TILED = 16, 64
"""SmolLM2-135M with 32 streams on AMX: a 33rd row takes 1.5 ms, the next fifteen take 5 together. Where only rounds of
32 and 48 rows had been measured, six looked-up tokens seemed to pay and did not (decision 037)."""
LONGEST_CHUNK = 512
"""Rows of one stream up to which passes are measured: prompts are cut into chunks by this curve, too."""
BUDGET_S = 8.0
"""What all points share alike: one that has had its part is left out, and small ones, which decide most, are run
oftenest. Each is run once, whatever that takes."""
STEADY_RUNS, STEADY_MS = 5, 16.0
"""Runs of a visit that count, after one that does not: so many, or for so long. A service does the same round again and
again, and then finds weights in the processor's caches that another size's run would have driven out. Runs longer than
that are made once a visit, and count."""
SWEEPS = 9
SLOW_MS, ONCE_MS = 80.0, 240.0
"""Points that take so long are run twice, or once: buffers and what is left of the noise are small beside them."""
FORMAT = "curve 16"
MOST_FILES = 64
"""Curves that are kept: every model, drafter, version and size has its own, and those longest unused go."""
_LARGEST_FILE = 1 << 20
_LARGEST, _SLOWEST_MS = 1 << 24, 1e7
"""Greatest values that a measured curve can have; larger ones are a damaged file."""


class _Stored(msgspec.Struct):
    key: list[str]
    curve: CapacityCurve


def curve_key(target: Target, fingerprints: Sequence[str], quants: Sequence[str]) -> list[str]:
    """Of what a curve depends on, models and machine, in words."""
    device = (
        torch.cuda.get_device_name(target.device)
        if target.device.type == "cuda"
        else f"{platform.machine()} {cpu_name()} x{torch.get_num_threads()}"
    )
    return [
        f"dspark-stream {__version__}",
        FORMAT,
        f"torch {torch.__version__}",
        device,
        str(target.dtype),
        target.runner,
        *quants,
        *fingerprints,
    ]


def load_or_measure(
    target: Target,
    target_kv: Store,
    drafter: Drafter | None,
    drafter_kv: Store | None,
    allocator: ExtentAllocator,
    *,
    max_seqs: int,
    max_model_len: int,
    key: list[str],
    folder: Path,
    progress: Progress,
    again: bool = False,
) -> CapacityCurve:
    """The curve from ``folder`` where one was measured under the same key and up to the same size, else a new one.

    ``again`` measures anew whatever is there.
    """
    key = [*key, f"gamma {drafter.gamma if drafter else 0}", f"seqs {max_seqs}", f"len {max_model_len}"]
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
    if not again and (curve := _stored(path, key, progress)) is not None:
        return curve
    with _Bench(target, target_kv, drafter, drafter_kv, allocator, max_seqs, max_model_len) as bench:
        points = bench.points()
        with progress.bar("measuring the capacity curve", total=SWEEPS * len(points)) as bar:
            times = sweep(points, bar.advance)
            bar.reach(SWEEPS * len(points))
        curve = fit(
            times,
            gamma=bench.gamma,
            context=bench.context,
            long_context=bench.long_context,
            long_streams=bench.long_streams,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(_Stored(key, curve)))
    except OSError as error:
        progress.say(f"the capacity curve could not be kept in {folder}: {error}; it will be measured again next time")
    _forget_the_oldest(folder)
    return curve


def _forget_the_oldest(folder: Path) -> None:
    """Keep the `MOST_FILES` that were measured or taken last."""
    with contextlib.suppress(OSError):  # a folder that may not be written, or another start that clears up as well
        by_use = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in by_use[:-MOST_FILES]:
            path.unlink(missing_ok=True)


def _stored(path: Path, key: list[str], progress: Progress) -> CapacityCurve | None:
    """The curve that was kept; None, and a word about it, where there is one that cannot be gone by."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = error.strerror or str(error)
    else:
        try:
            if len(data) > _LARGEST_FILE:
                raise msgspec.DecodeError(f"it has more than {_LARGEST_FILE} bytes")
            stored = msgspec.json.decode(data, type=_Stored)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:  # ValueError: bytes that are no text
            why = str(error)
        else:
            flaw = _flaw(stored.curve, key) if stored.key == key else "it is another machine's or model's"
            if flaw is None:
                with contextlib.suppress(OSError):
                    os.utime(path)  # it is in use: others go first
                return stored.curve
            why = flaw
    progress.say(f"the capacity curve in {path} cannot be used ({why}): measuring it anew")
    return None


def _flaw(curve: CapacityCurve, key: list[str]) -> str | None:
    """Why a curve from a file cannot have been measured under this key; None: it can."""
    if f"gamma {curve.gamma}" not in key:
        return f"gamma is {curve.gamma}"
    for name, sizes in (("tokens", curve.tokens), ("streams", curve.streams)):
        if not sizes or sizes[0] != 1 or sizes[-1] > _LARGEST or any(b <= a for a, b in pairwise(sizes)):
            return f"{name} do not ascend from 1"
    for name, values, count in (
        ("verify_ms", curve.verify_ms, len(curve.tokens)),
        ("draft_ms", curve.draft_ms, len(curve.streams)),
        ("slot_ms", curve.slot_ms, len(curve.streams) if curve.gamma else 0),
    ):
        if len(values) != count:
            return f"{name} are {len(values)}, not {count}"
        if not all(0 <= value <= _SLOWEST_MS for value in values) or any(b < a for a, b in pairwise(values)):
            return f"{name} are not times that grow with what is done"
    if curve.verify_ms[0] <= 0:
        return "passes take no time"
    for name in curve.__struct_fields__:
        value = getattr(curve, name)
        if not isinstance(value, list) and not 0 <= value <= _SLOWEST_MS:
            return f"{name} is {value}"
    return None


# --- measuring -----------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One thing to time: what, at which size."""

    what: str
    size: int
    run: Callable[[int], float]
    """Milliseconds of one run at a size."""


Times = dict[str, dict[int, float]]
"""Milliseconds: what → size → time."""


def sweep(
    points: Sequence[Point], on_run: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """Time all points in turn, over and over until the budget is spent: a neighbour's burst hits every point alike.

    The first run of a point pays for buffers and does not count where there are others. Of the rest the lower
    quartile: what is in the way only ever adds, and medians of few runs fall on either side of what comes and goes.
    """
    runs: list[list[float]] = [[] for _ in points]
    took, spent = [0.0] * len(points), [0.0] * len(points)
    """Seconds of a run in each point's quickest visit, and of all its visits: also what a run does not report."""
    begun = clock()
    for number in range(SWEEPS):
        for i, (point, seen) in enumerate(zip(points, runs, strict=True)):
            due = BUDGET_S / len(points) * number / SWEEPS
            if (number and 1e3 * took[i] > ONCE_MS) or (number > 1 and (1e3 * took[i] > SLOW_MS or spent[i] > due)):
                continue
            if number and clock() - begun > BUDGET_S:
                continue
            started = clock()
            steady = min(STEADY_RUNS, int(STEADY_MS / max(1e3 * took[i], 1e-3))) if number else 0
            latest = [point.run(point.size) for _ in range(1 + steady)]
            seen.extend(latest[1:] or latest)
            visit = clock() - started
            took[i], spent[i] = min(took[i] or inf, visit / len(latest)), spent[i] + visit
            on_run()
    times: Times = {}
    for point, seen in zip(points, runs, strict=True):
        counted = sorted(seen[1:] or seen)
        times.setdefault(point.what, {})[point.size] = counted[len(counted) // 4]
    return times


def ladder(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, … 128, then doubling, up to and including ``largest``: few points, where curves bend.

    Kernels read weights once for a tile of rows. So of tiles up to `TILED` rows the first and the middle are points.
    """
    sizes = {1, 3, largest} if largest >= 3 else {1, largest}
    step = 2
    while step <= largest:
        sizes |= {step, step * 3 // 2} if 2 < step < 128 else {step}
        step *= 2
    sizes |= {row for end in range(TILE, TILED, TILE) for row in (end + 1, end + TILE // 2)}
    return sorted(s for s in sizes if s <= largest)


def monotone(values: Sequence[float]) -> list[float]:
    """The closest non-decreasing sequence in least squares (pool adjacent violators): more never costs less."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [mean for mean, n in blocks for _ in range(n)]


def fit(times: Times, *, gamma: int, context: int, long_context: int, long_streams: int = 1) -> CapacityCurve:
    """A curve from `_Bench`'s points."""
    rows, whole, first = times["rows"], times.get("draft", {1: 0.0}), times.get("slot", {})
    tokens, streams = sorted(rows), sorted(whole)
    curve = CapacityCurve(
        tokens=tokens,
        verify_ms=monotone([rows[n] for n in tokens]),
        streams=streams,
        draft_ms=monotone([whole[r] for r in streams]),
        slot_ms=monotone([max(0.0, whole[r] - first[r]) / max(1, gamma - 1) for r in streams]) if first else [],
        gamma=gamma,
        context=context,
        feature_us=max([0.0, *(1e3 * ms / n for n, ms in times.get("features", {}).items())]),
    )
    if "long" in times:  # one row a stream, and a block of them: what a position costs once, and for every row
        each = {
            n: 1e3 * (ms - float(curve.pass_ms(n * long_streams, Company(1, context))))
            for n, ms in times["long"].items()
        }
        farther = long_streams * (long_context - context)
        attend_us = max(0.0, (each[max(each)] - each[1]) / ((max(each) - 1) * farther))
        read_us = max(0.0, (each[1] - attend_us * farther) / (long_streams * long_context - context))
        curve = msgspec.structs.replace(curve, attend_us=attend_us, read_us=read_us)
    return curve


class _Bench:
    """Streams that exist only to be timed: each at the same position of an extent of its own, its past all zeros."""

    def __init__(
        self,
        target: Target,
        target_kv: Store,
        drafter: Drafter | None,
        drafter_kv: Store | None,
        allocator: ExtentAllocator,
        max_seqs: int,
        max_model_len: int,
    ) -> None:
        self._target, self._target_kv, self._allocator = target, target_kv, allocator
        self._drafter, self._drafter_kv = drafter, drafter_kv
        self._max_seqs = max_seqs
        self.gamma = drafter.gamma if drafter else 0
        self.context = max(1, min(CONTEXT, max_model_len // 2))
        widest = max(LONGEST_CHUNK, max_seqs * (1 + self.gamma))
        self.max_tokens = max(1, min(widest, max_model_len - self.context))
        self.long_rows = max(2, 1 + self.gamma)
        self.long_context = min(LONG_CONTEXT, max_model_len - self.long_rows)
        self._extents: list[Extent] = []
        short, long = self.context + self.gamma + 1, self.long_context + self.long_rows
        for i in range(max_seqs):
            left = (
                allocator.total - allocator.used - (max_seqs - 1 - i) * (short + GRAIN)
            )  # what the others do not need
            wanted = max(self.context + self.max_tokens, long) if i == 0 else long
            extent = allocator.allocate(wanted if i == 0 or (i < LONG_STREAMS and left >= long) else short)
            if extent is None:  # a small budget: some streams are then timed on each other's slots
                break
            self._extents.append(extent)
        fits = [extent.size >= long for extent in self._extents[:LONG_STREAMS]]
        self.long_streams = (*fits, False).index(False)

    def __enter__(self) -> _Bench:
        for store in (self._target_kv, self._drafter_kv):
            if store is not None:
                for extent in self._extents:
                    store.clear(extent)
        return self

    def __exit__(self, *_: object) -> None:
        for extent in self._extents:
            self._allocator.free(extent)

    def points(self) -> list[Point]:
        """What is timed, `fit` knows it by its names."""
        streams = [n for n in ladder(self._max_seqs) if n in (1, self._max_seqs) or n & (n - 1) == 0]
        points = [Point("rows", n, self.rows_ms) for n in ladder(self.max_tokens)]
        if self.long_streams and self.long_context >= 2 * self.context:
            points += [Point("long", n, self.long_ms) for n in (1, self.long_rows)]
        if self._drafter:
            features = min(PIECE, self._drafter.ring or PIECE, self._extents[0].size, self.context + self.max_tokens)
            points += [Point("draft", n, self.draft_ms) for n in streams]
            points += [Point("slot", n, self.slot_ms) for n in streams]
            points.append(Point("features", features, self.features_ms))
        # large ones first: what a pass of 512 rows leaves in the processor's caches would cost a small one after it a
        # quarter of its time, for longer than it is run before it counts
        return sorted(points, key=lambda point: -point.size)

    def _streams(self, count: int, context: int = 0) -> list[Stream]:
        request = GenerationRequest(
            request_id="profile",
            prompt_ids=(0,) * ((context or self.context) + 1),
            sampling=SamplingParams(max_tokens=1 << 20, temperature=0.0),
        )
        streams = [Stream(request, self._target.vocab_size, self.gamma, frozenset(), None) for _ in range(count)]
        for i, stream in enumerate(streams):
            stream.extent = self._extents[i % len(self._extents)]
        return streams

    def _verify_ms(self, streams: list[Stream], length: int) -> float:
        blocks = [Block(tokens=[0] * length) for _ in streams]
        lengths = [length] * len(streams)
        begun = time.perf_counter()
        output = verify(self._target, self._target_kv, streams, blocks, lengths)
        accept(output, streams, blocks, lengths, None)
        return (time.perf_counter() - begun) * 1e3

    def rows_ms(self, tokens: int) -> float:
        """One stream with that many rows."""
        return self._verify_ms(self._streams(1), tokens - 1)

    def long_ms(self, tokens: int) -> float:
        """Some streams with that many rows each, deep in a long context."""
        return self._verify_ms(self._streams(self.long_streams, self.long_context), tokens - 1)

    def draft_ms(self, count: int) -> float:
        """Drafting whole blocks for that many streams, in a round that verifies nothing."""
        return self._draft_ms(count, self.gamma)

    def slot_ms(self, count: int) -> float:
        """The same with the first token of each block only."""
        return self._draft_ms(count, 1)

    def features_ms(self, count: int) -> float:
        """Context features of so many positions of one stream."""
        assert self._drafter is not None
        assert self._drafter_kv is not None
        positions = list(range(count))
        slots = self._extents[0].context_slots(positions, self._drafter.ring)
        taps = self._taps(count)
        begun = time.perf_counter()
        self._drafter.append_context(taps, positions, slots, self._drafter_kv)
        if taps.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) * 1e3

    def _taps(self, count: int) -> torch.Tensor:
        width = len(self._target.tap_layers) * self._target.hidden_size
        return torch.zeros(count, width, dtype=self._target.dtype, device=self._target.device)

    def _draft_ms(self, count: int, slots: int) -> float:
        """After a pass, which leaves the drafter's weights where a round finds them, and what it is handed of that."""
        assert self._drafter is not None
        assert self._drafter_kv is not None
        streams, taps = self._streams(count), self._taps(count)
        for i, stream in enumerate(streams):
            stream.backlog.add(taps, i, 1, stream.position - 1)
        self._verify_ms(streams, 0)
        begun = time.perf_counter()
        hand_over([(s.extent, s.backlog) for s in streams], self._drafter, self._drafter_kv)
        draft(self._drafter, self._drafter_kv, streams, Calibration(), AcceptanceHistory(self.gamma), slots)
        return (time.perf_counter() - begun) * 1e3
