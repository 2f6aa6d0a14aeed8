"""The capacity curve: how long a round takes on this machine, as a function of what it carries.

SPS(B) of the paper's Algorithm 1 is `RoundCost.sps`. Measured at start from real passes (engine/profile.py), kept on
disk. Symbols: R streams, B target tokens of a round, p̄ the streams' mean position, γ the draft block's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import ceil
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_LARGEST, _SLOWEST_MS = 1 << 24, 1e7
"""Of what can have been measured; nobody waits for hours for a round."""
LEAST_OF_BASE = 0.25
"""What a shorter context, or fewer slots, can leave of a measured time: slopes are measured too, and may be off."""


class CapacityCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a round's parts, measured at streams that hold ``context`` positions; linear between points.

    A round is drafting (its context features included), a target pass with acceptance, and the rest. All lists over
    ``streams`` may be left empty for nothing.
    """

    tokens: list[int]
    verify_ms: list[float]
    """A target pass over that many ``tokens`` of one stream."""
    streams: list[int]
    stream_ms: list[float]
    """What the same pass costs more when its tokens belong to that many ``streams``."""
    draft_ms: list[float]
    """Drafting whole blocks for that many ``streams``."""
    after_draft_ms: list[float] = []
    """What drafting for that many ``streams`` adds to the pass that follows: it drives weights out of the processor's
    caches."""
    slot_ms: list[float] = []
    """Of ``draft_ms``, what every slot after the first takes."""
    rest_ms: list[float] = []
    """A round of that many ``streams`` outside drafting and the pass: committing, text, hand-over."""
    gamma: int = 1
    context: int = 0
    read_us: float = 0.0
    """Microseconds that a position of a stream's context costs a pass, however many rows the stream has."""
    attend_us: float = 0.0
    """Microseconds that it costs for every row."""
    draft_read_us: float = 0.0
    """Microseconds that it costs in drafting a block, as far as the drafter sees."""
    draft_window: int = 0
    """Positions of a context that a drafter sees at most; 0: all."""
    sample_us: float = 0.0
    """Microseconds that every row of a stream with a temperature costs a pass beyond a greedy one."""
    coupled_us: float = 0.0
    """The same of a stream whose tokens torch draws: under coupled verification, or cut by top-k, top-p or min-p."""
    draft_coupled_us: float = 0.0
    """Microseconds that every draft token costs more for such a stream."""
    feature_us: float = 0.0
    """Microseconds that a position takes whose context features are handed over late."""

    def round_ms(
        self, batch_tokens: int, streams: int, drafting: int, *, slots: int | None = None, position: float | None = None
    ) -> float:
        """A whole round: ``slots`` draft tokens for ``drafting`` of R streams, then a pass over B tokens."""
        costs = Costs(self)
        at = self.context if position is None else position
        draft = float(costs.draft_ms(drafting, self.gamma if slots is None else slots, at)) if drafting else 0.0
        return float(costs.verify_ms(batch_tokens, streams, at)) + draft + costs.rest_ms(streams)

    def flaw(self) -> str | None:
        """What cannot have been measured, in words, of a curve from a file; None: it can be gone by."""
        for name, sizes in (("tokens", self.tokens), ("streams", self.streams)):
            if not sizes or sizes[0] != 1 or sizes[-1] > _LARGEST or any(b <= a for a, b in pairwise(sizes)):
                return f"{name} do not ascend from 1"
        beside = len(self.streams)
        drafted = beside if self.gamma else 0
        for name, values, count in (
            ("verify_ms", self.verify_ms, len(self.tokens)),
            ("stream_ms", self.stream_ms, beside),
            ("draft_ms", self.draft_ms, beside),
            ("rest_ms", self.rest_ms, beside),
            ("after_draft_ms", self.after_draft_ms, drafted),
            ("slot_ms", self.slot_ms, drafted),
        ):
            if len(values) != count:
                return f"{name} are {len(values)}, not {count}"
            if not all(0 <= value <= _SLOWEST_MS for value in values) or any(b < a for a, b in pairwise(values)):
                return f"{name} are not times that grow with what is done"
        if self.verify_ms[0] <= 0:
            return "passes take no time"
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not isinstance(value, list) and not 0 <= value <= _SLOWEST_MS:
                return f"{name} is {value}"
        return None

    def drafted_from(self, position: float) -> float:
        """Positions that a draft at ``position`` reads."""
        return min(position, self.draft_window or position)

    def sps(self, batch_tokens: int, streams: int, drafting: int) -> float:
        """Rounds a second when a round carries ``batch_tokens`` target tokens."""
        return 1000.0 / self.round_ms(batch_tokens, streams, drafting)

    def scaled(self, pace: float, verify: Sequence[float], draft: Sequence[float]) -> CapacityCurve:
        """The curve of a machine on which everything takes ``pace`` times as long, and beyond that passes of each size,
        and drafting for each number of streams, so many times."""
        drafting = pace * (median(draft) if draft else 1.0)
        return msgspec.structs.replace(
            self,
            verify_ms=monotone([pace * factor * ms for factor, ms in zip(verify, self.verify_ms, strict=True)]),
            stream_ms=[pace * ms for ms in self.stream_ms],
            draft_ms=monotone([pace * factor * ms for factor, ms in zip(draft, self.draft_ms, strict=False)]),
            after_draft_ms=[pace * ms for ms in self.after_draft_ms],
            slot_ms=[pace * factor * ms for factor, ms in zip(draft, self.slot_ms, strict=False)],
            rest_ms=[pace * ms for ms in self.rest_ms],
            read_us=pace * self.read_us,
            attend_us=pace * self.attend_us,
            sample_us=pace * self.sample_us,
            coupled_us=pace * self.coupled_us,
            draft_read_us=drafting * self.draft_read_us,
            draft_coupled_us=drafting * self.draft_coupled_us,
            feature_us=drafting * self.feature_us,
        )


