"""Tokens of rows of scores: edits, the greatest, races, and distributions that tokens are drawn from."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import numpy as np

from dspark_kernels.cpu.binding import Context, Doubles, Floats, Ints, Longs, int32s, must, ptr
from dspark_kernels.edits import EDIT, Edits


class _Edits(ctypes.Structure):
    """`Edits` of csrc/edits.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("entries", "stops")),
        *((name, ctypes.c_int32) for name in ("count", "stop_count", "masked")),
        *((name, ctypes.c_float) for name in ("frequency", "presence", "repetition")),
    )


class EditList:
    """Edits of N streams as the kernels read them; None for streams that have none.

    Raises:
        ValueError: tokens outside the vocabulary.
    """

    def __init__(self, edits: Sequence[Edits | None], width: int) -> None:
        self._keep = edits
        self._structs: list[_Edits | None] = []
        for edit in edits:
            if edit is None:
                self._structs.append(None)
                continue
            entries, stops = edit.entries, edit.stops
            must(entries.dtype == EDIT and entries.flags.c_contiguous, "edits of another type")
            must(stops.dtype == np.int32 and stops.flags.c_contiguous, "stop tokens of another type")
            for tokens in (entries["token"], stops):
                must(not len(tokens) or 0 <= tokens.min() <= tokens.max() < width, "edits outside the vocabulary")
            self._structs.append(
                _Edits(ptr(entries), ptr(stops), len(entries), len(stops), *edit[2:]),
            )
        at = [None if s is None else ctypes.addressof(s) for s in self._structs]
        self._pointers = (ctypes.c_void_p * len(at))(*at)
        self.address = ctypes.addressof(self._pointers)


class EditedBlock(NamedTuple):
    """Rows ``first`` … ``first + len(drafts)`` of one stream: each sees the drafts before it."""

    first: int
    drafts: Sequence[int]
    edits: Edits


def edit_rows(context: Context, scores: Floats, blocks: Sequence[EditedBlock]) -> None:
    """Edit some of scores [N, V] where they stand.

    Raises:
        ValueError: rows or tokens that are not there.
    """
    rows, width = scores.shape
    must(scores.dtype == np.float32 and scores.flags.c_contiguous, "scores of another kind")
    drafts = [token for block in blocks for token in block.drafts]
    for block in blocks:
        must(block.first >= 0 and block.first + len(block.drafts) < rows, "blocks without rows")
    must(not drafts or (min(drafts) >= 0 and max(drafts) < width), "drafts outside the vocabulary")
    listed = EditList([block.edits for block in blocks], width)
    words = int32s([*(b.first for b in blocks), *(len(b.drafts) for b in blocks), *drafts])
    at, count = words.ctypes.data, len(blocks)
    edit = context.library.edit
    context.check(
        edit(context.handle, ptr(scores), width, count, at, at + 4 * count, at + 8 * count, listed.address),
    )


def best_tokens(context: Context, scores: Floats, rows: Sequence[int]) -> list[int]:
    """The greatest of each of those rows of scores [N, V], the first of equal ones; -1 where that is no finite number,
    or any is NaN.

    Raises:
        ValueError: rows that are not there.
    """
    must(scores.dtype == np.float32 and scores.flags.c_contiguous and scores.shape[1] > 0, "scores of another kind")
    must(not len(rows) or (min(rows) >= 0 and max(rows) < len(scores)), "rows that are not there")
    count = len(rows)
    words = np.array([*rows, *[0] * count], dtype=np.int32)
    at = words.ctypes.data
    context.check(context.library.best(context.handle, ptr(scores), scores.shape[1], at, count, at + 4 * count))
    found: list[int] = words[count:].tolist()
    return found


