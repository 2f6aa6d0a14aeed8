"""The scheduler and the capacity curve, against cases worked by hand and against exhaustive search."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_stream.decoding.schedule import (
    Adaptive,
    Candidate,
    EarlyStop,
    Fixed,
    Lagged,
    RoundCost,
    Threshold,
    admit,
    convex,
    parse_schedule,
    pays,
)
from dspark_stream.engine.profile import Point, _Bench, fit, ladder, monotone, sweep
from dspark_stream.load.costs import CapacityCurve, Company, CostTable, Shape
from dspark_stream.models.cache import ExtentAllocator

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
    assert admit(survival, lambda b: b) == [0, 0]


def test_admission_is_by_survival_over_all_streams():
    """τ: 2 → 2.9 → 3.7 → 4.0; SPS(B) 1/(B+6): Θ .25 → .322 → .37 → .3636, so the fifth token stays out."""
    assert admit([[0.9, 0.3], [0.8]], lambda b: b + 6) == [1, 1]


def test_ties_never_break_a_prefix():
    """Guards against a_2 = a_1 (c_2 = 1) being admitted as (r, 2) without (r, 1)."""
    cost = {2: 1.0, 3: 1.0, 4: 5.0}.get
    assert admit([[0.5, 0.5], [0.5, 0.5]], lambda b: cost(b, 100.0)) == [1, 0]


@given(rows)
def test_without_early_stop_the_maximum_is_found(survival):
    """On a staircase, admission by falling survival and the best prefix of it is the global optimum."""

    def sps(b):
        return 1.0 / (4 + (b + 1) // 2)

    best = max(
        theta(survival, lengths, sps) for lengths in itertools.product(*(range(len(row) + 1) for row in survival))
    )
    assert theta(survival, admit(survival, lambda b: 1.0 / sps(b), early_stop=False), sps) == pytest.approx(best)


@given(rows, st.integers(0, 5))
def test_later_confidences_do_not_move_earlier_admissions(survival, cut):
    """What losslessness rests on: whether (r, j) is admitted depends on survivals ≥ a_{r,j} alone."""

    def cost(b):
        return 3 + b

    lengths = admit(survival, cost)
    for r, row in enumerate(survival):
        for j in range(len(row)):
            changed = [list(x) for x in survival]
            changed[r] = row[:j] + [a * 0.1 for a in row[j:]]
            assert (admit(changed, cost)[r] >= j) == (lengths[r] >= j)


def candidates(survival, exact=False, earlier=None):
    earlier = earlier or [()] * len(survival)
    return [Candidate(row, exact, old) for row, old in zip(survival, earlier, strict=True)]


def flat(first=1, last=40):
    return RoundCost(first, [1.0] * (last - first + 1))


def test_static_schedules_and_their_names():
    rows = candidates([[0.9, 0.5, 0.4, 0.1], [], [0.3, 0.2]])
    assert Fixed(3).lengths(rows, flat(3), 0.0) == [3, 0, 2]
    assert Threshold(0.4).lengths(rows, flat(3), 0.0) == [3, 0, 0]
    assert parse_schedule("fixed:0") == parse_schedule("none") == Fixed(0)
    assert parse_schedule("threshold:0.5") == Threshold(0.5)
    assert parse_schedule("adaptive") == Adaptive()
    assert parse_schedule("early-stop") == EarlyStop()
    assert parse_schedule("lagged") == Lagged()
    assert [s.slots(7) for s in (Fixed(3), Fixed(9), Threshold(0.1), Adaptive(), EarlyStop(), Lagged())] == [
        3, 7, 7, None, None, None,
    ]  # fmt: skip


def test_lagged_takes_its_budget_from_the_past_and_its_tokens_from_the_present():
    """The survivals of two rounds ago pay for three tokens (Θ .333, .475, .6, .625, then .538 with the fourth)."""
    cost = RoundCost(2, [6.0, 6.0, 6.0, 6.4, 8.0, 9.0, 10.0])
    old = [[0.9, 0.3], [0.8, 0.4]]
    live = [[0.2, 0.1], [0.7, 0.6, 0.5]]
    budget = sum(admit(old, cost, early_stop=False))
    assert budget == 3
    assert Lagged().lengths(candidates(live, earlier=old), cost, 0.0) == [0, 3]
    assert Lagged().lengths(candidates(live), cost, 0.0) == [0, 0]  # no past, no budget


@given(rows, st.floats(0.01, 2.0), st.lists(st.floats(0.0, 3.0), min_size=16, max_size=16))
def test_adaptive_finds_the_best_round_for_exact_streams(survival, price, steps):
    """No other choice of lengths is worth more at this price, whatever staircase the cost is."""
    cost = RoundCost(len(survival), [*itertools.accumulate([5.0, *steps])])

    def worth(lengths):
        tokens = sum(1 + sum(row[:n]) for row, n in zip(survival, lengths, strict=True))
        return tokens - price * cost(sum(1 + n for n in lengths))

    best = max(worth(lengths) for lengths in itertools.product(*(range(len(row) + 1) for row in survival)))
    assert worth(Adaptive().lengths(candidates(survival, exact=True), cost, price)) == pytest.approx(best)


@given(rows, st.floats(0.01, 2.0), st.lists(st.floats(0.0, 3.0), min_size=16, max_size=16))
def test_drafts_pay_where_the_search_admits_any(survival, price, steps):
    """Guards against looked-up drafts that are laid aside although some choice of them is worth its time."""
    cost = RoundCost(len(survival), [*itertools.accumulate(steps, initial=1.0)])
    admitted = any(Adaptive().lengths(candidates(survival, exact=True), cost, price))
    for other_price in (price * (1 - 1e-9), price * (1 + 1e-9)):  # where it hangs on the last digit, either will do
        if any(Adaptive().lengths(candidates(survival, exact=True), cost, other_price)) != admitted:
            return
    assert pays(survival, cost, price) == admitted


@given(rows, st.lists(st.booleans(), min_size=4, max_size=4), st.floats(0.01, 2.0), st.data())
def test_no_rejection_stream_decides_about_its_own_drafts(survival, exact, price, data):
    """What losslessness rests on, in mixed company too: ℓ_r ≥ j does not depend on a_{r,j+1}, a_{r,j+2}, …

    Nor on whether those were drafted at all. Exact streams may change; the rejection stream may not.
    """
    steps = data.draw(st.lists(st.floats(0.0, 3.0), min_size=16, max_size=16))
    cost = RoundCost(len(survival), [*itertools.accumulate([5.0, *steps])])

    def ask(schedule, rows):
        these = [Candidate(row, e, old) for row, e, old in zip(rows, exact, survival, strict=False)]
        return schedule.lengths(these, cost, price)

    for schedule in (Adaptive(), EarlyStop(), Lagged(), Threshold(0.3), Fixed(2)):
        lengths = ask(schedule, survival)
        for r, row in enumerate(survival):
            for j in range(1, len(row)):
                if exact[r] and isinstance(schedule, Adaptive):
                    continue
                changed = [list(x) for x in survival]
                changed[r] = row[:j] + [a * 0.1 for a in row[j:]]
                assert (ask(schedule, changed)[r] >= j) == (lengths[r] >= j)


def test_a_search_past_a_drop_does_decide_about_its_own_drafts():
    """The counterexample to the test above: a staircase that only a_2 makes worth climbing."""
    cost = RoundCost(1, [1.0, 2.0, 2.0])
    assert admit([[0.8, 0.72]], cost, early_stop=False) == [2]
    assert admit([[0.8, 0.0]], cost, early_stop=False) == [0]
    assert admit([[0.8, 0.72]], cost) == admit([[0.8, 0.0]], cost) == [0]


def test_the_hull_takes_early_stop_over_a_staircase():
    """Guards against sticking on a step: 16 rows at a time cost the same, the first of them pays for all."""
    stairs = RoundCost(1, [10.0, 14.0, 14.0, 14.0, 14.0])
    survival = [[0.9, 0.8, 0.7, 0.6]]
    assert admit(survival, stairs, worth=lambda tokens, ms: tokens - 0.25 * ms) == [0]
    assert Adaptive().lengths(candidates(survival), stairs, 0.25) == [4]


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=20))
def test_the_hull_is_convex_below_and_touches(values):
    hull = convex(values)
    assert all(h <= v + 1e-9 for h, v in zip(hull, values, strict=True))
    assert (hull[0], hull[-1]) == (values[0], values[-1])
    steps = [b - a for a, b in itertools.pairwise(hull)]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(steps))


def test_a_round_may_be_bounded():
    """Guards against a chunk gap that is asked for and not kept: nothing past the bound is admitted."""
    cost = RoundCost(2, [5.0, 6.0, 7.0, 8.0])
    rows = [[0.9, 0.9], [0.9]]
    for exact in (True, False):
        assert sum(Adaptive().lengths(candidates(rows, exact), cost.within(7.0), 0.01)) == 2
        assert sum(Adaptive().lengths(candidates(rows, exact), cost.within(1.0), 0.01)) == 0


def test_ladder_and_monotone():
    assert ladder(1) == [1]
    assert ladder(7) == [1, 2, 3, 4, 6, 7]
    assert ladder(32) == [1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32]
    tiled = [17, 24, 32, 33, 40, 48, 49, 56, 64]  # where kernels begin another tile of rows, and its middle
    assert ladder(600) == [1, 2, 3, 4, 6, 8, 12, 16, *tiled, 96, 128, 256, 512, 600]
    assert monotone([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert monotone([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]


CURVE = CapacityCurve(tokens=[1, 4, 8], verify_ms=[10.0, 10.0, 18.0], streams=[1, 3], draft_ms=[2.0, 4.0], gamma=1)


def test_curve_between_and_beyond_its_points():
    here = Company(1, 0.0)
    assert CURVE.pass_ms([2, 6, 16], here) == pytest.approx([10.0, 14.0, 36.0])
    assert CURVE.drafting_ms([1, 2, 3], 1, here) == pytest.approx([2.0, 3.0, 4.0])
    costs = CostTable(CURVE)
    assert costs.plain_ms(here) == 10.0
    dear = msgspec.structs.replace(CURVE, gamma=7, slot_ms=[3.0, 3.0])  # no machine's: whole blocks take less
    assert dear.drafting_ms(1, 1, here) == 0.0
    assert costs.round_cost(here, 1, 1).ms == pytest.approx([12.0, 12.0])
    assert len(costs.round_cost(here, 1, 1, looked_up=1).ms) == 3  # no size that cannot be


def test_curve_knows_context_and_slots():
    """Two streams at position 288, measured at one at 100: 476 positions more are read, and 188 for each row."""
    curve = msgspec.structs.replace(CURVE, gamma=4, slot_ms=[0.5, 0.5], context=100, read_us=10.0, attend_us=2.0)
    cost = CostTable(curve).round_cost(Company(2, 288.0), 2, 1)
    draft = 3.0 - 3 * 0.5
    assert cost.ms == pytest.approx([10.0 + (476 * 10.0 + b * 188 * 2.0) / 1e3 + draft for b in (2, 3, 4)])
    assert cost.first == 2


def test_all_choices_at_once_cost_what_each_of_them_does():
    """Guards against deciding by other costs than those that lengths are chosen by."""
    curve = msgspec.structs.replace(CURVE, gamma=4, slot_ms=[0.5, 0.5], context=100, read_us=10.0, attend_us=2.0)
    costs, company = CostTable(curve), Company(3, 288.0)
    for turn in range(40):  # and so it is once corrections were learnt
        shape = Shape(company, 2 * (turn // 4 % 2), 3 * (turn // 4 % 2), 9 if turn // 4 % 2 else 3)
        costs.learn(shape, costs.ms(shape) * (1.3 if shape.drafting else 1.0))
    assert costs.plain_ms(company) == costs.round_cost(company, 0, 0)(3)
    as_measured, passes = costs.drafting_ms(company), costs.passes(company, slice(9), drafted=True)
    for n, k in itertools.product((1, 2), (1, 2, 3, 4)):
        cost = costs.round_cost(company, n, k)
        draft_ms = float(curve.drafting_ms(n, k, company))
        assert as_measured[n][k] == draft_ms
        for b in range(3, 4 + n * k):
            pass_ms, times = passes[b - 3]
            assert pass_ms == float(curve.pass_ms(b, company))
            assert cost(b) == costs.ms(Shape(company, n, k, b)) == pytest.approx((pass_ms + draft_ms) * times)
    assert costs.round_cost(company, 2, 3)(9) > 1.1 * CostTable(curve).round_cost(company, 2, 3)(9)


def test_a_slope_that_was_measured_wrong_makes_nothing_free():
    """Guards against rounds that take no time at all before the position at which the curve was measured."""
    curve = msgspec.structs.replace(CURVE, context=256, read_us=200.0)
    assert curve.pass_ms(1, Company(1, 0.0)) == pytest.approx(2.5)


class Clock:
    """Points whose runs take what they say, and a clock that knows."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def point(self, size, values, more=0.0):
        """``more``: milliseconds of a run that it does not report."""

        def run(_):
            ms = next(values)
            self.now += (ms + more) / 1e3
            return ms

        return Point("rows", size, run)


