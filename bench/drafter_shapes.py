"""What a drafter's shape is worth: accepted length over the time of a round, τ / (t_draft + t_verify).

Times are medians over rounds that draft and verify so many tokens, shapes in turns; accepted lengths come from the CSV
file of `bench/drafter.py` over the same drafters under the same names: acceptance by position there tells the accepted
length of fewer drafts, too. Run it on a machine that does nothing else.

    python bench/drafter.py --drafter two=runs/2/drafter --drafter one=runs/1/drafter --out runs/l.csv --prompts …
    python bench/drafter_shapes.py --drafter two=runs/2/drafter --drafter one=runs/1/drafter --lengths runs/l.csv
"""

from __future__ import annotations

import argparse
import csv
import gc
from itertools import accumulate
from operator import mul
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple, get_args

from common import write_csv
from dspark_stream.config import MAX_FIXED, Config, Quant
from dspark_stream.console import SILENT, Progress
from dspark_stream.engine.build import build_engine, drafter_folder
from dspark_stream.engine.local import LocalEngine
from dspark_stream.measure.evaluate import Plan, run_prompts
from dspark_stream.measure.sweep import shipped_prompts
from dspark_stream.types import SamplingParams

WARM_UP = 3
"""Rounds at each load that are not counted."""


class Times(NamedTuple):
    """Of one round, in ms."""

    draft: float
    verify: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", action="append", metavar="NAME=FOLDER", required=True)
    parser.add_argument("--quant", nargs="+", default=["none"], choices=get_args(Quant))
    parser.add_argument("--lengths", type=Path, required=True, help="CSV file of bench/drafter.py")
    parser.add_argument("--drafts", type=int, nargs="+", default=[MAX_FIXED], help="draft tokens (default: the block)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/drafter_shapes.csv"))
    args = parser.parse_args()
    acceptance = read_acceptance(args.lengths)
    configs: dict[tuple[str, int], Config] = {}
    for text in args.drafter:
        name, _, folder = text.rpartition("=")
        for quant in args.quant:
            label = name + ("" if quant == "none" else f", {quant}")
            for drafts in args.drafts:
                configs[label, drafts] = Config(
                    model="smollm2-135m",
                    drafter=folder,
                    draft_quant=quant,
                    schedule=f"fixed:{drafts}",
                    max_num_seqs=max(args.streams),
                )
    times: dict[tuple[str, int, int], list[Times]] = {}
    for _ in range(args.repeats):
        for (label, drafts), config in configs.items():
            for streams, seen in measure(config, drafts, args.streams, args.tokens).items():
                times.setdefault((label, drafts, streams), []).extend(seen)
    rows: list[dict[str, object]] = []
    for (label, drafts, streams), seen in times.items():
        draft, verify = median(t.draft for t in seen), median(t.verify for t in seen)
        row: dict[str, object] = {
            "drafter": label,
            "drafts": drafts if drafts < MAX_FIXED else "block",
            "streams": streams,
            "file MB": round(size_mb(configs[label, drafts]), 1),
            "rounds": len(seen),
            "t_draft_ms": round(draft, 2),
            "t_verify_ms": round(verify, 2),
        }
        for way in ("greedy", "rejection"):
            if (label, way) in acceptance:
                length = fmean(length_of(some[:drafts]) for some in acceptance[label, way])
                row[f"{way}_length"] = round(length, 3)
                row[f"{way}_tokens_per_s"] = round(1e3 * streams * length / (draft + verify), 1)
        rows.append(row)
    rows.sort(key=lambda r: int(str(r["streams"])))
    columns = list(dict.fromkeys(name for r in rows for name in r))
    rows = [{name: r.get(name, "") for name in columns} for r in rows]
    write_csv(args.out, rows)
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for r in rows:
        print("| " + " | ".join(str(r[name]) for name in columns) + " |")


def read_lengths(path: Path) -> dict[tuple[str, str], float]:
    """Mean of the files' accepted lengths, by drafter and way."""
    found: dict[tuple[str, str], list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["file"] != "all":
                found.setdefault((row["drafter"], row["way"]), []).append(float(row["accepted_length"]))
    return {key: fmean(values) for key, values in found.items()}


def read_acceptance(path: Path) -> dict[tuple[str, str], list[list[float]]]:
    """Acceptance by position of each file, by drafter and way."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["file"] != "all":
                shares = [float(x) for x in row["acceptance_by_position"].split()]
                found.setdefault((row["drafter"], row["way"]), []).append(shares)
    return found


def length_of(acceptance: list[float]) -> float:
    """Accepted length of so many drafts: 1 + a_1 + a_1·a_2 + …"""
    return 1 + sum(accumulate(acceptance, mul))


def size_mb(config: Config) -> float:
    """Of the weights' file."""
    folder = drafter_folder(config)
    assert folder is not None
    return (folder / "model.safetensors").stat().st_size / 1e6


def measure(config: Config, drafts: int, loads: list[int], tokens: int) -> dict[int, list[Times]]:
    """Times of rounds in which all streams of a load take part, greedy."""
    engine, tokenizer = build_engine(config, Progress(enabled=False))
    assert tokenizer is not None
    times: dict[int, list[Times]] = {}
    with LocalEngine(engine) as local:
        for streams in loads:
            plan = Plan(
                sampling=SamplingParams(max_tokens=tokens, temperature=0.0, seed=1, ignore_eos=True),
                mode="dspark",
                verification="rejection",
                streams=streams,
            )
            prompts = shipped_prompts()
            prompts = (prompts * (1 + streams // len(prompts)))[: max(streams, 4)]
            tally = run_prompts(local, tokenizer, prompts, plan, SILENT, f"{streams} streams")
            full = [r for r in tally.rounds if r.streams == streams and r.scheduled == min(drafts, engine.info.gamma)]
            times[streams] = [Times(r.t_draft_ms, r.t_verify_ms) for r in full[WARM_UP * streams :]]
    del engine, local
    gc.collect()
    return times


if __name__ == "__main__":
    main()
