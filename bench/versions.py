"""Versions of this project against each other, live, at rising loads: whether a change of the scheduler costs speed.

    git worktree add ../before COMMIT
    python bench/versions.py --before ../before --model smollm2-135m-instruct

Every version has a process of its own; only one computes at a time. Processes may differ by some percent for as long as
they live. So each decodes plainly, too, and only ratios within a process are compared. All take a turn at a load, in an
order by chance, on the same prompts, drawn anew for every turn. Few streams get short turns and more of them, since a
machine that becomes slower within a turn does so for some and not for others. The first turn at a load is for learning
and does not count; fixed lengths that are soon clearly behind are left out. Ratios are taken within a turn. Of many the
geometric mean is given, and its standard error. The best fixed length is the one that was best in these turns, so it is
a little too good.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from math import exp, inf, log, sqrt
from pathlib import Path
from random import Random
from statistics import fmean, stdev

from common import write_csv
from dspark_stream.config import DEFAULT_MODEL, default_cache_dir
from dspark_stream.console import Progress
from dspark_stream.measure.evaluate import read_prompts
from dspark_stream.models.fetch import model_path
from dspark_stream.models.gguf import GgufFile
from dspark_stream.models.tokenizer import codec_from_gguf
from edge import HERE, Worker

NOW, PLAIN, ADAPTIVE = "now", "plain", "adaptive"
FIXED = tuple(f"fixed:{n}" for n in (1, 2, 3, 5, 7))
CLEARLY = 0.85
"""A fixed length that is this far behind another is left out after the turns of a repeat."""
BUSY = 8
"""Streams that run in a repeat at every load: eight turns of one, one turn of eight; one turn of more."""

Run = tuple[str, str]
"""Version and schedule."""


class Load:
    """One load at one temperature: what every run gave, by turn."""

    def __init__(self, before: Sequence[str]) -> None:
        self.runs: list[Run] = [(name, how) for name in (NOW, *before) for how in (ADAPTIVE, PLAIN)]
        self.runs += [(NOW, how) for how in FIXED]
        self.turns = 0
        self.tokens_per_s: dict[Run, dict[int, float]] = {run: {} for run in self.runs}

    def drop(self) -> None:
        """Fixed lengths that are clearly behind are not run again."""
        fixed = {run: fmean(self.tokens_per_s[run].values()) for run in self.runs if run[1] in FIXED}
        self.runs = [run for run in self.runs if fixed.get(run, inf) >= CLEARLY * max(fixed.values())]

    def best_fixed(self) -> Run:
        """Of those that were not dropped, by geometric means."""
        return max((run for run in self.runs if run[1] in FIXED), key=self._middle)

    def ratio(self, run: Run, *others: Run) -> tuple[float, float]:
        """Over the best of ``others``, the same one in every turn; and its standard error."""
        return _mean(self._logs(run, max(others, key=self._middle)))

    def gain_over(self, before: str) -> tuple[float, float]:
        """What adaptive is over plain, over what it was before; and its standard error."""
        now, then = (self._logs((name, ADAPTIVE), (name, PLAIN)) for name in (NOW, before))
        return _mean([a - b for a, b in zip(now, then, strict=True)])

    def _logs(self, run: Run, other: Run) -> list[float]:
        theirs = self.counted(other)
        return [log(rate / theirs[turn]) for turn, rate in self.counted(run).items()]

    def _middle(self, run: Run) -> float:
        return fmean(map(log, self.counted(run).values()))

    def counted(self, run: Run) -> dict[int, float]:
        """Tokens a second by turn, but for the first."""
        return {turn: rate for turn, rate in self.tokens_per_s[run].items() if turn}


def _mean(logs: Sequence[float]) -> tuple[float, float]:
    ratio = exp(fmean(logs))
    return ratio, ratio * stdev(logs) / sqrt(len(logs)) if len(logs) > 1 else inf


def loads_of(files: Sequence[Path]) -> tuple[dict[tuple[float, int], Load], list[str]]:
    """What runs before wrote, together; and the versions, this one first."""
    loads: dict[tuple[float, int], Load] = {}
    trees = [NOW]
    for number, file in enumerate(files):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                load = loads.setdefault((float(row["temperature"]), int(row["streams"])), Load([]))
                run, turn = (row["version"], row["schedule"]), int(row["turn"])
                if turn:
                    load.tokens_per_s.setdefault(run, {})[turn + 1000 * number] = float(row["tokens_per_s"])
                if run[0] not in trees:
                    trees.append(run[0])
    for load in loads.values():
        most = max(map(len, load.tokens_per_s.values()))
        load.runs = [run for run, rates in load.tokens_per_s.items() if len(rates) == most]
    return dict(sorted(loads.items())), trees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, nargs="+", default=[], help="working trees of other versions")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a .gguf file")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, less or more a half")
    parser.add_argument("--threads", type=int, default=2)
    names = [HERE / "prompts" / f"{name}.jsonl" for name in ("functions", "code", "math", "chat")]
    parser.add_argument("--prompts", type=Path, nargs="+", default=names, help="first turns are asked")
    parser.add_argument("--limit", type=int, default=64, help="prompts of each file")
    parser.add_argument("--out", type=Path, default=Path("runs/versions.csv"))
    parser.add_argument(
        "--read", type=Path, nargs="+", help="files that this bench wrote: their tables, nothing is run"
    )
    args = parser.parse_args()
    if args.read:
        report(*loads_of(args.read))
        return

    path = model_path(args.model, default_cache_dir(), Progress())
    codec = codec_from_gguf(GgufFile(Path(path)).fields)
    sets = [
        [codec.encode_chat([(m.role, m.content) for m in p.messages]) for p in read_prompts(file, args.limit)]
        for file in args.prompts
    ]
    prompts = [ids for some in zip(*sets, strict=False) for ids in some]
    trees = {NOW: HERE.parent, **{tree.resolve().name: tree.resolve() for tree in args.before}}
    before, most = [name for name in trees if name != NOW], max(args.streams)
    workers = {
        name: Worker(sys.executable, "dspark", args.model, args.threads, most, tree) for name, tree in trees.items()
    }
    loads = {(t, n): Load(before) for t in args.temperatures for n in args.streams}
    rows: list[dict[str, object]] = []
    chance = Random(1)
    for repeat in range(args.repeats + 1):
        for (temperature, streams), load in loads.items():
            while load.turns <= repeat or (load.turns - 1) * streams < repeat * BUSY:
                asked = chance.sample(prompts, 2 * streams)
                tokens = [max(1, round(args.tokens * chance.uniform(0.5, 1.5))) for _ in asked]
                turn, load.turns = load.turns, load.turns + 1
                for name, how in chance.sample(load.runs, len(load.runs)):
                    answer = workers[name].must(
                        "generate",
                        prompts=asked,
                        tokens=tokens,
                        streams=streams,
                        how=how,
                        sampling={"temperature": temperature},
                        seed=1 + 10_000 * turn,
                    )
                    rate = sum(map(len, answer["ids"])) / answer["seconds"]
                    load.tokens_per_s[name, how][turn] = rate
                    rows.append(
                        {
                            "temperature": temperature,
                            "streams": streams,
                            "turn": turn,
                            "version": name,
                            "schedule": how,
                            "tokens_per_s": round(rate, 2),
                            "accepted_length": round(answer["accepted_length"], 3),
                        }
                    )
                if turn * streams < BUSY <= load.turns * streams:
                    load.drop()
        write_csv(args.out, rows)
        if repeat:
            report(loads, list(trees))
    for worker in workers.values():
        worker.close()


def report(loads: dict[tuple[float, int], Load], trees: Sequence[str]) -> None:
    """The tables so far."""
    for temperature in dict.fromkeys(t for t, _ in loads):
        some = {n: load for (t, n), load in loads.items() if t == temperature}
        turns = " | ".join(str(len(load.counted((NOW, PLAIN)))) for load in some.values())
        print(f"\ntemperature {temperature:g}, tokens a second of all streams\n")
        print(f"| streams | {' | '.join(str(n) for n in some)} |")
        print("| --- " * (len(some) + 1) + "|")
        print(f"| turns | {turns} |")
        for name in trees:
            show(
                f"adaptive of {name} over its plain",
                [load.ratio((name, ADAPTIVE), (name, PLAIN)) for load in some.values()],
            )
        for name in trees[1:]:
            show(f"the first over that of {name}", [load.gain_over(name) for load in some.values()])
        best = [load.ratio((NOW, ADAPTIVE), (NOW, PLAIN), load.best_fixed()) for load in some.values()]
        show("adaptive over the better of plain and the best fixed length", best)
        print(f"| best fixed length | {' | '.join(load.best_fixed()[1] for load in some.values())} |", flush=True)


def show(what: str, ratios: Sequence[tuple[float, float]]) -> None:
    """One line of a table."""
    print(f"| {what} | {' | '.join(f'{ratio:.3f} ± {error:.3f}' for ratio, error in ratios)} |")


if __name__ == "__main__":
    main()