class RoundCost:
    """One round's milliseconds as a function of B alone, from ``first`` = R tokens on: all else has been decided."""

    def __init__(self, first: int, ms: Sequence[float], *, draft_ms: float = 0.0, rest_ms: float = 0.0) -> None:
        self.first = first
        self.ms = list(ms)
        self.draft_ms, self.rest_ms = draft_ms, rest_ms
        """Of all of these, what is drafting and what is neither drafting nor the pass."""
        self._hull: RoundCost | None = None

    def __call__(self, batch_tokens: int) -> float:
        """Milliseconds at B."""
        return self.ms[batch_tokens - self.first]

    def sps(self, batch_tokens: int) -> float:
        """Rounds a second at B."""
        return 1000.0 / self(batch_tokens)

    def within(self, slowest_ms: float) -> RoundCost:
        """The same with everything past ``slowest_ms`` as good as forbidden; B = R stays, whatever it takes."""
        if self.ms[-1] <= slowest_ms:
            return self
        return RoundCost(self.first, [self.ms[0], *(ms if ms <= slowest_ms else 1e9 for ms in self.ms[1:])])

    @property
    def hull(self) -> RoundCost:
        """The greatest convex function below it: no staircase on which a greedy admission could get stuck."""
        if self._hull is None:
            self._hull = RoundCost(self.first, convex(self.ms))
        return self._hull


class Outlay(NamedTuple):
    """What rounds of R streams at one position cost, for every choice of who drafts and how much is verified."""

    plain_ms: float
    """A round without drafts."""
    tokens: Array
    """B, from R tokens on."""
    verify_ms: Array
    """A target pass over so many."""
    beside_ms: Array
    """All but the pass, by streams drafted for, from 1 on, and slots, [m, G]."""