def sampling_rows(rows: Sequence[tuple[float, float, float, int]]) -> Floats:
    """What rows are drawn by, as the kernels read it [n, 4]: temperature (0: the greatest), top-p (1: off), min-p (0:
    off), top-k (0: off).
    """
    out = np.empty((len(rows), 4), dtype=np.float32)
    out[:, :3] = [row[:3] for row in rows] or np.empty((0, 3))
    out.view(np.int32)[:, 3] = [min(row[3], 2**31 - 1) for row in rows]
    return out


def noise_rows(rows: Sequence[tuple[int, int]]) -> Longs:
    """Which noise rows race by, as the kernels read it [n, 2]: a stream's seed, of 64 bits, and an output position (-1:
    no race)."""
    out = np.empty((len(rows), 2), dtype=np.int64)
    out.view(np.uint64)[:, 0] = [seed & 0xFFFF_FFFF_FFFF_FFFF for seed, _ in rows]
    out[:, 1] = [position for _, position in rows]
    return out


def race(
    context: Context, scores: Floats, sampling: Floats, noise: Longs, rows: Sequence[int] | Ints | None = None
) -> list[int]:
    """The tokens of least E/p [n] (`reference.race`), p by each row's sampling, E by its noise; -1 where there is none.

    Who wins depends neither on the other rows nor on the number of threads.

    Args:
        scores: [N, V]; rows that race become weights where they stand, as by `Weights.of`.
        sampling: `sampling_rows` [n, 4], every temperature above 0.
        noise: `noise_rows` [n, 2], all at positions from 0 on.
        rows: which of ``scores`` [n], each once; None: all.
    """
    chosen = np.arange(len(scores), dtype=np.int32) if rows is None else int32s(rows)
    count, width = len(chosen), scores.shape[1]
    must(scores.dtype == np.float32 and scores.flags.c_contiguous and width > 0, "scores of another kind")
    must(count == 0 or (chosen.min() >= 0 and chosen.max() < len(scores)), "rows that are not there")
    must(len(np.unique(chosen)) == count, "a row twice")
    check_sampling(sampling, count)
    must((sampling[:, 0] > 0).all(), "a temperature above 0 is needed for every row")
    check_noise(noise, count)
    must((noise[:, 1] >= 0).all(), "rows without a position")
    tokens = np.empty(count, dtype=np.int32)
    places = ptr(scores), width, ptr(chosen), count, ptr(sampling), ptr(noise), ptr(tokens)
    context.check(context.library.race(context.handle, *places))
    found: list[int] = tokens.tolist()
    return found