def test_points_are_swept_and_the_first_run_does_not_count():
    clock, runs = Clock(), []
    points = [clock.point(n, iter([20.0, 35.0, 39.0 + n, 36.0] + [37.0] * 20)) for n in (1, 2)]
    assert sweep(points, lambda: runs.append(1), clock) == {"rows": {1: 37.0, 2: 37.0}}
    assert len(runs) >= 2 * 5  # so many visits, or one out of luck would count for much
    assert len(runs) % 2 == 0


def test_a_slow_point_is_measured_twice_and_a_very_slow_one_once():
    """Also where most of what it does is not what it reports."""
    clock = Clock()
    points = [clock.point(1, iter([500.0])), clock.point(2, iter([2.0]), more=400.0)]
    assert sweep(points, clock=clock) == {"rows": {1: 500.0, 2: 2.0}}
    assert sweep([clock.point(1, iter([200.0, 100.0]))], clock=clock) == {"rows": {1: 100.0}}


def test_short_points_are_measured_in_bursts_and_no_change_of_size_counts():
    """A service does the same round again and again."""
    clock = Clock()
    points = [clock.point(n, itertools.chain([7.0], itertools.cycle([0.5, 7.0, 7.0])), more=1.0) for n in (1, 2)]
    assert sweep(points, clock=clock) == {"rows": {1: 7.0, 2: 7.0}}


