"""What readiness to draft costs where nothing is drafted: each part of it left out of every other eight rounds.

Streams decode with drafting held off. Within the same streams, eight rounds do a part of what a plain round would not
need and eight do not, in turns, so that a machine's swings meet both alike:

    context     the drafter's context features are kept
    decisions   who would be drafted for is decided, and what rounds took and were worth is learnt

A figure is the median over pairs of neighbouring eights of how much longer a round takes with the part than without.
What is left out of it: context features that are handed over because their room is full, and looks. Before decisions
are timed the schedule has learnt what drafts are worth at that load, since that is what makes it decide less often.

    python bench/overhead.py --streams 4 8 16
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from math import log
from pathlib import Path
from statistics import median, stdev
from typing import Any

from common import write_csv
from dspark_stream.config import Config
from dspark_stream.console import Progress
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.local import LocalEngine
from dspark_stream.load.controller import Plan
from dspark_stream.measure.sweep import measure, shipped_prompts

EIGHT, ENOUGH = 8, 4
"""Rounds by turns, and those of them that must be of as many streams as were asked for."""
OF_MEDIANS = 1.25
"""A median's standard error over a mean's."""
PARTS = {"context": ("context", "keep"), "decisions": ("", "_learn")}
"""What of the rounds does nothing without the part: whose method, and which; decisions leave out the plan as well."""


class Turns:
    """Runs rounds, every other eight of them without ``part``, and keeps what those of ``streams`` streams took."""

    def __init__(self, part: str, streams: int, decode: Callable[..., Any]) -> None:
        self.part, self.streams, self._decode = part, streams, decode
        self.rounds = 0
        self.ms: dict[int, list[float]] = defaultdict(list)
        """Of whole rounds, by eight."""
        self.holding = False
        """Whether drafting is held off, and rounds are counted."""

    @property
    def does(self) -> bool:
        """Whether the round at hand does the part."""
        return self.rounds // EIGHT % 2 == 0

    def sometimes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function in rounds that do the part, nothing in the others."""
        return lambda *args: function(*args) if self.does or not self.holding else 0.0

    def plan(self, decide: Callable[..., Plan]) -> Callable[..., Plan]:
        """A plan for nobody, after the decision or without it."""

        def nobody(pasts: Any, *rest: Any, **options: Any) -> Plan:
            if not self.holding:
                return decide(pasts, *rest, **options)
            if self.part == "decisions" and self.does:
                decide(pasts, *rest, **options)
            return Plan([False] * len(pasts), 0, 0.0)

        return nobody

    def decode(self, streams: Any, *bound: Any) -> Any:
        """A round, timed."""
        begun = time.perf_counter()
        committed = self._decode(streams, *bound)
        if not self.holding:
            return committed
        if len(streams) == self.streams:
            self.ms[self.rounds // EIGHT].append((time.perf_counter() - begun) * 1e3)
        self.rounds += 1
        return committed

    def more(self) -> list[float]:
        """Logarithms of rounds with the part over rounds without, of pairs of neighbouring eights."""
        return [
            log(median(self.ms[i]) / median(self.ms[i + 1]))
            for i in self.ms
            if i % 2 == 0 and min(len(self.ms[i]), len(self.ms.get(i + 1, []))) >= ENOUGH
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=96, help="an answer")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/overhead.csv"))
    args = parser.parse_args()
    engine, tokenizer = build_engine(
        Config(model="smollm2-135m", max_num_seqs=max(args.streams), max_model_len=2048), Progress()
    )
    rounds: Any = engine._rounds
    controller, prompts = rounds.models.controller, shipped_prompts()
    decide, decode = controller.plan, rounds.decode
    rows: list[dict[str, object]] = []
    with LocalEngine(engine) as local:
        for part, (whose, name) in PARTS.items():
            for streams in args.streams:
                turns = Turns(part, streams, decode)
                controller.plan = turns.plan(decide)  # held off
                rounds.decode = turns.decode
                does = getattr(rounds, whose) if whose else rounds
                kept = getattr(does, name)
                setattr(does, name, turns.sometimes(kept))
                for repeat in range(-1, args.repeats):  # the first to learn from
                    turns.holding = repeat >= 0
                    measure(
                        engine, local, tokenizer, prompts, variant="adaptive", streams=streams,
                        temperature=args.temperature, tokens=args.tokens, waves=3, least=4, repeat=1 + repeat,
                    )  # fmt: skip
                setattr(does, name, kept)
                rows.append(row(part, streams, turns))
    write_csv(args.out, rows)


def row(part: str, streams: int, turns: Turns) -> dict[str, object]:
    """One line of the table, printed too."""
    more = turns.more()
    without = median([ms for i, some in turns.ms.items() if i % 2 for ms in some])
    share, error = 100 * median(more), 100 * OF_MEDIANS * stdev(more) / len(more) ** 0.5
    print(f"{part:>10} {streams:3} streams  {share:+5.2f} % ± {error:.2f} of {without:6.2f} ms  ({len(more)} pairs)")
    return {
        "part": part,
        "streams": streams,
        "more_percent": round(share, 2),
        "error_percent": round(error, 2),
        "round_ms": round(without, 3),
        "pairs": len(more),
    }


if __name__ == "__main__":
    main()
