"""Files that are there whole or not at all. A leaf."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, a kill or a full disk finds the old one or the new one, never half of one.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
