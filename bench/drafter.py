"""What drafters are worth: accepted length and calibration, by drafter, precision, verification, temperature, domain.

Every draft is verified (fixed γ), so the figures do not depend on a schedule or on the speed of the machine. Prompt
lookup needs no run: see `evaluate.prompt_lookup`. Writes one line for each figure, and a reliability diagram.

    python bench/drafter.py --prompts eval/*.jsonl --drafter auto --drafter dflash=runs/none/drafter --quant none int8
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import get_args

from dspark_stream.calibrate import errors
from dspark_stream.config import MAX_FIXED, Config, Quant
from dspark_stream.engine.build import build_engine, drafter_folder
from dspark_stream.evaluate import Plan, Prompt, Tally, acceptance_by_position, read_prompts, run_prompts
from dspark_stream.local import LocalEngine
from dspark_stream.progress import Progress
from dspark_stream.spec.calibration import Bin, Calibration, load_calibration, reliability
from dspark_stream.spec.platt import Observed
from dspark_stream.spec.survival import prefix_survival
from dspark_stream.types import Acceptance, RoundRecord, SamplingParams, Verification

WAYS: dict[Acceptance, tuple[float, Verification]] = {
    "greedy": (0.0, "rejection"),
    "rejection": (1.0, "rejection"),
    "coupled": (1.0, "coupled"),
}
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=None, help="prompts of each file")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--drafter", action="append", metavar="[NAME=]FOLDER", help="default: auto")
    parser.add_argument("--quant", nargs="+", default=["none"], choices=get_args(Quant))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--out", type=Path, default=Path("runs/drafter.csv"))
    parser.add_argument("--picture", type=Path, default=None, help="reliability diagram of the first drafter")
    args = parser.parse_args()
    files = {path: read_prompts(path, args.limit) for path in args.prompts}
    rows: list[Row] = []
    bins: dict[str, list[list[Bin]]] = {}
    for text in args.drafter or ["auto"]:
        name, _, folder = text.rpartition("=")
        for quant in args.quant:
            config = Config(
                model=args.model,
                drafter=folder,
                draft_quant=quant,
                schedule=f"fixed:{MAX_FIXED}",
                max_num_seqs=args.streams,
            )
            label = (name or Path(folder).name) + ("" if quant == "none" else f", {quant}")
            rows += measure(config, label, files, args, bins if not bins else {})
            write(args.out, rows)
    print(table(rows, [path.stem for path in files]))
    if args.picture:
        draw(bins, args.picture)


def measure(
    config: Config,
    label: str,
    files: dict[Path, list[Prompt]],
    args: argparse.Namespace,
    bins: dict[str, list[list[Bin]]],
) -> list[Row]:
    """All ways to accept, all files, of one drafter; fills ``bins`` with reliability before and after."""
    engine, tokenizer = build_engine(config, Progress())
    assert tokenizer is not None
    folder = drafter_folder(config)
    calibration = (load_calibration(folder) if folder else None) or Calibration()
    rows: list[Row] = []
    with LocalEngine(engine) as local:
        for way in args.ways:
            temperature, verification = WAYS[way]
            together = Tally()
            for path, prompts in files.items():
                plan = Plan(
                    sampling=SamplingParams(max_tokens=args.tokens, temperature=temperature, seed=1),
                    mode="dspark",
                    verification=verification,
                    streams=args.streams,
                    turns=args.turns,
                )
                tally = run_prompts(local, tokenizer, prompts, plan, Progress(), f"{label}, {way}, {path.stem}")
                rows.append(row(label, way, path.stem, tally, calibration))
                together += tally
            rows.append(row(label, way, "all", together, calibration))
            lengths = [float(str(r["accepted_length"])) for r in rows if r["way"] == way and r["file"] != "all"]
            print(f"{label}, {way}: mean of files {fmean(lengths):.3f};", rows[-1], flush=True)
            seen = observed(together.rounds, calibration, way)
            bins[f"{way}, before"] = reliability_by_position(seen, Calibration(), way)
            bins[f"{way}, after"] = reliability_by_position(seen, calibration, way)
    del engine, local
    gc.collect()
    return rows


def observed(rounds: Sequence[RoundRecord], calibration: Calibration, way: Acceptance) -> list[Observed]:
    """Rounds with the logits that the confidence head gave."""
    return [Observed(calibration.logits(r.confidence, way), r.accepted) for r in rounds]


def reliability_by_position(seen: Sequence[Observed], calibration: Calibration, way: Acceptance) -> list[list[Bin]]:
    """Bins of prefix survival at k = 1 … γ."""
    survival = [prefix_survival(calibration.confidence(r.logits, way)) for r in seen]
    gamma = len(seen[0].logits) if seen else 0
    return [reliability([s[k] for s in survival], [r.accepted > k for r in seen]) for k in range(gamma)]


def row(label: str, way: Acceptance, file: str, tally: Tally, calibration: Calibration) -> Row:
    """One line of the table."""
    figures = tally.figures()
    seen = observed(tally.rounds, calibration, way)
    before, after = errors(seen, Calibration(), way), errors(seen, calibration, way)
    return {
        "drafter": label,
        "way": way,
        "file": file,
        "rounds": figures.rounds,
        "accepted_length": round(figures.accepted_length or 0, 3),
        "prompt_lookup_length": round(figures.prompt_lookup_length or 0, 3),
        "acceptance_by_position": " ".join(f"{a or 0:.3f}" for a in acceptance_by_position(tally.rounds)),
        "error_before": " ".join(f"{e:.4f}" for e in before),
        "error_after": " ".join(f"{e:.4f}" for e in after),
        "by_context": " ".join(f"{n}:{p.accepted_length:.3f}/{p.rounds}" for n, p in figures.by_context.items()),
        "by_turn": " ".join(f"{n}:{p.accepted_length:.3f}/{p.rounds}" for n, p in figures.by_turn.items()),
    }


def table(rows: Sequence[Row], files: Sequence[str]) -> str:
    """Accepted lengths in Markdown: a line for each drafter and way, a column for each file, their mean last."""
    by_file = {(r["drafter"], r["way"], r["file"]): r for r in rows}
    lines = [" | ".join(["| drafter", "way", *files, "mean", "prompt lookup |"]), "|" + " --- |" * (len(files) + 4)]
    for drafter, way in dict.fromkeys((r["drafter"], r["way"]) for r in rows):
        own = [by_file[drafter, way, file] for file in files]
        lengths = [float(str(r["accepted_length"])) for r in own]
        lookup = fmean(float(str(r["prompt_lookup_length"])) for r in own)
        cells = [*(f"{x:.2f}" for x in lengths), f"{fmean(lengths):.2f}", f"{lookup:.2f} |"]
        lines.append(" | ".join([f"| {drafter}", str(way), *cells]))
    return "\n".join(lines)


def write(path: Path, rows: list[Row]) -> None:
    """The CSV file, with the machine and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = {"machine": platform.processor() or platform.machine(), "commit": commit.stdout.strip()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows(one | machine for one in rows)


def draw(bins: dict[str, list[list[Bin]]], path: Path) -> None:
    """Promised against observed prefix survival: a panel for each way to accept, before and after."""
    import matplotlib.pyplot as plt

    ways = list(dict.fromkeys(name.split(",")[0] for name in bins))
    figure, axes = plt.subplots(2, len(ways), figsize=(4 * len(ways), 7.6), sharex=True, sharey=True, squeeze=False)
    for column, way in enumerate(ways):
        for line, when in enumerate(("before", "after")):
            panel = axes[line][column]
            positions = bins[f"{way}, {when}"]
            panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
            for k, some in enumerate(positions):
                colour = plt.colormaps["viridis"](k / max(1, len(positions) - 1))
                shown = [b for b in some if b.rounds >= 20]
                panel.plot(
                    [b.promised for b in shown],
                    [b.held for b in shown],
                    "o-",
                    color=colour,
                    markersize=3,
                    label=f"k = {k + 1}",
                )
            panel.set_title(f"{way}, {when} scaling")
            panel.set_aspect("equal")
    for panel in axes[-1]:
        panel.set_xlabel("promised prefix survival")
    for panels in axes:
        panels[0].set_ylabel("share of rounds that kept it")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
