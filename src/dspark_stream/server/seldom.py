"""Log lines about what strangers can make happen as often as they like."""

from __future__ import annotations

import logging
import time

PERIOD_S = 60.0


class Seldom:
    """A warning with a count, at most one a minute: the first time at once, then with all that came since."""

    def __init__(self, log: logging.Logger, message: str) -> None:
        """``message`` has one ``%d``."""
        self._log = log
        self._message = message
        self._count = 0
        self._next = 0.0

    def count(self) -> None:
        """It has happened again."""
        self._count += 1
        now = time.monotonic()
        if now >= self._next:
            # Not limited once more by `logs.Repeats`, which would lose the count.
            self._log.warning(self._message, self._count, extra={"counted": True})
            self._count, self._next = 0, now + PERIOD_S
