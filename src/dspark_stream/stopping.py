"""Signals that end what is being loaded, fetched or compiled, whatever that makes of the exception. A leaf."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """SIGTERM or SIGHUP. Not an `Exception`: no handler on the way may keep it."""


def stop_signals() -> list[signal.Signals]:
    """The signals that end the program; without SIGHUP where it was started to outlive its terminal (nohup)."""
    return [s for s in STOP_SIGNALS if s is not signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """A signal becomes an exception inside the block, so that what was begun is cleared up, and ends it in any case:
    libraries keep such exceptions to themselves at times, or make others of them.

    Yields what raises if a signal came and nothing has come of it. Main thread only.

    Raises:
        KeyboardInterrupt: SIGINT.
        Terminated: SIGTERM or SIGHUP.
    """
    came: list[int] = []

    def stop() -> None:
        if came:
            raise KeyboardInterrupt if came[0] == signal.SIGINT else Terminated

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        stop()

    tell = sys.unraisablehook

    def tell_faults(unraisable: sys.UnraisableHookArgs) -> None:
        if not came:
            tell(unraisable)

    before = {number: signal.signal(number, note) for number in stop_signals()}
    sys.unraisablehook = tell_faults
    try:
        yield stop
    except Exception:
        stop()  # it is the signal's, or as good as
        raise
    else:
        stop()
    finally:
        sys.unraisablehook = tell
        for number, handler in before.items():
            signal.signal(number, handler)
