"""Total tokens a second against tokens a second of each user, for schedules at rising loads (the paper's figures 7, 8).

Variants take turns at every load in every repeat, on the same real prompts and one engine; medians. fixed:1 stands in
for the paper's one-token MTP baseline: it drafts one slot and verifies it.

    python bench/pareto.py --streams 1 2 4 8 16 32 64 --temperatures 0 1 --repeats 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from common import write_csv, write_picture
from dspark_stream.config import Config
from dspark_stream.console import Progress
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.local import LocalEngine
from dspark_stream.measure.evaluate import read_prompts
from dspark_stream.measure.plot import Series, line_chart
from dspark_stream.measure.sweep import (
    LEAST_ANSWERS,
    PLAIN,
    Point,
    curve,
    gain_at_matched_throughput,
    gain_at_same_load,
    measure,
    medians,
    shipped_prompts,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--variants", nargs="+", help="schedules beside plain (default: the usual ones)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answers", type=int, default=LEAST_ANSWERS, help="of a run, at the least")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=Path, nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=None, help="prompts of each file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/pareto.csv"))
    args = parser.parse_args()
    config = Config(model=args.model, drafter=args.drafter, max_num_seqs=max(args.streams), max_model_len=2048)
    engine, tokenizer = build_engine(config, Progress())
    assert tokenizer is not None
    files = [read_prompts(path, args.limit) for path in args.prompts]
    # a file after the other in turn, so that few streams see all of them
    prompts = [p for some in zip(*files, strict=False) for p in some] or shipped_prompts()
    usual = ["fixed:1", f"fixed:{engine.info.gamma}", "threshold:0.5", "early-stop", "lagged", "adaptive"]
    variants = [PLAIN, *(args.variants or usual)]
    points: list[Point] = []
    with LocalEngine(engine) as local:
        for repeat in range(args.repeats):
            for temperature in args.temperatures:
                for streams in args.streams:
                    first = repeat % len(variants)  # nobody always goes first
                    for variant in variants[first:] + variants[:first]:
                        point, _ = measure(
                            engine, local, tokenizer, prompts, variant=variant, streams=streams,
                            temperature=temperature, tokens=args.tokens, waves=3 if streams < 16 else 2,
                            least=args.answers, repeat=repeat,
                        )  # fmt: skip
                        points.append(point)
                        print(
                            f"repeat {repeat} T {temperature:g} {streams:>3} x {variant:<13} "
                            f"{point.tokens_per_s:>7.1f} in all {point.tokens_per_s_user:>6.1f} each "
                            f"τ {point.accepted_length:.2f} ℓ {point.verified:.2f} skipped {point.skipped:.0%}",
                            flush=True,
                        )
    show(points, variants, args)
    write_csv(args.out, [msgspec.to_builtins(p) for p in points])
    draw(medians(points), variants, args)


def show(runs: list[Point], variants: list[str], args: argparse.Namespace) -> None:
    """Medians, with what they are of plain decoding and, for each user at the same total, of one-token drafts."""
    points = medians(runs)
    head = f"{'T':>3} {'streams':>7} {'variant':>13} {'in all':>8} {'x plain':>8} {'each':>7} {'matched x fixed:1':>17}"
    print(f"\n{head} {'τ':>6} {'ℓ':>6} {'skipped':>8}")
    for t in args.temperatures:
        for streams in args.streams:
            for variant in variants:
                (p,) = (p for p in curve(points, variant, t) if p.streams == streams)
                over = gain_at_same_load(runs, variant, PLAIN, t)[streams]
                matched = gain_at_matched_throughput(points, variant, "fixed:1", t)[streams]
                print(
                    f"{t:>3g} {streams:>7} {variant:>13} {p.tokens_per_s:>8.1f} {over:>8.2f} "
                    f"{p.tokens_per_s_user:>7.1f} {'' if matched is None else f'{matched:.2f}':>17} "
                    f"{p.accepted_length:>6.2f} {p.verified:>6.2f} {p.skipped:>8.0%}"
                )


def draw(points: list[Point], variants: list[str], args: argparse.Namespace) -> None:
    """Both pictures for each temperature."""
    drawings = []
    for t in args.temperatures:
        lines = {v: curve(points, v, t) for v in variants}
        drawings.append(
            line_chart(
                f"Total throughput against speed of each user, temperature {t:g}",
                "tokens/s of each user",
                "tokens/s in all",
                [Series(v, [(p.tokens_per_s_user, p.tokens_per_s) for p in line]) for v, line in lines.items()],
            )
        )
        drawings.append(
            line_chart(
                f"Verification length against load, temperature {t:g}",
                "streams",
                "draft tokens verified a round",
                [Series(v, [(p.streams, p.verified) for p in line]) for v, line in lines.items()],
                log_x=True,
            )
        )
    write_picture(args.out.with_suffix(".svg"), drawings)


if __name__ == "__main__":
    main()
