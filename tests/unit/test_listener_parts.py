"""The small parts behind the listener: whose connections count together, open files, and seldom logs."""

import logging
import resource

import pytest

from dspark_stream.logs import Repeats
from dspark_stream.server import descriptors, seldom
from dspark_stream.server.descriptors import connections_that_fit
from dspark_stream.server.listener import neighbourhood
from dspark_stream.server.seldom import Seldom


@pytest.mark.parametrize(
    ("peer", "counts_as"),
    [
        (("192.0.2.7", 5), "192.0.2.7"),
        (("::ffff:192.0.2.7", 5, 0, 0), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 5, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::1", 5, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        (None, "unknown"),
        ("", "unknown"),
    ],
)
def test_whose_connections_count_together(peer, counts_as):
    """Guards against a limit for an address that anybody with IPv6 has 2^64 of."""
    assert neighbourhood(peer) == counts_as


class Limits:
    """A process with limits of its own."""

    def __init__(self, soft, hard, refuse=False):
        self.now, self.refuse = (soft, hard), refuse

    def getrlimit(self, which):
        assert which == resource.RLIMIT_NOFILE
        return self.now

    def setrlimit(self, which, limits):
        if self.refuse:
            raise ValueError("not allowed to raise maximum limit")
        self.now = limits


@pytest.mark.parametrize(
    ("soft", "hard", "refuse", "fit", "soft_after"),
    [
        (1024, 524_288, False, 4096, "enough"),
        (20_000, 20_000, False, 4096, 20_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, False, 4096, resource.RLIM_INFINITY),
        (1024, resource.RLIM_INFINITY, False, 4096, "enough"),
        (1024, 1024, False, "fewer", 1024),
        (1024, 524_288, True, "fewer", 1024),
        (50, 50, False, 1, 50),
    ],
)
def test_connections_stay_below_the_limit_of_open_files(monkeypatch, soft, hard, refuse, fit, soft_after):
    """Guards against a service that accepts until it cannot even open a file."""
    limits = Limits(soft, hard, refuse)
    monkeypatch.setattr(descriptors.resource, "getrlimit", limits.getrlimit)
    monkeypatch.setattr(descriptors.resource, "setrlimit", limits.setrlimit)
    fitting = connections_that_fit(4096, 32)
    after = limits.now[0]
    if fit == "fewer":
        assert 1 <= fitting < 1024 - 32 - descriptors.SPARE
    else:
        assert fitting == fit
    if soft_after == "enough":
        assert 4096 + 32 + descriptors.SPARE < after < 5000
    else:
        assert after == soft_after


def test_a_line_a_minute_says_how_many(monkeypatch, caplog):
    """Guards against a log that strangers fill, and against one that forgets what it left out."""
    monkeypatch.setattr(caplog.handler, "filters", [Repeats()])  # as the service's log has it; all tests share this one
    now = [100.0]
    monkeypatch.setattr(seldom.time, "monotonic", lambda: now[0])
    often = Seldom(logging.getLogger("test"), "it happened %d times")
    for _ in range(1000):
        often.count()
    now[0] += 61
    often.count()
    now[0] += 1
    often.count()
    assert [record.getMessage() for record in caplog.records] == ["it happened 1 times", "it happened 1000 times"]
