"""Builds the CPU kernels that the tests use, beside pip, which keeps one core busy for a minute or more.

Needs nothing installed. What is not built here, tests build when they need it, and say what went wrong.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "tests"
"""As in `conftest.py`, which links to it what the user's cache has."""


def main() -> None:
    sys.path.insert(0, str(ROOT / "kernels"))
    package = ModuleType("dspark_kernels.cpu")  # what its own __init__ imports needs numpy
    package.__path__ = [str(ROOT / "kernels" / "dspark_kernels" / "cpu")]
    sys.modules[package.__name__] = package
    from dspark_kernels.cpu.build import build, supported_isas

    best, *others = supported_isas()
    build(best)  # for the service: it goes to the user's cache
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    for isa in (best, *others):
        build(isa, sanitize=True)
    for isa in others:
        build(isa)


if __name__ == "__main__":
    main()
