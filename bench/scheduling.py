"""What deciding costs: microseconds a round for who is drafted for, how much is verified, and learning from it.

Streams promise at random; time is the machine's, rounds are those of its capacity curve (dspark-stream profile).
Nothing is loaded but the curve. With --cold the caches are emptied before each part, as a pass over weights does.

    python bench/scheduling.py --streams 1 4 16 64
    python bench/scheduling.py --streams 16 --rounds 100 --cold
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
import numpy as np

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
    parser.add_argument("--cold", action="store_true", help="100 MB are copied before each part is timed")
    parser.add_argument("--out", type=Path, default=Path("runs/scheduling.csv"))
    args = parser.parse_args()
    curve = newest_curve()
    weights = np.ones((2, 25_000_000 if args.cold else 0), dtype=np.float32)

    def begin() -> float:
        np.copyto(weights[0], weights[1])
        return time.perf_counter()

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
                begun = begin()
                plan = controller.plan(pasts, company)
                spent["plan"].append(1e6 * (time.perf_counter() - begun))
                begun = begin()
                # the dearest case: everybody has drafted a whole block
                cost = controller.costs.round_cost(company, streams, curve.gamma)
                those = [
                    Candidate(controller.acceptance.corrected(past, promise), exact)
                    for past, promise in zip(pasts, promises, strict=True)
                ]
                lengths = Adaptive().lengths(those, cost, plan.price)
                spent["lengths"].append(1e6 * (time.perf_counter() - begun))
                shape = Shape(company, streams, curve.gamma, streams + sum(lengths))
                round_ms = cost(shape.batch_tokens)
                kept = [n // 2 for n in lengths]
                seen = zip(pasts, promises, lengths, kept, strict=True)
                took_ms = round_ms * chance.uniform(0.9, 1.1)
                begun = begin()
                controller.learn(seen, shape, took_ms)
                spent["learn"].append(1e6 * (time.perf_counter() - begun))
                rounds_ms.append(round_ms)
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
