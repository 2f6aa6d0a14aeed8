"""``kernels_ahead.py CACHE``: builds the CPU kernels that the tests use, beside pip, which keeps one core busy.

The service's goes to the user's cache, as ever, the others to CACHE, which is the one in `conftest.py`. Needs nothing
installed. What is not built here, tests build when they need it, and say what went wrong.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

KERNELS = Path(__file__).parents[1] / "kernels"


def main() -> None:
    sys.path.insert(0, str(KERNELS))
    package = ModuleType("dspark_kernels.cpu")  # what its own __init__ imports needs numpy
    package.__path__ = [str(KERNELS / "dspark_kernels" / "cpu")]
    sys.modules[package.__name__] = package
    from dspark_kernels.cpu.build import build, supported_isas

    os.nice(10)  # pip goes first: its work is in one long row
    best, *others = supported_isas()
    ours = Path(sys.argv[1]) / "dspark-stream" / "kernels"
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pool.submit(build, best)
        for isa in (best, *others):
            pool.submit(build, isa, sanitize=True, into=ours)
        for isa in others:
            pool.submit(build, isa, into=ours)


if __name__ == "__main__":
    main()
