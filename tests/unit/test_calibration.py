"""Sequential Platt Scaling: what it finds where the truth is known, and the file it is kept in."""

import random

import pytest

from dspark_stream.decoding.calibration import (
    Calibration,
    expected_calibration_error,
    load_calibration,
    logit,
    reliability,
    save_calibration,
    sigmoid,
)
from dspark_stream.decoding.platt import Observed, fit_scaling
from dspark_stream.errors import ConfigError, ModelLoadError
from dspark_stream.measure.calibrate import error_floor, errors


def rounds_of(temperatures, biases, count=6000, seed=0):
    """Rounds of a head that says σ(logit) where σ(logit/T + b) is true, T and b by position."""
    rng = random.Random(seed)
    rounds = []
    for _ in range(count):
        logits = [rng.gauss(0.5, 2.0) for _ in temperatures]
        chances = [sigmoid(x / t + b) for x, t, b in zip(logits, temperatures, biases, strict=True)]
        accepted = next((k for k, c in enumerate(chances) if rng.random() >= c), len(chances))
        rounds.append(Observed(logits, accepted))
    return rounds


def test_temperatures_and_biases_are_found_position_by_position():
    temperatures, biases = [2.0, 0.5, 1.0], [-0.7, 0.0, 0.4]
    rounds = rounds_of(temperatures, biases)
    found = fit_scaling(rounds, 3)
    assert found.temperatures == pytest.approx(temperatures, rel=0.2)
    assert found.biases == pytest.approx(biases, abs=0.15)
    fresh = rounds_of(temperatures, biases, seed=1)
    fitted = Calibration(greedy=found.temperatures, greedy_bias=found.biases)
    assert max(errors(fresh, fitted, "greedy")) < 0.02
    assert errors(fresh, Calibration(), "greedy")[0] > 0.1
    unshifted = fit_scaling([Observed([x + b * t for x, b, t in zip(r.logits, biases, temperatures, strict=True)],
                                      r.accepted) for r in rounds], 3)  # fmt: skip
    assert unshifted.temperatures == pytest.approx(temperatures, rel=0.2)
    assert unshifted.biases == pytest.approx([0, 0, 0], abs=0.15)


def test_where_nothing_is_wrong_or_little_was_seen_nothing_is_changed():
    found = fit_scaling(rounds_of([1.0], [0.0], count=20_000), 1)
    assert found.temperatures == pytest.approx([1.0], abs=0.1)
    assert found.biases == pytest.approx([0.0], abs=0.06)
    # one round that reached position 2 and failed there says next to nothing about it
    few = fit_scaling([Observed([0.0, 2.0], 1), Observed([0.0, 2.0], 0)], 2)
    assert few.temperatures == pytest.approx([1.0, 1.1], abs=0.1)
    assert few.biases == pytest.approx([0.0, -0.09], abs=0.03)
    assert fit_scaling([], 3) == ([], [])


def test_no_outcome_drives_a_scaling_out_of_bounds():
    for accepted in (0, 2):
        found = fit_scaling([Observed([x / 10, -30.0], accepted) for x in range(-300, 300)], 2)
        assert all(1 / 4 <= t <= 4 for t in found.temperatures)
        assert all(abs(b) < 30 for b in found.biases)


def test_chance_alone_sets_a_floor_that_falls_with_more_rounds():
    calibration = Calibration(greedy=[2.0, 0.5], greedy_bias=[0.3, 0.0])
    truth = ([2.0, 0.5], [0.3, 0.0])
    few, many = (rounds_of(*truth, count=n, seed=3) for n in (400, 6400))
    low, high = error_floor(many, calibration, "greedy"), error_floor(few, calibration, "greedy")
    assert [h / f for h, f in zip(high, low, strict=True)] == pytest.approx([4, 4], rel=0.5)  # by 1/√rounds
    assert errors(many, calibration, "greedy") == pytest.approx(low, abs=0.01)
    assert max(error_floor(few, Calibration(greedy_bias=[40.0, 40.0]), "greedy")) < 1e-6  # what is certain has none


def test_error_and_bins_by_hand():
    # 0.25 promised and always kept, 0.75 promised and never: on average right, in no bin right
    promised, held = [0.25] * 5 + [0.75] * 5, [True] * 5 + [False] * 5
    assert expected_calibration_error(promised, held) == pytest.approx(0.75)
    assert reliability(promised, held) == [(0.25, 1.0, 5), (0.75, 0.0, 5)]
    assert reliability([1.0], [True]) == [(1.0, 1.0, 1)]
    assert expected_calibration_error([], []) == 0.0


def test_each_way_to_accept_has_temperatures_of_its_own():
    calibration = Calibration(greedy=[4.0], rejection=[2.0, 1.0], coupled=[0.5])
    assert calibration.confidence([2.0, 0.0, 1.0], "rejection") == [sigmoid(1.0), 0.5, sigmoid(1.0)]
    assert calibration.confidence([2.0], "coupled") == [sigmoid(4.0)]
    assert calibration.confidence([2.0], "greedy") == [sigmoid(0.5)]
    shifted = Calibration(greedy=[4.0], greedy_bias=[1.0, -1.0], coupled_bias=[0.5])
    assert shifted.confidence([2.0, 2.0, 2.0], "greedy") == [sigmoid(1.5), sigmoid(1.0), sigmoid(2.0)]
    assert shifted.confidence([2.0], "coupled") == [sigmoid(2.5)]
    assert shifted.confidence([2.0], "rejection") == [sigmoid(2.0)]
    logits = [2.0, -1.0, 0.5]
    assert shifted.logits(shifted.confidence(logits, "greedy"), "greedy") == pytest.approx(logits)


def test_sigmoid_and_back():
    assert (sigmoid(-800.0), sigmoid(800.0)) == (0.0, 1.0)
    assert [logit(sigmoid(x)) for x in (-5.0, 0.0, 3.0)] == pytest.approx([-5.0, 0.0, 3.0])
    assert (logit(0.0), logit(1.0)) == (-30.0, 30.0)


def test_the_file(tmp_path):
    assert load_calibration(tmp_path) is None
    calibration = Calibration(greedy=[1.5], rejection=[2.0, 1.0], coupled=[0.5], greedy_bias=[-0.25])
    save_calibration(calibration, tmp_path)
    assert load_calibration(tmp_path) == calibration
    assert [f.name for f in tmp_path.iterdir()] == ["calibration.json"]
    with pytest.raises(ConfigError, match="cannot be written"):
        save_calibration(calibration, tmp_path / "missing")
    (tmp_path / "calibration.json").write_text('{"rejection": ["x"]}')
    with pytest.raises(ModelLoadError, match="rejection"):
        load_calibration(tmp_path)
    (tmp_path / "calibration.json").write_text('{"coupled": [1.0, 0.0]}')
    with pytest.raises(ModelLoadError, match=r"above 0.*coupled"):
        load_calibration(tmp_path)
    (tmp_path / "calibration.json").write_text('{"coupled_bias": [1e999]}')
    with pytest.raises(ModelLoadError, match="out of range"):
        load_calibration(tmp_path)
    (tmp_path / "calibration.json").write_text('{"greedy": [2.0], "rejection": [], "coupled": [0.5]}')  # no biases yet
    assert load_calibration(tmp_path) == Calibration(greedy=[2.0], coupled=[0.5])
