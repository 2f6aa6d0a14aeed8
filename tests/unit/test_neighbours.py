"""Rounds beside each other: which changes are told of, when, and by how much."""

from __future__ import annotations

import pytest

from dspark_stream.spec.neighbours import WIDTH, Neighbours, Step


def told(rounds):
    """Steps, each with the number of rounds seen by then."""
    seen = Neighbours()
    steps = [seen.see(kind, value) for kind, value in rounds]
    return [(i + 1, step) for i, step in enumerate(steps) if step is not None]


def test_a_change_is_told_of_once_by_the_rounds_next_to_it():
    rounds = [("a", 9.0)] * 20 + [("a", 1.0)] * WIDTH + [("b", 1.5)] * WIDTH + [("b", 7.0)] * 20
    assert told(rounds) == [(20 + 2 * WIDTH, Step("a", "b", 0.5, 1.0))]


def test_one_slow_round_moves_nothing():
    rounds = [("a", 1.0)] * WIDTH + [("b", 1.5)] * (WIDTH - 2) + [("b", 90.0)] + [("b", 1.5)]
    assert told(rounds)[0][1].size == 0.5


def test_short_runs_count_less_and_are_told_of_by_the_next_change():
    steps = told([("a", 1.0)] * WIDTH + [("b", 2.0)] + [("a", 1.0)] * WIDTH + [("c", 3.0)] * 2)
    assert steps == [
        (WIDTH + 2, Step("a", "b", 1.0, pytest.approx(1 / WIDTH))),
        (2 * WIDTH + 1, Step("b", "a", -1.0, pytest.approx(1 / WIDTH))),
    ]  # of c not enough is known yet


def test_one_kind_alone_tells_nothing():
    assert told([("a", float(i)) for i in range(50)]) == []


def test_values_that_are_held_against_something_else_move_with_it():
    seen = Neighbours()
    for kind, value in [("a", 1.0)] * WIDTH + [("b", 2.0)] * (WIDTH - 1):
        assert seen.see(kind, value) is None
    seen.move({"a": 0.5, "b": -0.25}.get)
    assert seen.see("b", 1.75) == Step("a", "b", 0.25, 1.0)