def test_a_point_is_the_lower_quartile_of_its_runs():
    clock = Clock()
    points = [clock.point(1, itertools.cycle([20.0, 20.0, 31.0])), clock.point(2, itertools.cycle([70.0, 110.0]))]
    assert sweep(points, clock=clock) == {"rows": {1: 20.0, 2: 70.0}}


def test_no_point_takes_what_is_the_others_and_all_end_with_the_budget():
    clock, runs = Clock(), []
    slow = Point("slow", 1, lambda size: runs.append(size) or clock.point(1, iter([70.0])).run(size))
    sweep([slow, *(clock.point(n, itertools.repeat(2.0)) for n in range(60))], clock=clock)
    assert len(runs) == 2
    spent = []
    for count in (40, 60):
        begun = clock.now
        sweep([clock.point(n, itertools.repeat(75.0)) for n in range(count)], clock=clock)
        spent.append(clock.now - begun)
    assert spent[0] == pytest.approx(spent[1], rel=0.02)  # however many there are
    assert spent[1] < 20  # seconds that the first start of a model may take longer


class Timed(_Bench):
    """Streams of a model that is not there."""

    def __init__(self, room, **sizes):
        super().__init__(None, None, None, None, ExtentAllocator(room), **sizes)


def test_measured_streams_have_room_for_what_is_measured_on_them():
    """Guards against rows that are written into a neighbour's extent, and against streams that share one needlessly."""
    bench = Timed(1 << 16, max_seqs=6, max_model_len=1024)
    assert 1 < bench.long_streams < 6
    assert all(e.size >= bench.long_context + bench.long_rows for e in bench._extents[: bench.long_streams])
    assert len({e.slot for e in bench._extents}) == 6
    tight = Timed(1024 + 5 * 288, max_seqs=6, max_model_len=1024)  # room for one long text and five short ones
    assert (tight.long_streams, len(tight._extents)) == (1, 6)
    assert Timed(512, max_seqs=2, max_model_len=1024)._extents == []


