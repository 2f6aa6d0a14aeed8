"""The reference recordings and prompts that lie beside a checkout, not in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("DSPARK_TEST_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """A file or folder of the shared data; the test skips, saying so, where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"the reference data is not beside this checkout: no {found}")
    return found
