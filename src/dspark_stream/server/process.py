"""What the system says of this process, for the ``process_*`` metrics that every Prometheus client has."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

_LOADED_AT = time.time()
_PROC = Path("/proc/self")


class Process(NamedTuple):
    """One reading. None: this system does not say."""

    cpu_seconds: float
    start_time: float
    """Seconds since the epoch."""
    resident_bytes: int | None
    virtual_bytes: int | None
    open_fds: int | None
    max_fds: int
    threads: int | None


def read_process() -> Process:
    """Ask the system; takes well under a millisecond."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    virtual, resident, threads = _memory()
    return Process(
        cpu_seconds=used.ru_utime + used.ru_stime,
        start_time=_START,
        resident_bytes=resident,
        virtual_bytes=virtual,
        open_fds=_count(_PROC / "fd"),
        max_fds=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        threads=threads,
    )


def _memory() -> tuple[int | None, int | None, int | None]:
    try:
        virtual, resident = (_PROC / "statm").read_text().split()[:2]
    except OSError:
        return None, None, None
    page = resource.getpagesize()
    return int(virtual) * page, int(resident) * page, _count(_PROC / "task")


def _count(folder: Path) -> int | None:
    try:
        return len(os.listdir(folder))
    except OSError:
        return None


def _started() -> float:
    """The kernel counts from when it booted; fields of ``stat`` after the name, which may have spaces."""
    try:
        ticks = int((_PROC / "stat").read_text().rpartition(")")[2].split()[19])
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except (OSError, StopIteration, ValueError, IndexError):
        return _LOADED_AT
    return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


_START = _started()
