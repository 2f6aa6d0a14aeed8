"""`python -m dspark_kernels.cpu`: build the kernels for this machine ahead of the first start.

``--bundle``: those for every machine of this kind, into the package itself, where they are found without a cache.
"""

import platform
import sys

from dspark_kernels.cpu.build import BUNDLED, NEEDS, Isa, NoCompilerError, best_isa, build


def _bundle() -> int:
    isas: list[Isa] = [*NEEDS] if platform.machine() == "x86_64" else ["portable"]
    try:
        for isa in isas:
            print(f"CPU kernels ({isa}): {build(isa, into=BUNDLED)}")
    except NoCompilerError as error:
        print(f"CPU kernels cannot be built: {error}", file=sys.stderr)
        return 1
    return 0


def _here() -> int:
    try:
        print(f"CPU kernels ({best_isa()}): {build(best_isa())}")
    except NoCompilerError as error:  # no reason to stop: there is torch
        print(f"CPU kernels are not built, models run on torch, several times slower: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(_bundle() if "--bundle" in sys.argv[1:] else _here())