class Weights(NamedTuple):
    """N rows that tokens are drawn from: probabilities before they are divided by their sums."""

    context: Context
    values: Floats  # [N, V]
    totals: Doubles  # [N]

    @classmethod
    def of(cls, context: Context, scores: Floats, sampling: Floats) -> Weights:
        """exp(score/temperature), up to a factor, in place of scores [N, V], 0 where a token is cut off.

        ``sampling``: `sampling_rows` [N, 4], every temperature above 0.
        """
        rows, width = scores.shape
        must(scores.dtype == np.float32 and scores.flags.c_contiguous and width > 0, "scores of another kind")
        check_sampling(sampling, rows)
        must((sampling[:, 0] > 0).all(), "a temperature above 0 is needed for every row")
        totals = np.empty(rows)
        context.check(context.library.weigh(context.handle, ptr(scores), rows, width, ptr(sampling), ptr(totals)))
        return cls(context, scores, totals)

    def probability(self, row: int, token: int) -> float:
        """Of one token of one row."""
        total = float(self.totals[row])
        return float(self.values[row, token]) / total if total else nan

    def probabilities(self, row: int) -> Floats:
        """Of one row [V], adding up to 1."""
        out: Floats = self.values[row] * np.float32(1.0 / self.totals[row])
        return out

    def draw(self, row: int, uniform: float) -> int:
        """A token of one row by inverse transform, never one of probability 0; -1 where there is no other. ``uniform``:
        in [0, 1).
        """
        values = self.values[row]
        return int(self.context.library.draw(ptr(values), len(values), self.totals[row], uniform))

    def overlap(self, row: int, share: float, q: Floats, ids: Ints | None) -> float:
        """Σ min(share · p, q) of one row; q and ids as for `draw_rest`."""
        self._check(q, ids)
        values, total = self.values[row], self.totals[row]
        library = self.context.library
        return float(library.overlap(ptr(values), len(values), total, share, ptr(q), ptr(ids), len(q)))

    def draw_rest(self, row: int, uniform: float, share: float, q: Floats, ids: Ints | None) -> int:
        """A token of max(share · p - q, 0) of one row, of p where rounding leaves nothing of that.

        Args:
            share: in (0, 1].
            q: probabilities [Vd].
            ids: the tokens that they are of [Vd], ascending; None: all of them.
        """
        self._check(q, ids)
        values, total = self.values[row], self.totals[row]
        library = self.context.library
        return int(library.draw_rest(ptr(values), len(values), total, share, ptr(q), ptr(ids), len(q), uniform))

    def judge(
        self,
        first: int,
        tokens: Sequence[int],
        q: Weights,
        q_first: int,
        indices: Sequence[int],
        ids: Ints | None,
        accept: Sequence[float],
        uniform: float,
    ) -> tuple[int, int]:
        """Block verification (models/distributions.py, `judge`): how many of ℓ ≥ 1 drafts stand, and the bonus token.

        Args:
            first: p of the first draft's row; ℓ + 1 rows from there on.
            tokens: the drafts [ℓ].
            q: what they were drawn from, from row ``q_first`` on, over the tokens ``ids`` (as for `draw_rest`).
            indices: the drafts among ``ids`` [ℓ].
            accept: uniforms [ℓ or more].
            uniform: what the bonus token is drawn by.
        """
        length, width = len(tokens), self.values.shape[1]
        self._check(q.values[q_first], ids)
        must(0 < length <= min(len(indices), len(accept)), "drafts without indices or uniforms")
        must(first + length < len(self.values) and q_first + length <= len(q.values), "drafts without rows")
        tokens, among = list(tokens), list(indices[:length])
        must(min(tokens) >= 0 and max(tokens) < width, "drafts outside the vocabulary")
        must(min(among) >= 0 and max(among) < q.values.shape[1], "drafts outside the draft vocabulary")
        whole, bonus = ctypes.c_int32 * length, ctypes.c_int32()
        stand = self.context.library.judge(
            *(ptr(self.values[first]), ptr(self.totals[first:]), width),
            *(ptr(q.values[q_first]), ptr(q.totals[q_first:]), q.values.shape[1]),
            *(ptr(ids), whole(*tokens), whole(*among), length),
            *((ctypes.c_double * length)(*accept[:length]), uniform, ctypes.byref(bonus)),
        )
        if stand < 0:
            raise MemoryError(self.context.library.error().decode())
        return int(stand), bonus.value

    def _check(self, q: Floats, ids: Ints | None) -> None:
        width = self.values.shape[1]
        must(q.dtype == np.float32 and q.flags.c_contiguous, "probabilities of another kind")
        if ids is None:
            must(q.shape == (width,), "probabilities of another vocabulary")
        else:
            must(
                ids.dtype == np.int32 and ids.flags.c_contiguous and ids.shape == q.shape, "ids of other probabilities"
            )
            must(len(ids) == 0 or 0 <= ids[0] <= ids[-1] < width, "ids outside the vocabulary")


def check_sampling(sampling: Floats, rows: int) -> None:
    """That it is `sampling_rows` of so many."""
    must(
        sampling.dtype == np.float32 and sampling.shape == (rows, 4) and sampling.flags.c_contiguous,
        "sampling of other rows",
    )


def check_noise(noise: Longs, rows: int) -> None:
    """That it is `noise_rows` of so many."""
    must(noise.dtype == np.int64 and noise.shape == (rows, 2) and noise.flags.c_contiguous, "noise of other rows")
