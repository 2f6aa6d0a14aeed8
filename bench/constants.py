"""What the constants of load/ are worth: each tried alone at other values, in replays of recorded rounds.

Rounds are those that bench/regret.py recorded; a machine that swings is played the same way for every value. What is
printed is how throughput over plain decoding changes in the mean over all recordings, loads and orders, and the least
ratio among them.

    python bench/constants.py bench/recordings/smollm2-135m-T0.json.gz=0 bench/recordings/smollm2-135m-T0.7.json.gz=0.7
"""

from __future__ import annotations

import argparse
import random
from math import exp, log
from pathlib import Path
from statistics import fmean
from types import ModuleType

from dspark_stream.decoding.schedule import parse_schedule
from dspark_stream.load import acceptance, controller, costs
from dspark_stream.load.costs import CostTable
from regret import Machine, Recording, Seat, engine_like, read_recording, timeline

TRIED: list[tuple[str, list[ModuleType], list[object]]] = [
    ("HOLD", [controller], [4, 16]),
    ("LOOK", [controller, costs], [1, 3]),
    ("OTHERS", [controller], [0.0, 0.5]),
    ("SHARE", [controller], [0.01, 0.04, 0.0]),
    ("GAIN", [costs], [0.1, 0.4]),
    ("MOST", [costs], [0.12, 0.5, 9.0]),
    ("BLOCKS", [acceptance], [16, 64]),
    ("LEAN", [acceptance], [2.0, 8.0]),
    ("HOPE", [acceptance], [0.7, 0.85]),
    ("THRESHOLDS", [acceptance, controller], [(0.0,), (0.0, 0.05, 0.12, 0.22, 0.35, 0.5, 0.7)]),
]
"""Names, the modules that look them up, and other values."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recorded", nargs="+", metavar="FILE=TEMPERATURE")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=300, help="that count; as many before them are for learning")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[name for name, _, _ in TRIED], help="these constants")
    args = parser.parse_args()
    played: list[tuple[list[list[Seat]], Recording, float, int]] = []
    for text in args.recorded:
        file, _, temperature = text.rpartition("=")
        recording = read_recording(Path(file))
        for streams in args.streams:
            for seed in range(args.seeds):
                line = timeline(recording.rounds, streams, 2 * args.steps, random.Random(seed))
                played.append((line, recording, float(float(temperature) > 0), seed))

    def ratios() -> list[float]:
        """Throughput over plain decoding, as logarithms."""
        found = []
        for line, recording, sampled, seed in played:
            machine = Machine(CostTable(recording.curve), recording.other or recording.curve, sampled)
            streams = len(line[0])
            plain = streams / machine.true.plain_ms(machine.company(streams))
            found.append(log(engine_like(line, machine, parse_schedule("adaptive"), seed) / plain))
        return found

    now = ratios()
    print(f"as they are: mean {exp(fmean(now)):.3f}, least {exp(min(now)):.3f}", flush=True)
    for name, modules, values in TRIED:
        if name not in args.only:
            continue
        kept = getattr(modules[0], name)
        for value in values:
            for module in modules:
                setattr(module, name, value)
            other = ratios()
            change = fmean(b - a for a, b in zip(now, other, strict=True))
            print(f"{name} {value}: mean {100 * change:+.2f} %, least {exp(min(other)):.3f}", flush=True)
        for module in modules:
            setattr(module, name, kept)


if __name__ == "__main__":
    main()
