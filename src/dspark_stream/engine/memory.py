"""How much memory there is, how much the program will take, and settings that ask for more than that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dspark_stream.errors import ConfigError

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of a container, as control groups of version 2 and 1 tell it."""
GIB = 2**30


def memory_bytes() -> int | None:
    """What this process can have at most: the machine's memory, or its container's; None where nobody says."""
    sizes = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            sizes.append(int(path.read_text()))
    return min(sizes, default=None)


def resident_bytes() -> int | None:
    """What the process takes now; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def check_kv_memory(kv_memory: int, there_is: int | None, whose: str = "this machine") -> None:
    """Refuse what cannot be.

    Raises:
        ConfigError: names the setting, its value and the limit.
    """
    if there_is is not None and kv_memory > there_is:
        raise ConfigError(
            f"--kv-memory of {kv_memory / GIB:.4g}GiB is more than {whose} has: {there_is / GIB:.4g}GiB of memory in "
            "all, and the model needs some of it",
            param="kv_memory",
        )


@contextlib.contextmanager
def refused_by_the_system(kv_memory: int) -> Iterator[None]:
    """An allocation that fails, as an error that says what asked for it.

    Raises:
        ConfigError: names the setting.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        raise ConfigError(
            f"--kv-memory of {kv_memory / GIB:.4g}GiB could not be had of the system, which may set a limit (ulimit "
            "-v, a container's): give less",
            param="kv_memory",
        ) from error


def foretold(kv_memory: int, rounds: int = 0) -> str | None:
    """What the process takes now and when it is full, in words; None where the system does not say.

    ``rounds``: bytes that the largest rounds need besides, not there yet.
    """
    now, there_is = resident_bytes(), memory_bytes()
    if now is None:
        return None
    full = now + kv_memory + rounds
    text = f"memory: {now / GIB:.2f} GiB now, up to {full / GIB:.2f} GiB at full load"
    if there_is is not None and full > there_is:
        text += f", which is more than there is ({there_is / GIB:.2f} GiB): a smaller --kv-memory is safer"
    return text
