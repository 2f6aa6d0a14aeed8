"""``kernels_ahead.py CACHE``: builds the CPU kernels that the tests use, beside pip, which keeps one core busy.

The service's goes to the user's cache, as ever, the others to CACHE, which is the one in `conftest.py`. Needs nothing
installed. What is not built here, tests build when they need it, and say what went wrong.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

KERNELS = Path(__file__).parents[1] / "kernels"


def main() -> None:
    sys.path.insert(0, str(KERNELS))
    package = ModuleType("dspark_kernels.cpu")  # what its own __init__ imports needs numpy
    package.__path__ = [str(KERNELS / "dspark_kernels" / "cpu")]
    sys.modules[package.__name__] = package
    from dspark_kernels.cpu.build import build, supported_isas

    best, *others = supported_isas()
    build(best)
    os.environ["XDG_CACHE_HOME"] = sys.argv[1]
    for isa in (best, *others):
        build(isa, sanitize=True)
    for isa in others:
        build(isa)


if __name__ == "__main__":
    main()
