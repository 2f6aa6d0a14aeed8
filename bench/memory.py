"""GB/s that the CPU kernels read from memory in passes of few rows, by form of weights, beside a loop that only reads.

Pieces take less than a millisecond and the best of many counts, so neighbours on the machine hardly do. Forms take
turns, since what memory gives drifts.

    python bench/memory.py --threads 1 2 --rows 1 2 4 8
"""

from __future__ import annotations

import argparse
from time import perf_counter

import numpy as np

from dspark_kernels.cpu import Context, Kind, PackedMatrix, best_isa
from dspark_kernels.cpu.binding import ptr

INPUTS = 4864
PIECE, PIECES = 12 << 20, 16
"""Bytes of a matrix, and how many one after the other: more than any cache holds."""
KINDS = (Kind.FOUR_M, Kind.FOUR_K, Kind.FIVE, Kind.SIX_K, Kind.EIGHT)


def rates(threads: int, rows: list[int], repeats: int) -> dict[tuple[str, int], float]:
    """GB/s by form and rows; reading alone has 0 rows."""
    context, best = Context(threads, best_isa()), dict[tuple[str, int], float]()
    library, handle = context.library, context.handle
    x = np.random.default_rng(0).standard_normal((max(rows), INPUTS)).astype(np.float32)
    outputs = {kind: 16 * (PIECE // PackedMatrix(context, 16, INPUTS, kind).nbytes) for kind in KINDS}
    matrices = {kind: [PackedMatrix(context, n, INPUTS, kind) for _ in range(PIECES)] for kind, n in outputs.items()}
    out = np.empty((max(rows), max(outputs.values())), dtype=np.float32)
    floats = np.ones(PIECES * PIECE // 4, dtype=np.float32)
    for _ in range(repeats):
        for piece in range(PIECES):
            at = floats[piece * (PIECE // 4) :]
            rate = library.read_rate(handle, ptr(at), PIECE // 4)
            best["reading", 0] = max(best.get(("reading", 0), 0.0), rate / 1e9)
        for kind, of_kind in matrices.items():
            for count in rows:
                for matrix in of_kind:
                    begun = perf_counter()
                    context.check(library.product(handle, matrix.handle, ptr(x), count, ptr(out), out.shape[1], None))
                    rate = matrix.nbytes / (perf_counter() - begun)
                    best[kind.name, count] = max(best.get((kind.name, count), 0.0), rate / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for threads in args.threads:
        best = rates(threads, args.rows, args.repeats)
        print(f"{threads} threads, GB/s; reading alone: {best['reading', 0]:.1f}")
        print(f"{'rows':<8}" + "".join(f"{count:>7}" for count in args.rows))
        for kind in KINDS:
            print(f"{kind.name:<8}" + "".join(f"{best[kind.name, count]:7.1f}" for count in args.rows))


if __name__ == "__main__":
    main()
