"""The scheduler and the capacity curve, against cases worked by hand and against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_stream.spec.capacity import CapacityCurve, ladder, measure, monotone
from dspark_stream.spec.schedule import Adaptive, Fixed, admit, parse_schedule

rows = st.lists(
    st.lists(st.floats(0.01, 1.0), max_size=4).map(lambda c: [*itertools.accumulate(c, lambda a, b: a * b)]),
    min_size=1,
    max_size=4,
)


def theta(survival, lengths, sps):
    return sum(1 + sum(row[:n]) for row, n in zip(survival, lengths, strict=True)) * sps(sum(1 + n for n in lengths))


def test_flat_curve_admits_everything_and_steep_curve_nothing():
    survival = [[0.9, 0.5], [0.3]]
    assert admit(survival, lambda b: 1.0) == [2, 1]
    assert admit(survival, lambda b: 1.0 / b) == [0, 0]


def test_admission_is_by_survival_over_all_streams():
    """τ: 2 → 2.9 → 3.7 → 4.0; SPS(B) 1/(B+6): Θ .25 → .322 → .37 → .3636, so the fifth token stays out."""
    assert admit([[0.9, 0.3], [0.8]], lambda b: 1.0 / (b + 6)) == [1, 1]


def test_ties_never_break_a_prefix():
    """Guards against a_2 = a_1 (c_2 = 1) being admitted as (r, 2) without (r, 1)."""
    curve = {2: 1.0, 3: 1.0, 4: 0.2}.get
    assert admit([[0.5, 0.5], [0.5, 0.5]], lambda b: curve(b, 0.01)) == [1, 0]


@given(rows)
def test_without_early_stop_the_maximum_is_found(survival):
    """On a staircase, admission by falling survival and the best prefix of it is the global optimum."""
    sps = lambda b: 1.0 / (4 + (b + 1) // 2)  # noqa: E731
    best = max(
        theta(survival, lengths, sps) for lengths in itertools.product(*(range(len(row) + 1) for row in survival))
    )
    assert theta(survival, admit(survival, sps, early_stop=False), sps) == pytest.approx(best)


@given(rows, st.integers(0, 5))
def test_later_confidences_do_not_move_earlier_admissions(survival, cut):
    """What losslessness rests on: whether (r, j) is admitted depends on survivals ≥ a_{r,j} alone."""
    sps = lambda b: 1.0 / (3 + b)  # noqa: E731
    lengths = admit(survival, sps)
    for r, row in enumerate(survival):
        for j in range(len(row)):
            changed = [list(x) for x in survival]
            changed[r] = row[:j] + [a * 0.1 for a in row[j:]]
            assert (admit(changed, sps)[r] >= j) == (lengths[r] >= j)


def test_fixed_and_its_names():
    assert Fixed(3).lengths([[0.5] * 7, [], [0.1] * 2], lambda b: 1.0) == [3, 0, 2]
    assert parse_schedule("fixed:0") == Fixed(0)
    assert parse_schedule("adaptive") == Adaptive()


def test_ladder_and_monotone():
    assert ladder(1) == [1]
    assert ladder(7) == [1, 2, 3, 4, 6, 7]
    assert ladder(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert monotone([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert monotone([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]


def test_curve_between_and_beyond_its_points():
    curve = CapacityCurve(
        tokens=[1, 4, 8], verify_ms=[10.0, 10.0, 18.0], streams=[1, 3], stream_ms=[0.0, 5.0], draft_ms=[2.0, 4.0]
    )
    assert curve.round_ms(2, 1, 0) == 10.0
    assert curve.round_ms(6, 1, 1) == pytest.approx(16.0)
    assert curve.round_ms(10, 3, 2) == pytest.approx(22.0 + 5.0 + 3.0)
    assert curve.sps(4, 1, 0) == pytest.approx(100.0)


def test_measure_takes_medians_after_a_first_pass_that_does_not_count():
    times = {n: iter([99.0, 5.0, n * 1.0, 7.0 + n]) for n in (1, 2, 3, 4)}
    curve = measure(lambda n: next(times[n]), lambda n: 4.0 + n, None, max_tokens=4, max_streams=3, repeats=3)
    assert curve.verify_ms == [5.0, 5.0, 5.0, 5.0]
    assert (curve.streams, curve.stream_ms) == ([1, 2, 3], [0.0, 1.0, 2.0])
    assert curve.draft_ms == [0.0, 0.0, 0.0]
