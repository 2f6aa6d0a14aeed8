"""What the next captured round is: rows, drafting or not, from the past alone and within a time."""

from __future__ import annotations

import itertools

import pytest

from dspark_stream.decoding.schedule import Adaptive, EarlyStop, Fixed, Schedule, Threshold
from dspark_stream.engine.captured.graphs import Size, row_ladder
from dspark_stream.engine.captured.sizing import Sizing
from dspark_stream.engine.stream import Stream
from dspark_stream.load.acceptance import Acceptance
from tiny import request

GAMMA = 4


class Ladder:
    """Sizes of four seats with made-up times."""

    def __init__(self, draft_ms: float, row_ms: float) -> None:
        self.round_ms: dict[Size, float] = {Size(4, n, True): 1.0 + draft_ms + row_ms * n for n in row_ladder(4, GAMMA)}
        self.round_ms |= {Size(4, 4, False, context): 1.0 + row_ms * 4 for context in (True, False)}

    def fit_seats(self, streams: int) -> int:
        return 4

    def drafting_sizes(self, seats: int) -> list[Size]:
        return sorted(size for size in self.round_ms if size.drafting)


class Chooser(Sizing):
    """With made-up times; what drafts were like can be told it."""

    def __init__(self, ladder: Ladder, schedule: Schedule) -> None:
        self.acceptance = Acceptance(GAMMA)
        super().__init__(ladder, schedule, self.acceptance)


def sizing(draft_ms: float = 0.1, row_ms: float = 0.0, schedule: Schedule | None = None) -> Chooser:
    return Chooser(Ladder(draft_ms, row_ms), schedule or Adaptive())


def streams(count: int = 4, mode: str = "dspark") -> list[Stream]:
    return [Stream(request(str(i), mode=mode), 48, GAMMA, frozenset(), None) for i in range(count)]


GOOD, BAD = [0.95, 0.9, 0.85, 0.8], [0.1, 0.02, 0.0, 0.0]


def show(chooser: Chooser, company: list[Stream], survival: list[float], rounds: int = 40) -> None:
    """Rounds whose drafts promised ``survival`` and kept it."""
    for _ in range(rounds):
        for stream in company:
            chooser.acceptance.learn(stream.past, survival, GAMMA, round(sum(survival)))


def test_rows_follow_promises_and_costs():
    """Guards against a size that never changes: cheap rows and good drafts ask for more of them, dear rows for none."""
    for row_ms, expected in ((0.0, 20), (0.05, 20), (20.0, 4)):
        chooser, company = sizing(row_ms=row_ms), streams()
        show(chooser, company, GOOD)
        assert chooser.choose(company).rows == expected


def test_drafting_is_skipped_where_it_does_not_pay_and_looked_at_now_and_then():
    """Guards against a draft pass that every round pays for and none profits from."""
    chooser, company = sizing(draft_ms=0.5), streams()
    show(chooser, company, BAD)
    sizes = [chooser.choose(company) for _ in range(5000)]
    looks = [i for i, size in enumerate(sizes) if size.drafting]
    waits = [b - a for a, b in itertools.pairwise([-1, *looks])]
    assert 10 < waits[0] < 100
    assert waits == [min(waits[0] << i, waits[-1]) for i in range(len(waits))]  # each twice the one before, to a limit
    assert 8 * waits[0] < waits[-1] == waits[-2]
    assert all(size == Size(4, 4, False, context=True) for i, size in enumerate(sizes) if i not in looks)
    assert chooser.probes == len(looks)
    show(chooser, company, GOOD)
    assert chooser.choose(company).drafting


def test_promises_that_are_not_kept_count_less():
    """Guards against an overconfident drafter: it is believed as far as it was right."""
    chooser, company = sizing(draft_ms=0.5), streams()
    for _ in range(400):
        for stream in company:
            chooser.acceptance.learn(stream.past, GOOD, GAMMA, 0)
    assert not chooser.choose(company).drafting


def test_what_rounds_really_take_counts():
    """Guards against times of an empty machine: what attention adds makes a draft pass cheap beside it."""
    chooser, company = sizing(draft_ms=1.0), streams()
    show(chooser, company, [0.6, 0.2, 0.05, 0.0])
    assert not chooser.choose(company).drafting
    for _ in range(9):
        chooser.saw_round(Size(4, 4, False, context=True), 21.0)
    assert chooser.choose(company).drafting
    assert chooser.plain_ms(3) == pytest.approx(21.0)


def test_within_a_time():
    """Guards against a bound on chunk gaps that is not heard: fewer rows, else no drafts."""
    chooser, company = sizing(draft_ms=0.1, row_ms=0.1), streams()
    show(chooser, company, GOOD)
    assert chooser.choose(company, 10.0).rows == 20
    assert chooser.choose(company, 2.4).rows == 12
    assert chooser.choose(company, 1.2) == Size(4, 4, False, context=True)


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
