"""`python -m dspark_kernels.cpu`: build the kernels for this machine ahead of the first start."""

import sys

from dspark_kernels.cpu.build import NoCompilerError, best_isa, build

if __name__ == "__main__":
    try:
        print(f"CPU kernels ({best_isa()}): {build(best_isa())}")
    except NoCompilerError as error:
        print(f"CPU kernels are not built, models run on torch, several times slower: {error}", file=sys.stderr)
