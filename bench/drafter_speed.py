"""Tokens a second of drafters beside each other, as streams see them: whole answers, prefill and schedule included.

Each drafter has an engine of its own in this process, and they take turns at every load in every repeat, on the same
prompts and seeds. The first drafter is what the others are held against, within each repeat; plain decoding is beside
them. Run it on a machine that does nothing else.

    python bench/drafter_speed.py --drafter before=runs/before/drafter --drafter after=runs/after/drafter
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, median, stdev

import msgspec

from common import write_csv
from dspark_stream.config import Config
from dspark_stream.console import Progress
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.local import LocalEngine
from dspark_stream.measure.evaluate import read_prompts
from dspark_stream.measure.sweep import PLAIN, Point, measure, shipped_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", action="append", metavar="NAME=FOLDER", required=True)
    parser.add_argument("--schedule", default="adaptive")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answers", type=int, default=6, help="of a run, at the least")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="default: the shipped ones")
    parser.add_argument("--limit", type=int, default=None, help="prompts of each file")
    parser.add_argument("--out", type=Path, default=Path("runs/drafter_speed.csv"))
    args = parser.parse_args()
    names = [text.rpartition("=")[0] for text in args.drafter]
    if len({*names, "", PLAIN}) < len(names) + 2:
        parser.error(f"--drafter: each needs a name of its own, as in NAME=FOLDER, and not {PLAIN}")
    files = [read_prompts(path, args.limit) for path in args.prompts]  # one of each in turn, to the shortest's end
    prompts = [p for some in zip(*files, strict=False) for p in some] or shipped_prompts()
    runs: dict[str, list[Point]] = {}
    with ExitStack() as open_engines:
        engines = {}
        for text in args.drafter:
            name, _, folder = text.rpartition("=")
            engine, tokenizer = build_engine(
                Config(model="smollm2-135m", drafter=folder, max_num_seqs=max(args.streams)), Progress()
            )
            assert tokenizer is not None
            engines[name] = engine, open_engines.enter_context(LocalEngine(engine)), tokenizer
        first = next(iter(engines))
        turns = [(PLAIN, first, PLAIN), *((name, name, args.schedule) for name in engines)]
        for repeat in range(args.repeats):
            start = repeat % len(turns)  # nobody always goes first
            for temperature in args.temperatures:
                for streams in args.streams:
                    for label, name, variant in turns[start:] + turns[:start]:
                        engine, local, tokenizer = engines[name]
                        # a repeat goes on where the last one's prompts ended
                        asked = [prompts[(repeat * args.answers + i) % len(prompts)] for i in range(len(prompts))]
                        point, _ = measure(
                            engine, local, tokenizer, asked, variant=variant, streams=streams, temperature=temperature,
                            tokens=args.tokens, least=args.answers, repeat=repeat,
                        )  # fmt: skip
                        runs.setdefault(label, []).append(point)
            print(f"repeat {repeat + 1} of {args.repeats}", flush=True)
    show(runs, first)
    rows = [{"drafter": name, **msgspec.to_builtins(p)} for name, points in runs.items() for p in points]
    write_csv(args.out, [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows])


def show(runs: dict[str, list[Point]], first: str) -> None:
    """Medians, and what they are of the first drafter's in the same repeat: median, mean and its standard error."""
    over_first = f"x {first}"
    print(f"{'T':>3} {'streams':>7} {'drafter':>14} {'tokens/s':>9} {'τ':>5} {over_first:>12} {'mean':>6} {'error':>6}")
    base = {(p.temperature, p.streams, p.repeat): p.tokens_per_s for p in runs[first]}
    for load in sorted({(p.temperature, p.streams) for p in runs[first]}):
        for name, points in runs.items():
            some = [p for p in points if (p.temperature, p.streams) == load]
            over = [p.tokens_per_s / base[*load, p.repeat] for p in some]
            error = stdev(over) / len(over) ** 0.5 if len(over) > 1 else 0.0
            print(
                f"{load[0]:>3g} {load[1]:>7} {name:>14} {median(p.tokens_per_s for p in some):>9.1f} "
                f"{fmean(p.accepted_length for p in some):>5.2f} "
                f"{median(over):>12.3f} {fmean(over):>6.3f} {error:>6.3f}"
            )


if __name__ == "__main__":
    main()
