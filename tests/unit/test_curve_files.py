"""Capacity curves that were kept on disk: a damaged one is measured anew, and that is said."""

from __future__ import annotations

import io

import msgspec
import pytest

from dspark_stream.console import Progress
from dspark_stream.engine.profile import _Stored, _stored
from dspark_stream.load.curve import CapacityCurve

KEY = ["a machine"]
CURVE = CapacityCurve(
    tokens=[1, 2, 4, 8],
    verify_ms=[5.0, 5.5, 6.0, 9.0],
    streams=[1, 2, 4],
    stream_ms=[0.0, 0.1, 0.2],
    draft_ms=[1.0, 1.5, 2.5],
    after_draft_ms=[0.0, 0.1, 0.1],
    slot_ms=[0.1, 0.2, 0.2],
    rest_ms=[0.1, 0.1, 0.3],
    gamma=7,
    context=256,
    read_us=0.1,
)


def kept(tmp_path, data):
    """What is made of a file, and what is said about it."""
    path = tmp_path / "curve.json"
    if data is not None:
        path.write_bytes(data)
    said = io.StringIO()
    return _stored(path, KEY, Progress(said)), said.getvalue()


def test_a_curve_that_was_kept_is_taken(tmp_path):
    """Guards against machines that are measured at every start."""
    assert kept(tmp_path, msgspec.json.encode(_Stored(KEY, CURVE))) == (CURVE, "")
    plain = msgspec.structs.replace(CURVE, gamma=0, draft_ms=[0.0] * 3, after_draft_ms=[], slot_ms=[])
    assert kept(tmp_path, msgspec.json.encode(_Stored(KEY, plain))) == (plain, "")


def test_no_curve_is_nothing_to_speak_of(tmp_path):
    """Guards against a first start that complains."""
    assert kept(tmp_path, None) == (None, "")


GOOD = msgspec.json.encode(_Stored(KEY, CURVE))


@pytest.mark.parametrize(
    "data",
    [b"", GOOD[: len(GOOD) // 2], b"\0" * 100, b"[]", b"null", b"[" * 100_000, b" " * (2 << 20), b"\xff" * 50],
    ids=["empty", "half", "nul", "list", "null", "deep", "long", "binary"],
)
def test_what_is_no_curve_is_measured_anew(tmp_path, data):
    """Guards against a traceback, and against silence about minutes of measuring."""
    curve, said = kept(tmp_path, data)
    assert curve is None
    assert "curve.json cannot be used" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": [], "verify_ms": []},
        {"tokens": [8, 4, 2, 1]},
        {"tokens": [1, 1, 1, 1]},
        {"tokens": [-1, 2, 4, 8]},
        {"tokens": [2**62 + i for i in range(4)]},
        {"tokens": [1, 2, 4, 2**62]},
        {"streams": [], "stream_ms": [], "draft_ms": []},
        {"streams": [1, 4, 2]},
        {"verify_ms": [5.0, 5.5, 6.0]},
        {"verify_ms": [0.0] * 4},
        {"verify_ms": [-5.0] * 4},
        {"verify_ms": [1e308] * 4},
        {"verify_ms": [9.0, 6.0, 5.5, 5.0]},
        {"verify_ms": [95.0, 5.5, 6.0, 9.0]},
        {"stream_ms": [0.0]},
        {"stream_ms": [-1e9, 0.0, 0.0]},
        {"draft_ms": []},
        {"draft_ms": [1e300] * 3},
        {"slot_ms": []},
        {"slot_ms": [-1.0, 0.0, 0.0]},
        {"after_draft_ms": [0.1]},
        {"rest_ms": []},
        {"gamma": -1},
        {"gamma": 2**62},
        {"context": -5},
        {"feature_us": -1.0},
        {"attend_us": 1e9},
        {"read_us": -0.1},
        {"sample_us": 1e300},
        {"draft_window": -1},
    ],
    ids=str,
)
def test_figures_that_nobody_measured_are_measured_anew(tmp_path, changes):
    """Guards against a service that says it is ready and fails on every request."""
    damaged = msgspec.structs.replace(CURVE, **changes)
    curve, said = kept(tmp_path, msgspec.json.encode(_Stored(KEY, damaged)))
    assert curve is None
    assert "measuring it anew" in said


def test_a_curve_of_another_machine_is_not_taken(tmp_path):
    """Guards against a file under the wrong name."""
    curve, said = kept(tmp_path, msgspec.json.encode(_Stored(["another"], CURVE)))
    assert curve is None
    assert said
