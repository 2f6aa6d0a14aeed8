"""Open files: a connection is one, and a process may have only so many."""

from __future__ import annotations

import logging
import os
import resource
from contextlib import suppress

log = logging.getLogger(__name__)

SPARE = 64
"""Kept for everything that is no connection: models that are read again, logs, the engine."""


def connections_that_fit(wanted: int, reserve: int) -> int:
    """How many connections the process can hold, ``wanted`` or fewer; its soft limit is raised as far as needed.

    Args:
        wanted: The configured limit.
        reserve: Connections beyond it that must fit too.
    """
    others = len(os.listdir("/dev/fd")) + SPARE + reserve
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + others
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        with suppress(OSError, ValueError):  # some systems have a lower limit that they do not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            log.info("raised the limit of open files from %d to %d", soft, raised)
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    fitting = max(1, soft - others)
    log.warning(
        "the limit of open files (ulimit -n) is %d: at most %d connections instead of %d", soft, fitting, wanted
    )
    return fitting
