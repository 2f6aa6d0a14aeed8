"""What the next captured round is: rows, drafting or not, from the past alone and within a time."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_stream.decoding.schedule import Adaptive, EarlyStop, Fixed, Schedule, Threshold
from dspark_stream.engine.captured.graphs import Size, row_ladder
from dspark_stream.engine.captured.sizing import CapturedCurve, Sizing
from dspark_stream.engine.stream import Stream
from dspark_stream.load.controller import Controller
from dspark_stream.load.costs import Company, Shape
from tiny import FLAT, request

GAMMA = 4


class Ladder:
    """Sizes of four seats with made-up times."""

    def __init__(self, draft_ms: float, row_ms: float) -> None:
        self.round_ms: dict[Size, float] = {Size(4, n, True): 1.0 + draft_ms + row_ms * n for n in row_ladder(4, GAMMA)}
        self.offered = sorted(self.round_ms)
        self.round_ms |= {Size(4, 4, False, context): 1.0 + row_ms * 4 for context in (True, False)}

    def fit_seats(self, streams: int) -> int:
        return 4

    def drafting_sizes(self, seats: int) -> list[Size]:
        return self.offered


class Chooser(Sizing):
    """With made-up times; rounds can be made up for it, too."""

    def __init__(self, ladder: Ladder, schedule: Schedule) -> None:
        self.controller = Controller(GAMMA, CapturedCurve.over(ladder, FLAT))
        super().__init__(ladder, schedule, self.controller, GAMMA)
        self.times = ladder.round_ms

    def go_on(self, company: list[Stream], survival: list[float], rounds: int, more_ms: float = 0.0) -> list[Size]:
        """Rounds as it chooses them, whose drafts promise ``survival`` and keep it; each takes so much longer."""
        sizes = []
        for _ in range(rounds):
            sizes.append(size := self.choose(company))
            drafted = survival if size.drafting else []
            learnt = [(s.past, drafted, len(drafted), round(sum(drafted))) for s in company]
            self.controller.learn(learnt, self.shape(len(company), size), self.times[size] + more_ms)
        return sizes


def sizing(draft_ms: float = 0.1, row_ms: float = 0.0, schedule: Schedule | None = None) -> Chooser:
    return Chooser(Ladder(draft_ms, row_ms), schedule or Adaptive())


def streams(count: int = 4, mode: str = "dspark") -> list[Stream]:
    return [Stream(request(str(i), mode=mode), 48, GAMMA, frozenset(), None) for i in range(count)]


GOOD, BAD = [0.95, 0.9, 0.8, 0.7], [0.1, 0.02, 0.0, 0.0]


def show(chooser: Chooser, company: list[Stream], survival: list[float], rounds: int = 40) -> None:
    """Rounds whose drafts promised ``survival`` and kept it."""
    for _ in range(rounds):
        for stream in company:
            chooser.controller.acceptance.learn(stream.past, survival, GAMMA, round(sum(survival)))


def test_rows_follow_promises_and_costs():
    """Guards against a size that never changes: cheap rows and good drafts ask for more of them, dear rows for none."""
    for row_ms, expected in ((0.0, 20), (0.05, 20), (20.0, 4)):
        chooser, company = sizing(row_ms=row_ms), streams()
        show(chooser, company, GOOD)
        assert chooser.choose(company).rows == expected


def test_drafting_is_skipped_where_it_does_not_pay_and_looked_at_now_and_then():
    """Guards against a draft pass that every round pays for and none profits from, and against never trying again."""
    chooser, company = sizing(draft_ms=0.5), streams()
    chooser.go_on(company, BAD, 500)
    looks_before = chooser.controller.looks
    sizes = chooser.go_on(company, BAD, 5000)
    looks = chooser.controller.looks - looks_before
    assert 0 < 2 * looks - 1 <= sum(size.drafting for size in sizes) <= 2 * looks
    assert {size.rows for size in sizes} == {4, 8}  # a look verifies one stream's whole block
    took, least = sum(chooser.times[size] for size in sizes), 5000 * chooser.times[Size(4, 4, False, context=True)]
    assert took < 1.02 * least
    chooser.go_on(company, GOOD, 8000)
    assert sum(size.drafting for size in chooser.go_on(company, GOOD, 100)) > 90


def test_promises_that_are_not_kept_count_less():
    """Guards against an overconfident drafter: it is believed as far as it was right."""
    chooser, company = sizing(draft_ms=0.5), streams()
    for _ in range(400):
        for stream in company:
            chooser.controller.acceptance.learn(stream.past, GOOD, GAMMA, 0)
    assert not chooser.choose(company).drafting


def test_what_rounds_really_take_counts():
    """Guards against times of an empty machine: what attention adds makes a draft pass cheap beside it."""
    chooser, company = sizing(draft_ms=1.0), streams()
    promised = [0.6, 0.3, 0.1, 0.0]
    show(chooser, company, promised)
    assert not any(size.drafting for size in chooser.go_on(company, promised, 8))
    chooser.go_on(company, promised, 2000, more_ms=20.0)
    assert sum(size.drafting for size in chooser.go_on(company, promised, 100, more_ms=20.0)) > 90
    costs = chooser.controller.costs
    assert costs.pace * costs.plain_ms(Company(4, 0.0)) == pytest.approx(21.0, rel=0.1)


def test_captured_sizes_are_steps():
    """Guards against times of rounds that no graph has: what is verified goes up to the next size."""
    curve = CapturedCurve.over(Ladder(0.5, 0.1), FLAT)
    company = Company(3, 0.0)
    drafting = curve.drafting_ms(np.array([1, 3]), np.array([[1], [4]]), company)
    assert drafting == pytest.approx(np.full((2, 2), 0.5))
    whole = curve.pass_ms(np.arange(3, 21), company) + 0.5
    up_to = [4] * 2 + [6] * 2 + [8] * 2 + [12] * 4 + [20] * 8
    assert whole[0] == whole[1] == pytest.approx(1.9)  # a plain round, and drafting
    assert whole == pytest.approx([1.5 + 0.1 * rows for rows in up_to])
    assert curve.pass_ms(64, company) == whole[-1] - 0.5  # there is no larger one


def test_rows_are_those_of_sizes():
    """Guards against corrections that are learnt of a size, and looked up at what is verified of it."""
    curve, company = CapturedCurve.over(Ladder(0.5, 0.1), FLAT), Company(3, 0.0)
    assert curve.rows(np.array([3, 4, 5, 12, 13, 20, 64]), company).tolist() == [4, 4, 6, 12, 20, 20, 20]
    assert FLAT.rows(5, company) == 5


def test_a_round_of_one_length_alone_takes_what_it_took():
    """Guards against a draft pass that is counted as the eager one beside captured rounds, or twice."""
    ladder, company = Ladder(0.5, 0.1), Company(3, 0.0)
    ladder.round_ms = {Size(4, 20, True): 3.5, Size(4, 4, False, context=True): 1.25}
    ladder.offered = [Size(4, 20, True)]
    costs = Controller(GAMMA, CapturedCurve.over(ladder, FLAT)).costs
    assert costs.ms(Shape(company, 3, GAMMA, 20)) == pytest.approx(3.5)
    assert costs.plain_ms(company) == pytest.approx(1.25)
    ladder.round_ms, ladder.offered = {Size(4, 4, False): 0.75}, []  # nothing is ever drafted
    costs.look_again()
    assert costs.plain_ms(company) == pytest.approx(0.75)


def test_sizes_that_were_not_timed_go_by_the_measured_curve():
    ladder = Ladder(0.5, 0.1)
    ladder.round_ms.clear()
    curve, company = CapturedCurve.over(ladder, FLAT), Company(3, 0.0)
    assert curve.pass_ms(9, company) == FLAT.pass_ms(12, company)
    assert curve.drafting_ms(3, 4, company) == pytest.approx(FLAT.drafting_ms(1, 1, company))


def test_blocks_that_differ_are_worth_more_than_their_mean():
    """Guards against a plan that drafts and sizes that do not: the device takes the best of blocks of every kind, which
    the mean of blocks does not show."""
    chooser, company = sizing(draft_ms=0.3, row_ms=0.15), streams()
    for i in range(80):
        for stream in company:
            chooser.controller.acceptance.learn(stream.past, ([1.0] * GAMMA, [0.1, 0.0, 0.0, 0.0])[i % 2], 0, 0)
    plan = chooser.controller.plan([s.past for s in company], Company(4, 0.0))
    assert any(plan.drafting)
    assert chooser.choose(company).drafting


def test_within_a_time():
    """Guards against a bound on chunk gaps that is not heard: fewer rows, else no drafts."""
    chooser, company = sizing(draft_ms=0.1, row_ms=0.1), streams()
    show(chooser, company, GOOD)
    assert chooser.choose(company, 10.0).rows == 20
    assert chooser.choose(company, 2.4).rows == 12
    for slowest_ms in (1.55, 1.2):  # drafting is in time, but not a row for a draft; nor is drafting
        assert chooser.choose(company, slowest_ms) == Size(4, 4, False, context=True)


def test_schedules_with_a_length_of_their_own():
    """Guards against drafts for nothing under "none", and against rows too few for a rule that the device applies."""
    company = streams()
    assert sizing(schedule=Fixed(0)).choose(company) == Size(4, 4, False)
    for schedule in (EarlyStop(), Threshold(0.5)):
        chooser = sizing(schedule=schedule)
        show(chooser, company, GOOD)
        assert chooser.choose(company).rows == 20
    assert sizing().choose(streams(mode="plain")) == Size(4, 4, False)
    assert sizing().steps_a_second(3) is None
    table = sizing(row_ms=1.0, schedule=EarlyStop()).steps_a_second(3)
    assert len(table) == 21
    assert table == sorted(table, reverse=True)
    assert table[20] == pytest.approx(1000 / 21.1)