class Costs:
    """A capacity curve that answers for whole arrays, and remembers what it was asked.

    ``rough``: some of it is not known well enough to tell from it whether the machine has changed.
    """

    def __init__(self, curve: CapacityCurve, *, rough: bool = False) -> None:
        self.curve, self.rough = curve, rough
        self.table = lru_cache(maxsize=256)(self._table)
        self._outlays = lru_cache(maxsize=64)(self._outlay)
        self._drawing: dict[tuple[int, int], Costs] = {}

    def drawing(self, sampled: float, coupled: float) -> Costs:
        """The same where those shares of the streams are drawn for, ``coupled`` ones by torch; to a sixteenth."""
        shares = round(16 * sampled), ceil(16 * coupled)
        if shares == (0, 0):
            return self
        if shares not in self._drawing:
            c = self.curve
            row_ms = 1e-3 * (c.sample_us * shares[0] + c.coupled_us * shares[1]) / 16
            slot_ms = [1e-3 * c.draft_coupled_us * r * shares[1] / 16 for r in c.streams]
            dearer = msgspec.structs.replace(
                c,
                verify_ms=[ms + row_ms * n for n, ms in zip(c.tokens, c.verify_ms, strict=True)],
                draft_ms=[ms + c.gamma * more for ms, more in zip(c.draft_ms, slot_ms, strict=False)],
                slot_ms=[ms + more for ms, more in zip(c.slot_ms, slot_ms, strict=False)],
            )
            self._drawing[shares] = Costs(dearer, rough=shares[1] > 0)
        return self._drawing[shares]

    def slower(self, than: Costs, apart: float) -> float | None:
        """How many times as long everything takes as by other costs; None where it is not everything alike: where some
        passes or drafts have changed by more than ``apart`` times what others have.
        """
        now, then = self.curve, than.curve
        if (now.tokens, now.streams) != (then.tokens, then.streams):
            return None
        pairs = [*zip(now.verify_ms, then.verify_ms, strict=True), *zip(now.draft_ms, then.draft_ms, strict=True)]
        times = [a / b for a, b in pairs if b > 0]
        return times[0] if times and max(times) <= apart * min(times) else None

    def verify_ms(self, batch_tokens: Any, streams: int, position: float) -> Any:
        """A target pass over B tokens of R streams at mean position p̄; B may be an array."""
        c = self.curve
        context_ms = 1e-3 * (position - c.context) * (c.read_us * streams + c.attend_us * np.asarray(batch_tokens))
        base = interpolated(c.tokens, c.verify_ms, batch_tokens) + interpolated(c.streams, c.stream_ms, streams)
        return np.maximum(base + context_ms, LEAST_OF_BASE * base)

    def draft_ms(self, drafting: Any, slots: Any, position: float) -> Any:
        """Drafting ``slots`` tokens for so many streams, at least one, with what it adds to the pass after it; both may
        be arrays."""
        c = self.curve
        whole = interpolated(c.streams, c.draft_ms, drafting)
        spared = interpolated(c.streams, c.slot_ms, drafting) * (c.gamma - np.asarray(slots))
        seen = c.drafted_from(position) - c.drafted_from(c.context)
        context_ms = 1e-3 * seen * c.draft_read_us * np.asarray(drafting)
        return np.maximum(whole - spared + context_ms, LEAST_OF_BASE * whole) + self.after_draft_ms(drafting)

    def after_draft_ms(self, drafting: Any) -> Any:
        """Of `draft_ms`, what falls to the pass."""
        return interpolated(self.curve.streams, self.curve.after_draft_ms, drafting)

    def rest_ms(self, streams: int) -> float:
        """The rest of a round of R streams."""
        return float(interpolated(self.curve.streams, self.curve.rest_ms, streams))

    def round_cost(self, streams: int, position: float, drafting: int, slots: int) -> RoundCost:
        """What a round costs, for every B that it could have."""
        return self.table(streams, _near(position), drafting, slots)

    def outlay(self, streams: int, position: float, drafting: int, slots: int) -> Outlay:
        """What rounds cost in which up to ``drafting`` of R streams are drafted for, up to ``slots`` tokens each."""
        return self._outlays(streams, _near(position), drafting, slots)

    def _table(self, streams: int, position: int, drafting: int, slots: int) -> RoundCost:
        most = streams + drafting * slots
        rest_ms = self.rest_ms(streams)
        draft_ms = float(self.draft_ms(drafting, slots, position)) if drafting else 0.0
        ms = self.verify_ms(np.arange(streams, most + 1), streams, position) + (draft_ms + rest_ms)
        if drafting:
            draft_ms -= float(self.after_draft_ms(drafting))
        return RoundCost(streams, ms.tolist(), draft_ms=draft_ms, rest_ms=rest_ms)

    def _outlay(self, streams: int, position: int, drafting: int, slots: int) -> Outlay:
        rest_ms = self.rest_ms(streams)
        tokens = np.arange(streams, streams + drafting * slots + 1, dtype=float)
        verify_ms = self.verify_ms(tokens, streams, position)
        draft_ms = self.draft_ms(np.arange(1, drafting + 1)[:, None], np.arange(1, slots + 1), position)
        return Outlay(float(verify_ms[0]) + rest_ms, tokens, verify_ms, draft_ms + rest_ms)


def _near(position: float) -> int:
    """The position that stands for this one: what a round costs is told apart by steps of 32."""
    return 32 * round(position / 32)


# --- fitting -------------------------------------------------------------------------------------------------


def ladder(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, … 128, then doubling, up to and including ``largest``: few points, where curves bend."""
    sizes = {1, 3, largest} if largest >= 3 else {1, largest}
    step = 2
    while step <= largest:
        sizes |= {step, step * 3 // 2} if 2 < step < 128 else {step}
        step *= 2
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


def convex(values: Sequence[float]) -> list[float]:
    """The greatest convex sequence below ``values`` (their lower hull)."""
    corners: list[int] = []
    for i, value in enumerate(values):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (values[b] - values[a]) * (i - b) < (value - values[b]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    hull = np.interp(np.arange(len(values)), corners, [values[i] for i in corners])
    return [float(v) for v in hull]


def interpolated(xs: Sequence[int], ys: Sequence[float], x: Any) -> Any:
    """Linear between points, flat before the first, on with the last slope after the last; 0 without points."""
    if not ys:
        return np.zeros(np.shape(x))
    inside = np.interp(x, xs, ys)
    if len(xs) == 1:
        return inside
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return inside + slope * np.maximum(np.asarray(x) - xs[-1], 0)
