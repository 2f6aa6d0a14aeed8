"""Plain decoding against DSpark in the same engine: tokens a second, per user and in all, by streams and temperature.

Every repeat runs every variant in turn on the same prompts in the same order, fixed answer length; medians.
Schedules: plain (ℓ = 0, no drafting), fixed:1, fixed:γ, adaptive.

    python bench/speculation.py --streams 1 4 12 --temperatures 0 1 --repeats 3
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from dspark_stream.config import Config
from dspark_stream.engine.build import build_engine
from dspark_stream.evaluate import Plan, read_prompts, run_prompts
from dspark_stream.local import LocalEngine
from dspark_stream.progress import SILENT, Progress
from dspark_stream.spec.schedule import parse_schedule
from dspark_stream.types import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 12])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/speculation.csv"))
    args = parser.parse_args()
    engine, tokenizer = build_engine(Config(model=args.model, drafter=args.drafter), Progress())
    assert tokenizer is not None
    prompts = read_prompts(args.prompts)
    gamma = engine.info.gamma
    variants = ["plain", "fixed:1", f"fixed:{gamma}", "adaptive"] if gamma else ["plain"]
    rows: list[dict[str, object]] = []
    with LocalEngine(engine) as local:
        for repeat in range(args.repeats):
            for temperature in args.temperatures:
                for streams in args.streams:
                    # few streams need no more prompts than give every one of them some work
                    some = prompts[: max(streams, 6)]
                    for variant in variants:
                        if variant != "plain":
                            engine._models.schedule = parse_schedule(variant)  # between runs the engine is idle
                        sampling = SamplingParams(
                            max_tokens=args.tokens, temperature=temperature, seed=1, ignore_eos=True
                        )
                        plan = Plan(
                            sampling=sampling,
                            mode="plain" if variant == "plain" else "dspark",
                            verification="rejection",
                            streams=streams,
                        )
                        tally = run_prompts(local, tokenizer, some, plan, SILENT, variant)
                        figures = tally.figures()
                        verified = sum(r.scheduled for r in tally.rounds) / len(tally.rounds)
                        rows.append(
                            {
                                "repeat": repeat,
                                "temperature": temperature,
                                "streams": streams,
                                "variant": variant,
                                "tokens_per_s_user": round(figures.tokens_per_s_user or 0, 2),
                                "tokens_per_s_total": round(figures.tokens_per_s_total or 0, 2),
                                "accepted_length": round(figures.accepted_length or 0, 3),
                                "verified": round(verified, 3),
                            }
                        )
                        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    show(rows, args, variants)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()} {torch.get_num_threads()} threads {engine.info.dtype}",
        "command": " ".join(["python", *sys.argv]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    print(f"written to {args.out}")


def show(rows: list[dict[str, object]], args: argparse.Namespace, variants: list[str]) -> None:
    """One line a variant, medians, with the ratio to plain."""
    print(
        f"\n{'T':>4} {'streams':>7} {'variant':>9} {'tok/s user':>10} {'x plain':>8} {'tok/s all':>9} {'τ':>6} {'ℓ':>5}"
    )
    for temperature in args.temperatures:
        for streams in args.streams:
            plain = 0.0
            for variant in variants:
                key = (temperature, streams, variant)
                mine = [r for r in rows if (r["temperature"], r["streams"], r["variant"]) == key]
                user, total, accepted, verified = (
                    median(float(str(r[name])) for r in mine)
                    for name in ("tokens_per_s_user", "tokens_per_s_total", "accepted_length", "verified")
                )
                plain = plain or user
                print(
                    f"{temperature:>4g} {streams:>7} {variant:>9} {user:>10.1f} {user / plain:>8.2f} {total:>9.1f} "
                    f"{accepted:>6.2f} {verified:>5.2f}"
                )


if __name__ == "__main__":
    main()
