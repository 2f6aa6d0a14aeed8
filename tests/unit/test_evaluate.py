"""The figures of `eval`, on rounds whose figures are known."""

import pytest

from dspark_stream.measure.evaluate import (
    Figures,
    Part,
    Tally,
    acceptance_by_position,
    context_range,
    parts_table,
    prompt_lookup,
    table,
)
from dspark_stream.types import RoundRecord, Usage


def calibration_error(rounds):
    tally = Tally()
    for one in rounds:
        tally.add_round(one)
    return tally.figures().calibration_error


def a_round(accepted: int, survival: list[float], scheduled: int | None = None, start: int = 0) -> RoundRecord:
    return RoundRecord(
        start=start,
        anchor=0,
        draft_tokens=list(range(len(survival))),
        scheduled=len(survival) if scheduled is None else scheduled,
        accepted=accepted,
        bonus=0,
        confidence=survival,
        survival=survival,
        t_draft_ms=0.0,
        t_verify_ms=0.0,
        batch_tokens=1,
        streams=1,
    )


def test_acceptance_is_conditional_on_what_came_before():
    rounds = [a_round(n, [0.5] * 3) for n in (0, 1, 1, 2)]
    assert acceptance_by_position(rounds) == [3 / 4, 1 / 3, 0.0]


def test_a_position_that_was_not_scheduled_says_nothing_about_it():
    rounds = [a_round(1, [0.5] * 3, scheduled=1), a_round(2, [0.5] * 3)]
    assert acceptance_by_position(rounds) == [1.0, 1.0, 0.0]
    rounds = [a_round(0, [0.5] * 3), a_round(1, [0.5] * 3, scheduled=1)]
    assert acceptance_by_position(rounds) == [1 / 2, None, None]


def test_plain_rounds_have_no_acceptance():
    rounds = [a_round(0, [])]
    assert acceptance_by_position(rounds) == []
    assert calibration_error(rounds) is None


def test_a_calibrated_promise_has_no_error():
    rounds = [a_round(1, [0.75])] * 3 + [a_round(0, [0.75])]
    assert calibration_error(rounds) == pytest.approx(0.0)


def test_errors_of_different_bins_do_not_cancel():
    # 0.25 promised and always kept, 0.75 promised and never: on average right, in no bin right.
    rounds = [a_round(1, [0.25])] * 5 + [a_round(0, [0.75])] * 5
    assert calibration_error(rounds) == pytest.approx(0.75)


def test_calibration_is_of_prefixes_and_averaged_over_positions():
    # Position 1: 0.95 promised, all kept: 0.05. Position 2: 0.5 promised, none kept: 0.5.
    rounds = [a_round(1, [0.95, 0.5])] * 4
    assert calibration_error(rounds) == pytest.approx((0.05 + 0.5) / 2)


def test_calibration_uses_scheduled_positions_only():
    rounds = [a_round(1, [1.0, 0.9], scheduled=1)] * 4
    assert calibration_error(rounds) == pytest.approx(0.0)


def test_error_and_reliability_by_position():
    tally = Tally()
    for accepted in (1, 1, 1, 0):
        tally.add_round(a_round(accepted, [0.75, 0.15]))
    figures = tally.figures()
    assert figures.calibration_error_by_position == pytest.approx([0.0, 0.15])
    assert figures.reliability == [[(0.75, 0.75, 4)], [(0.15, 0.0, 4)]]


def test_rounds_by_turn_and_by_context_add_up():
    tally, other = Tally(), Tally()
    tally.add_round(a_round(2, [0.5] * 2, start=127), turn=1)
    tally.add_round(a_round(1, [0.5] * 2, start=128), turn=1)
    other.add_round(a_round(0, [0.5] * 2, start=200), turn=2)
    tally += other
    figures = tally.figures()
    assert figures.by_turn == {"1": Part(2, 2.5), "2": Part(1, 1.0)}
    assert figures.by_context == {"0-127": Part(1, 3.0), "128-255": Part(2, 1.5)}
    assert parts_table(figures).splitlines() == [
        "accepted length (rounds) by turn:  1: 2.50 (2)  2: 1.00 (1)",
        "accepted length (rounds) by context:  0-127: 3.00 (1)  128-255: 1.50 (2)",
    ]
    assert [context_range(p) for p in (0, 8191, 8192)] == ["0-127", "4096-8191", "8192-"]


def test_prompt_lookup_by_hand():
    # the prompt ends in 1 2 3, seen before with 4 5 6 7 after it; the text goes on 4 5 9 and then with news
    prompt = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert prompt_lookup([*prompt, 4, 5, 9, *range(20, 30)], len(prompt)) == [2, 0, 0, 0]
    # a loop is foretold further than it is known
    assert prompt_lookup([5, 6, 7, 5, 6, 7, *[5, 6, 7] * 7], 6) == [7, 7]
    assert prompt_lookup([1, 2], 2) == []


def test_in_all_is_counted_not_averaged():
    few, many = Tally(), Tally()
    few.wall_s, many.wall_s = 1.0, 2.0
    few.add_round(a_round(3, [0.5] * 3))
    for _ in range(9):
        many.add_round(a_round(0, [0.5] * 3))
    few.add_stream(Usage(input_tokens=1, output_tokens=11, decode_ms=1000))
    many.add_stream(Usage(input_tokens=1, output_tokens=21, decode_ms=1000))
    together = Tally()
    together += few
    together += many
    figures = together.figures()
    assert figures.accepted_length == pytest.approx(1 + 3 / 10)
    assert (figures.rounds, figures.prompts, figures.output_tokens) == (10, 2, 32)
    assert figures.tokens_per_s_user == pytest.approx((10 + 20) / 2)
    assert figures.tokens_per_s_total == pytest.approx(32 / 3)


def test_a_stream_of_one_token_has_no_speed():
    tally = Tally()
    tally.add_stream(Usage(input_tokens=1, output_tokens=1, decode_ms=0.0))
    figures = tally.figures()
    assert (figures.tokens_per_s_user, figures.accepted_length, figures.tokens_per_s_total) == (None,) * 3


def test_the_table_lines_up_and_shows_gaps_as_dashes():
    figures = Tally().figures()
    assert isinstance(figures, Figures)
    header, row = table({"all": figures}).splitlines()
    assert header.index("rounds") + len("rounds") == row.index("0", header.index("rounds")) + 1
    assert row.endswith("-")
