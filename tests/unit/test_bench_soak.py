"""What the soak makes of its readings."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
import own_service
import soak

ROUND = [soak.Reading(minutes / 10, 400.0, 20, 10) for minutes in range(300)]


REST = soak.Reading(30.0, 400.0, 20, 10)


def missed(readings, bad=(), left=0.0, resting=REST):
    return [
        what.split(",")[0]
        for what, found, limit in soak.verdicts(readings, Counter(bad), left, resting)
        if found > limit
    ]


def test_a_service_that_stays_as_it_is_passes():
    """Guards against a soak that nobody can pass; what fills up in the first half may."""
    assert not missed(ROUND)
    filling = [r._replace(resident_mb=min(400.0, 100 + 40 * r.minutes)) for r in ROUND]
    assert not missed(filling)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda r: r._replace(resident_mb=400 + 0.3 * r.minutes), "RSS slope over the last half"),
        (lambda r: r._replace(descriptors=20 + int(r.minutes)), "descriptors"),
        (lambda r: r._replace(threads=10 + int(r.minutes / 10)), "threads"),
    ],
)
def test_growth_is_found(change, what):
    """Guards against a leak that the soak lets pass."""
    assert missed([change(r) for r in ROUND]) == [what]


def test_what_clients_lost_is_found():
    """Guards against figures of the process alone."""
    assert missed(ROUND, bad=["hung"]) == ["requests that failed"]
    assert missed(ROUND, left=1) == ["streams left at the end"]
    assert missed(ROUND, resting=REST._replace(descriptors=40)) == ["descriptors at rest over the start"]


def test_the_lag_is_that_between_two_readings():
    """Guards against a freeze that hours of quiet before it hide."""
    name = 'dspark:loop_lag_seconds_bucket{le="%s"}'
    before = {name % "0.01": 10_000.0, name % "1.0": 10_000.0, name % "+Inf": 10_000.0}
    after = {name % "0.01": 10_050.0, name % "1.0": 10_100.0, name % "+Inf": 10_100.0}
    assert own_service.lag_p99_ms(before, after) == 1000.0
    assert own_service.lag_p99_ms({}, before) == 10.0
