"""Files that are there whole or not at all, and files of JSON. A leaf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested without end.
    """
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError("it is nested without end") from None


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
