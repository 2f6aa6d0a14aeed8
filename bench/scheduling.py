"""What deciding costs: microseconds a round for who is drafted for, how much is verified, and learning from it.

Streams promise at random; time is the machine's, rounds are those of its capacity curve (dspark-stream profile).
Nothing is loaded but the curve.

    python bench/scheduling.py --streams 1 4 16 64
"""

from __future__ import annotations

import argparse
import random
import time
from itertools import accumulate
from operator import mul
from pathlib import Path
from statistics import fmean

import msgspec
from dspark_stream.spec.capacity import CapacityCurve, Costs
from dspark_stream.spec.handicap import Shape
from dspark_stream.spec.skipping import DraftPast, Skipping

from common import write_csv
from dspark_stream.config import default_cache_dir
from dspark_stream.load.schedule import Adaptive, Candidate


class Stored(msgspec.Struct):
    """The part of a stored curve's file that counts here."""

    curve: CapacityCurve


def newest_curve() -> CapacityCurve:
    """The one that was measured last on this machine."""
    files = sorted((default_cache_dir() / "capacity").glob("*.json"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files:
        try:
            return msgspec.json.decode(file.read_bytes(), type=Stored).curve
        except msgspec.MsgspecError:
            continue  # another version's
    raise SystemExit("no capacity curve was measured here yet: run dspark-stream profile first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/scheduling.csv"))
    args = parser.parse_args()
    curve = newest_curve()
    costs, chance = Costs(curve), random.Random(1)
    rows: list[dict[str, object]] = []
    for verification, exact in (("greedy", True), ("rejection", False)):
        for streams in args.streams:
            skipping = Skipping(curve.gamma)
            pasts = [DraftPast(curve.gamma, "greedy" if exact else "rejection") for _ in range(streams)]
            spent: dict[str, list[float]] = {"plan": [], "lengths": [], "learn": []}
            rounds_ms: list[float] = []
            for step in range(args.rounds):
                promises = [
                    list(accumulate((chance.random() ** 0.3 for _ in range(curve.gamma)), mul)) for _ in range(streams)
                ]
                clock = [time.perf_counter()]
                plan = skipping.plan(pasts, 200.0 + step, costs)
                clock.append(time.perf_counter())
                # the dearest case: everybody has drafted a whole block
                cost = costs.round_cost(streams, 200.0 + step, streams, curve.gamma)
                lengths = Adaptive().lengths([Candidate(p, exact) for p in promises], cost, plan.price)
                clock.append(time.perf_counter())
                skipping.learn(pasts, promises, lengths, [n // 2 for n in lengths], 10.0)
                shape = Shape(streams, 100.0, sum(plan.drafting), plan.slots, streams + sum(lengths))
                skipping.handicap.see(shape, 10.0, 10.0)
                clock.append(time.perf_counter())
                rounds_ms.append(cost(streams + sum(lengths)))
                for name, a, b in zip(spent, clock, clock[1:], strict=False):
                    spent[name].append(1e6 * (b - a))
            each = {f"{name}_us": round(fmean(times), 1) for name, times in spent.items()}
            round_ms = fmean(rounds_ms)
            share = sum(each.values()) / (1e3 * round_ms)
            rows.append({"verification": verification, "streams": streams, **each,
                         "round_ms": round(round_ms, 2), "share_of_round": round(share, 5)})  # fmt: skip
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()))
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
