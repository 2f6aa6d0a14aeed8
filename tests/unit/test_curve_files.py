"""Capacity curves that were kept on disk: a damaged one is measured anew, and that is said."""

from __future__ import annotations

import io
import os

import msgspec
import pytest

from dspark_stream.console import SILENT, Progress
from dspark_stream.engine import profile
from dspark_stream.engine.profile import MOST_FILES, _forget_the_oldest, _Stored, _stored, load_or_measure
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.models.cache import ExtentAllocator
from tiny import tiny_target

KEY = ["a machine", "gamma 7"]
CURVE = CapacityCurve(
    tokens=[1, 2, 4, 8],
    verify_ms=[5.0, 5.5, 6.0, 9.0],
    streams=[1, 2, 4],
    draft_ms=[1.0, 1.5, 2.5],
    slot_ms=[0.1, 0.2, 0.2],
    gamma=7,
    context=256,
    read_us=0.1,
)


PLAIN = msgspec.structs.replace(CURVE, gamma=0, draft_ms=[0.0] * 3, slot_ms=[])


def kept(tmp_path, data, key=KEY):
    """What is made of a file, and what is said about it."""
    path = tmp_path / "curve.json"
    if data is not None:
        path.write_bytes(data)
    said = io.StringIO()
    return _stored(path, key, Progress(said)), said.getvalue()


def test_a_curve_that_was_kept_is_taken(tmp_path):
    """Guards against machines that are measured at every start."""
    assert kept(tmp_path, msgspec.json.encode(_Stored(KEY, CURVE))) == (CURVE, "")
    key = ["a machine", "gamma 0"]
    assert kept(tmp_path, msgspec.json.encode(_Stored(key, PLAIN)), key) == (PLAIN, "")


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
        {"streams": [], "draft_ms": []},
        {"streams": [1, 4, 2]},
        {"verify_ms": [5.0, 5.5, 6.0]},
        {"verify_ms": [0.0] * 4},
        {"verify_ms": [-5.0] * 4},
        {"verify_ms": [1e308] * 4},
        {"verify_ms": [9.0, 6.0, 5.5, 5.0]},
        {"verify_ms": [95.0, 5.5, 6.0, 9.0]},
        {"draft_ms": [-1e9, 0.0, 0.0]},
        {"draft_ms": []},
        {"draft_ms": [1e300] * 3},
        {"slot_ms": []},
        {"slot_ms": [-1.0, 0.0, 0.0]},
        {"gamma": -1},
        {"gamma": 2**62},
        {"gamma": 4},
        {"context": -5},
        {"feature_us": -1.0},
        {"attend_us": 1e9},
        {"read_us": -0.1},
        {"read_us": 1e300},
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


def test_curves_that_are_longest_unused_go(tmp_path):
    """Guards against a folder that grows with every model, version and size; what is taken at each start stays."""
    for i in range(MOST_FILES + 3):
        path = tmp_path / f"{i}.json"
        path.write_bytes(GOOD)
        os.utime(path, (i, i))
    assert _stored(tmp_path / "1.json", KEY, Progress(io.StringIO())) == CURVE
    (tmp_path / "notes.txt").touch()
    _forget_the_oldest(tmp_path)
    gone = {str(i) for i in range(MOST_FILES + 3)} - {path.stem for path in tmp_path.glob("*.json")}
    assert gone == {"0", "2", "3"}
    assert (tmp_path / "notes.txt").exists()
    _forget_the_oldest(tmp_path / "nowhere")


def test_what_was_measured_is_kept_within_bounds(tmp_path, monkeypatch):
    """Guards against curves that nobody clears up, and against clearing up those that are in use."""
    measured = []
    monkeypatch.setattr(profile, "MOST_FILES", 2)
    monkeypatch.setattr(profile, "sweep", lambda *_: measured.append(1))
    monkeypatch.setattr(profile, "fit", lambda *_, **__: PLAIN)
    target = tiny_target()
    store, allocator = target.make_store(512), ExtentAllocator(512)
    counts = []
    for name in "abacab":  # a is taken before c comes, so b goes
        load_or_measure(
            target, store, None, None, allocator,
            max_seqs=1, max_model_len=64, key=[name], folder=tmp_path, progress=SILENT,
        )  # fmt: skip
        counts.append(len(measured))
        for path in tmp_path.iterdir():  # a day goes by: the clock of files has ticks
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 86_400 * 10**9))
    assert counts == [1, 2, 2, 3, 3, 4]
    assert len(list(tmp_path.iterdir())) == 2
