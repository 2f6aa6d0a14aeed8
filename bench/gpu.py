"""Everything that docs/gpu.md promises of a GPU, measured in one call: floors of the machine, rounds, drafts, peers.

    python bench/gpu.py                # on a GPU, under eight minutes; the table, runs/gpu.csv and runs/gpu-profile.md
    python bench/gpu.py --smoke        # the same code over tiny shapes, wherever it is: proves that it runs, no more

Shapes of Qwen3-8B and Qwen3-4B have random weights, and their drafts are accepted by a set rate: that is called
synthetic wherever it stands. SmolLM2-135M-Instruct is real. Every time is a median of repeats after warm-up.

Each section is a process of its own (gpu_worker.py) with a limit of time: whatever happens in it, the others run, and
what it had measured by then is kept.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEADLINE_S = 460.0
LEAST_S = 15.0
"""With less time left no section is begun."""
LIMITS_S = {
    "floors": 60,
    "8b": 150,
    "smollm2": 130,
    "crowd": 130,
    "profile": 70,
    "drafts": 100,
    "linears": 60,
    "4b": 100,
}
"""The sections in the order in which they are run, most wanted first, and how long each may take."""
COLUMNS = ("what", "value", "unit", "floor", "goal", "met", "note")
WORKER = Path(__file__).with_name("gpu_worker.py")


def run_section(name: str, rows: Path, options: list[str], limit_s: float) -> str:
    """Run one; returns what went wrong, or nothing."""
    command = [sys.executable, str(WORKER), name, "--rows", str(rows), *options]
    try:
        code = subprocess.run(command, timeout=limit_s, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"{name}: ended after {limit_s:.0f} s; what it had measured by then is in the table"
    if code:
        return f"{name}: exit status {code}, its words are above"
    return ""


def show(rows: list[dict[str, str]]) -> None:
    """The one table."""
    width = {k: max(len(k), *(len(r[k]) for r in rows)) for k in COLUMNS}
    print("\n" + "  ".join(k.ljust(width[k]) for k in COLUMNS))
    for row in rows:
        print("  ".join(row[k].ljust(width[k]) for k in COLUMNS))


def machine(smoke: bool) -> str:
    """The GPU's name, or the CPU's kind."""
    import torch

    if smoke or not torch.cuda.is_available():
        return platform.machine()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return f"{torch.cuda.get_device_name()} ({capability}), torch {torch.__version__}"


def write(path: Path, rows: list[dict[str, str]], where: str) -> None:
    """The table as CSV, with commit and machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {"commit": commit.stdout.strip(), "machine": where}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU: no figure counts")
    parser.add_argument("--quant", default="w4a16", help="quantisation of the drafts of random shapes")
    parser.add_argument("--only", nargs="+", metavar="SECTION", choices=LIMITS_S, help="some sections instead of all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.csv"))
    args = parser.parse_args()
    began = time.perf_counter()
    where = machine(args.smoke)
    if not args.smoke and where == platform.machine():
        sys.exit("bench/gpu.py measures a GPU, and torch sees none here; --smoke shows that it runs")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    options = ["--folder", str(args.out.parent), "--quant", args.quant, *(["--smoke"] if args.smoke else [])]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        for name, limit_s in LIMITS_S.items():
            if args.only and name not in args.only:
                continue
            left_s = DEADLINE_S - (time.perf_counter() - began)
            if left_s < LEAST_S:
                failed.append(f"{name}: no time left; bench/gpu.py --only {name}")
                continue
            print(f"==> {name} ({time.perf_counter() - began:.0f} s)", flush=True)
            if trouble := run_section(name, file, options, min(limit_s, left_s)):
                failed.append(trouble)
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if rows:
        show(rows)
        write(args.out, rows, where)
    print(f"{len(rows)} figures in {args.out}; {time.perf_counter() - began:.0f} s on {where}")
    if args.smoke:
        print("SMOKE: tiny shapes; none of these figures means anything")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
