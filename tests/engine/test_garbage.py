"""An engine that runs is not held up by the collector, and one that has ended leaves nothing frozen."""

from __future__ import annotations

import gc

import pytest

from dspark_stream.engine import worker
from dspark_stream.engine.local import LocalEngine
from tiny import request, tiny_engine


@pytest.fixture
def thresholds():
    """The collector's own, given back after the test."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_what_is_there_at_the_start_is_not_looked_through_until_the_end(monkeypatch, thresholds):
    """Guards against rounds that wait for the collector, and against garbage that an ended engine leaves for good."""
    monkeypatch.setattr(worker, "gc", gc)  # the real one, which the other tests do without
    gc.unfreeze()
    engine = tiny_engine()
    with LocalEngine(engine) as local:
        assert gc.get_freeze_count() > 10_000
        assert list(local.run([request()]))
    assert gc.get_freeze_count() == 0
