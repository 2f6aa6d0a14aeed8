"""What the processor says of itself."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """The model, as a person would name it; the architecture where that cannot be told."""
    return _field("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """What the processor says it can do; nothing where that cannot be told."""
    return frozenset(_field("flags", "Features").split())


def _field(*names: str) -> str:
    """The first of Linux's lines on its processors that begins so; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")
