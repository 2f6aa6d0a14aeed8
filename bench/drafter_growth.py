"""Accepted length against block rows trained: what more training would bring.

Takes finished runs (their learning rate at zero, so that lengths compare) as NAME=LOG, where LOG is the run's log.csv,
several joined by + where a run went on from another; lengths from the CSV file of `bench/drafter.py` over the same
names. Fits accepted length = a + b·log2(rows), prints it with the next doublings, and draws it.

    python bench/drafter_growth.py --run a=runs/a/log.csv --run b=runs/b/log.csv+runs/c/log.csv --lengths runs/l.csv
"""

from __future__ import annotations

import argparse
import csv
from math import log2, sqrt
from pathlib import Path

from common import write_csv, write_picture
from drafter_shapes import read_lengths
from dspark_stream.measure.plot import Series, line_chart

WAYS = ("greedy", "rejection")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", metavar="NAME=LOG[+LOG…]", required=True)
    parser.add_argument("--lengths", type=Path, required=True, help="CSV file of bench/drafter.py")
    parser.add_argument("--out", type=Path, default=Path("runs/drafter_growth.csv"))
    parser.add_argument("--picture", type=Path, default=None)
    args = parser.parse_args()
    lengths = read_lengths(args.lengths)
    trained: dict[str, int] = {}
    for text in args.run:
        name, _, logs = text.partition("=")
        trained[name] = sum(last_rows(Path(log)) for log in logs.split("+"))
    ways = [way for way in WAYS if all((name, way) in lengths for name in trained)]
    rows = [
        {"drafter": name, "block_rows": count, **{way: round(lengths[name, way], 3) for way in ways}}
        for name, count in sorted(trained.items(), key=lambda one: one[1])
    ]
    write_csv(args.out, rows)
    print("| drafter | million block rows | " + " | ".join(ways) + " |\n|" + " --- |" * (2 + len(ways)))
    for row in rows:
        shown = " | ".join(str(row[way]) for way in ways)
        print(f"| {row['drafter']} | {int(str(row['block_rows'])) / 1e6:.1f} | {shown} |")
    most = max(trained.values())
    series = []
    for way in ways:
        points = [(float(count), lengths[name, way]) for name, count in sorted(trained.items(), key=lambda one: one[1])]
        a, b, error = trend([log2(x) for x, _ in points], [y for _, y in points])
        twice, four = (a + b * log2(n * most) for n in (2, 4))
        print(
            f"{way}: {b:+.3f} (± {error:.3f}) a doubling; twice as many would give {twice:.2f}, four times {four:.2f}"
        )
        ends = [(x / 1e6, a + b * log2(x)) for x in (min(trained.values()), 4 * most)]
        series += [Series(f"{way}", [(x / 1e6, y) for x, y in points]), Series(f"{way}, trend", ends)]
    if args.picture:
        title = "Accepted length against training, with the trend"
        write_picture(args.picture, [line_chart(title, "million block rows", "accepted length", series, log_x=True)])


def last_rows(log: Path) -> int:
    """Block rows that a run ended with."""
    with log.open(newline="") as file:
        return max(int(row["block_rows"]) for row in csv.DictReader(file))


def trend(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """Least squares y = a + b·x: a, b and b's standard error."""
    n = len(xs)
    if n < 3:
        raise SystemExit("a trend needs three runs at least: give more with --run")
    mx, my = sum(xs) / n, sum(ys) / n
    spread = sum((x - mx) ** 2 for x in xs)
    b = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / spread
    a = my - b * mx
    left = sum((y - a - b * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return a, b, sqrt(left / (n - 2) / spread)


if __name__ == "__main__":
    main()
