"""What the linear layers of the default model cost on this CPU, by precision and rows; and whether rows know of others.

All 211 matrices of SmolLM2-135M, random weights, for M rows: float32, bfloat16 as torch calls it, and bfloat16 packed
once (kernels/dspark_kernels/linear). Variants take turns within every repeat; medians. "same bits" says whether the
first row's result was the same for every M.

    python bench/linear.py
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dspark_kernels.linear import PackedLinear, can_pack

SHAPES = [
    (o, i)
    for _ in range(30)
    for o, i in ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
]
SHAPES.append((49152, 576))
ROWS = (1, 2, 4, 8, 16, 32, 64)


def layers(dtype: torch.dtype, packed: bool) -> list[Callable[[Tensor], Tensor]]:
    plain = [torch.nn.Linear(i, o, bias=False, dtype=dtype) for o, i in SHAPES]
    return [PackedLinear(layer) for layer in plain] if packed else list(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/linear.csv"))
    args = parser.parse_args()
    variants = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False)}
    if can_pack(torch.device("cpu"), torch.bfloat16):
        variants["bfloat16 packed"] = (torch.bfloat16, True)
    made = {name: layers(*how) for name, how in variants.items()}
    torch.manual_seed(0)
    inputs = {i: torch.randn(max(ROWS), i) for i in (576, 1536)}
    times: dict[tuple[str, int], list[float]] = {}
    same = dict.fromkeys(variants, True)
    with torch.inference_mode():
        for _ in range(args.repeats):
            for rows in ROWS:
                for name, (dtype, _) in variants.items():
                    x = {i: t[:rows].to(dtype) for i, t in inputs.items()}
                    begun = time.perf_counter()
                    for layer, (_, width) in zip(made[name], SHAPES, strict=True):
                        layer(x[width])
                    times.setdefault((name, rows), []).append((time.perf_counter() - begun) * 1e3)
        for name, (dtype, _) in variants.items():
            for layer, (_, width) in list(zip(made[name], SHAPES, strict=True))[-8:]:
                alone = layer(inputs[width][:1].to(dtype))
                same[name] &= all(torch.equal(layer(inputs[width][:m].to(dtype))[:1], alone) for m in ROWS)
    print(f"{'ms for M =':>16} " + " ".join(f"{m:>7}" for m in ROWS) + "  same bits")
    for name in variants:
        print(f"{name:>16} " + " ".join(f"{median(times[name, m]):>7.1f}" for m in ROWS) + f"  {same[name]}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["variant", "rows", "median_ms", "min_ms", "max_ms", "same_bits", "threads", "commit", "command"]
        )
        for (name, rows), values in sorted(times.items()):
            figures = [round(f, 3) for f in (median(values), min(values), max(values))]
            writer.writerow(
                [name, rows, *figures, same[name], torch.get_num_threads(), commit.stdout.strip(), " ".join(sys.argv)]
            )
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