def test_fit_separates_what_was_measured_together():
    times = {
        "rows": {1: 10.0, 2: 9.0, 4: 14.0, 8: 20.0},
        "draft": {1: 2.0, 2: 3.1, 4: 3.0},
        "slot": {1: 0.8, 2: 1.3, 4: 0.0},
        "long": {1: 9.5 + 3.0 * 0.5, 8: 20.0 + (2.0 + 8.0) * 0.5},
        "features": {100: 0.7},
    }
    curve = fit(times, gamma=4, context=100, long_context=600)
    assert curve.tokens == [1, 2, 4, 8]
    assert curve.verify_ms == [9.5, 9.5, 14.0, 20.0]
    assert curve.draft_ms == pytest.approx([2.0, 3.05, 3.05])
    assert curve.slot_ms == pytest.approx([0.4, 0.6, 1.0])
    assert curve.attend_us == pytest.approx(1.0)
    assert curve.read_us == pytest.approx(2.0)
    assert curve.feature_us == pytest.approx(7.0)
    known = msgspec.structs.replace(curve, attend_us=1.0, read_us=2.0)
    times["long"] = {n: float(known.pass_ms(4 * n, Company(4, 600.0))) for n in (1, 2)}  # four streams of n rows
    together = fit(times, gamma=4, context=100, long_context=600, long_streams=4)
    assert (together.attend_us, together.read_us) == pytest.approx((1.0, 2.0))


def test_fit_of_a_model_without_a_drafter():
    curve = fit({"rows": {1: 10.0, 2: 12.0}}, gamma=0, context=100, long_context=600)
    assert (curve.streams, curve.draft_ms, curve.slot_ms) == ([1], [0.0], [])
    assert CostTable(curve).plain_ms(Company(2, 100.0)) == 12.0
