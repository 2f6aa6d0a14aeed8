"""What deciding costs: microseconds a round for who is drafted for, how much is verified, and learning from it.

Streams promise at random; time is the machine's, rounds are those of its capacity curve (dspark-stream profile).
Nothing is loaded but the curve.

    python bench/scheduling.py --streams 1 4 16 64
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from itertools import accumulate
from operator import mul
from pathlib import Path
from statistics import fmean, median

import msgspec

from common import Stored, write_csv
from dspark_stream.config import default_cache_dir
from dspark_stream.decoding.schedule import Adaptive, Candidate
from dspark_stream.engine.profile import FORMAT
from dspark_stream.load.acceptance import Past
from dspark_stream.load.controller import Controller
from dspark_stream.load.costs import CapacityCurve, Company, Shape


def newest_curve() -> CapacityCurve:
    """The one that was measured last on this machine."""
    files = sorted((default_cache_dir() / "capacity").glob("*.json"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files:
        with contextlib.suppress(msgspec.MsgspecError):  # another version's
            stored = msgspec.json.decode(file.read_bytes(), type=Stored)
            if FORMAT in stored.key:
                return stored.curve
    raise SystemExit("no capacity curve was measured here yet: run dspark-stream profile first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/scheduling.csv"))
    args = parser.parse_args()
    curve = newest_curve()
    chance = random.Random(1)
    rows: list[dict[str, object]] = []
    for verification, exact in (("greedy", True), ("rejection", False)):
        for streams in args.streams:
            controller = Controller(curve.gamma, curve)
            pasts = [Past(curve.gamma, "greedy" if exact else "rejection") for _ in range(streams)]
            spent: dict[str, list[float]] = {"plan": [], "decision": [], "lengths": [], "learn": []}
            rounds_ms: list[float] = []
            for step in range(args.rounds):
                promises = [
                    list(accumulate((chance.random() ** 0.3 for _ in range(curve.gamma)), mul)) for _ in range(streams)
                ]
                company = Company(streams, 32.0 * round((200 + step) / 32))
                clock = [time.perf_counter()]
                plan = controller.plan(pasts, company)
                clock.append(time.perf_counter())
                # the dearest case: everybody has drafted a whole block
                cost = controller.costs.round_cost(company, streams, curve.gamma)
                those = [
                    Candidate(controller.acceptance.corrected(past, promise), exact)
                    for past, promise in zip(pasts, promises, strict=True)
                ]
                lengths = Adaptive().lengths(those, cost, plan.price)
                clock.append(time.perf_counter())
                shape = Shape(company, streams, curve.gamma, streams + sum(lengths))
                round_ms = cost(shape.batch_tokens)
                kept = [n // 2 for n in lengths]
                seen = zip(pasts, promises, lengths, kept, strict=True)
                controller.learn(seen, shape, round_ms * chance.uniform(0.9, 1.1))
                clock.append(time.perf_counter())
                rounds_ms.append(round_ms)
                for name, a, b in zip(("plan", "lengths", "learn"), clock, clock[1:], strict=False):
                    spent[name].append(1e6 * (b - a))
            spent["decision"] = [median(sorted(spent["plan"])[-args.rounds // 10 :])]  # they hold for several rounds
            each = {f"{name}_us": round(fmean(times), 1) for name, times in spent.items()}
            round_ms = fmean(rounds_ms)
            share = sum(each[f"{part}_us"] for part in ("plan", "lengths", "learn")) / (1e3 * round_ms)
            rows.append({"verification": verification, "streams": streams, **each,
                         "round_ms": round(round_ms, 2), "share_of_round": round(share, 5)})  # fmt: skip
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()))
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
