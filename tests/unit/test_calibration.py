"""Sequential Temperature Scaling: what it finds where the truth is known, and the file it is kept in."""

import random

import pytest

from dspark_stream.errors import ConfigError, ModelLoadError
from dspark_stream.spec.calibration import (
    Calibration,
    Observed,
    expected_calibration_error,
    fit_temperatures,
    load_calibration,
    logit,
    reliability,
    save_calibration,
    sigmoid,
)
from dspark_stream.spec.survival import prefix_survival


def rounds_of(truth, count=6000, seed=0):
    """Rounds of a head that says σ(logit) where σ(logit/T) is true, T by position."""
    rng = random.Random(seed)
    rounds = []
    for _ in range(count):
        logits = [rng.gauss(0.5, 2.0) for _ in truth]
        failed = (k for k, t in enumerate(truth) if rng.random() >= sigmoid(logits[k] / t))
        accepted = next(failed, len(truth))
        rounds.append(Observed(logits, accepted))
    return rounds


def error_at(rounds, temperatures, k):
    survival = [prefix_survival(Calibration(greedy=temperatures).confidence(r.logits, "greedy")) for r in rounds]
    return expected_calibration_error([s[k] for s in survival], [r.accepted > k for r in rounds])


def test_the_temperatures_are_found_one_position_after_the_other():
    truth = [2.0, 0.5, 1.0]
    rounds = rounds_of(truth)
    found = fit_temperatures(rounds, 3)
    assert found == pytest.approx(truth, rel=0.25)
    fresh = rounds_of(truth, seed=1)
    for k in range(3):
        assert error_at(fresh, found, k) < 0.025
    assert error_at(fresh, [1.0, 1.0, 1.0], 0) > 0.06


def test_where_nothing_is_wrong_nothing_is_changed():
    assert fit_temperatures(rounds_of([1.0], count=20_000), 1) == pytest.approx([1.0], abs=0.15)
    assert fit_temperatures([Observed([0.0], 1), Observed([0.0], 0)], 1) == [1.0]  # all are as good: the nearest to 1
    assert fit_temperatures([], 3) == []


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


def test_sigmoid_and_back():
    assert (sigmoid(-800.0), sigmoid(800.0)) == (0.0, 1.0)
    assert [logit(sigmoid(x)) for x in (-5.0, 0.0, 3.0)] == pytest.approx([-5.0, 0.0, 3.0])
    assert (logit(0.0), logit(1.0)) == (-30.0, 30.0)


def test_the_file(tmp_path):
    assert load_calibration(tmp_path) is None
    calibration = Calibration(greedy=[1.5], rejection=[2.0, 1.0], coupled=[0.5])
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
