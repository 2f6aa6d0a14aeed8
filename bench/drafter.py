"""What drafters are worth: accepted length and calibration, by drafter, precision, verification, temperature, domain.

Every draft is verified (fixed γ), so the figures do not depend on a schedule or on the speed of the machine. Prompt
lookup needs no run: see `evaluate.prompt_lookup`. Prints tables in Markdown, writes a line for each drafter, way and
file, and pictures: a reliability diagram of the first drafter if it is calibrated, acceptance by position of several.

    python bench/drafter.py --prompts eval/*.jsonl --drafter auto --drafter dflash=runs/none/drafter --quant none w4a8
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import get_args

from common import write_csv, write_picture
from dspark_stream.config import MAX_FIXED, Config, Quant
from dspark_stream.console import Progress
from dspark_stream.decoding.calibration import Bin, Calibration, load_calibration, reliability
from dspark_stream.decoding.platt import Observed
from dspark_stream.decoding.survival import prefix_survival
from dspark_stream.engine.build import build_engine, drafter_folder
from dspark_stream.engine.local import LocalEngine
from dspark_stream.measure.calibrate import error_floor, errors
from dspark_stream.measure.evaluate import Plan, Prompt, Tally, acceptance_by_position, read_prompts, run_prompts
from dspark_stream.measure.plot import Series, line_chart
from dspark_stream.types import Acceptance, RoundRecord, SamplingParams, Verification

WAYS: dict[Acceptance, tuple[float, Verification]] = {
    "greedy": (0.0, "rejection"),
    "rejection": (1.0, "rejection"),
    "coupled": (1.0, "coupled"),
}
SHOWN_ROUNDS = 50
"""What fewer rounds than these reached is left out of pictures: it shows chance."""
Row = dict[str, object]
Bins = dict[Acceptance, list[list[list[Bin]]]]
"""Of each way: before and after calibration, at k = 1 … γ."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=None, help="prompts of each file")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--drafter", action="append", metavar="[NAME=]FOLDER", help="default: auto")
    parser.add_argument("--quant", nargs="+", default=["none"], choices=get_args(Quant))
    parser.add_argument("--slots", type=int, nargs="+", default=[MAX_FIXED], help="of blocks (default: whole ones)")
    parser.add_argument("--cpu-kernels", default="auto", choices=["auto", "off"], help="off: both models on torch")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/drafter.csv"))
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", default=None)
    args = parser.parse_args()
    called = [text.rpartition("=")[0] or Path(text).name for text in args.drafter or ["auto"]]
    for what, names in (("--prompts", [path.stem for path in args.prompts]), ("--drafter", called)):
        if len(set(names)) < len(names):
            parser.error(f"{what}: two have one name ({', '.join(names)})")
    files = {path: read_prompts(path, args.limit) for path in args.prompts}
    rows: list[Row] = []
    bins: Bins = {}
    for text in args.drafter or ["auto"]:
        name, _, folder = text.rpartition("=")
        for quant, slots in itertools.product(args.quant, args.slots):
            config = Config(
                model=args.model,
                drafter=folder,
                draft_quant=quant,
                cpu_kernels=args.cpu_kernels,
                schedule=f"fixed:{slots}",
                max_num_seqs=args.streams,
            )
            label = (name or Path(folder).name) + ("" if quant == "none" else f", {quant}")
            label += "" if slots == MAX_FIXED else f", {slots} slots"
            rows += measure(config, label, files, args, bins if not rows else {})
            write_csv(args.out, rows)
    stems = [path.stem for path in files]
    parts = [lengths(rows, stems), positions(rows), calibrations(rows), by(rows, "by_context"), by(rows, "by_turn")]
    print("\n\n".join(parts))
    if args.pictures:
        if any(before != after for before, after in bins.values()):
            draw_reliability(bins, args.pictures / "reliability.svg")
        if len({row["drafter"] for row in rows}) > 1:
            draw_positions(rows, args.pictures / "positions.svg")


def measure(
    config: Config, label: str, files: dict[Path, list[Prompt]], args: argparse.Namespace, bins: Bins
) -> list[Row]:
    """All ways to accept, all files, of one drafter; fills ``bins``."""
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
            seen = observed(together.rounds, calibration, way)
            bins[way] = [reliability_by_position(seen, c, way) for c in (Calibration(), calibration)]
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
    shares = {
        "acceptance_by_position": [a or 0 for a in acceptance_by_position(tally.rounds)],
        "error_before": errors(seen, Calibration(), way),
        "error_after": errors(seen, calibration, way),
        "error_by_chance": error_floor(seen, calibration, way),
    }
    parts = {"by_context": figures.by_context, "by_turn": figures.by_turn}
    return {
        "drafter": label,
        "way": way,
        "file": file,
        "rounds": figures.rounds,
        "accepted_length": round(figures.accepted_length or 0, 3),
        "prompt_lookup_length": round(figures.prompt_lookup_length or 0, 3),
        "passed_over": figures.passed_over,
        **{name: " ".join(f"{x:.4f}" for x in values) for name, values in shares.items()},
        **{
            n: " ".join(f"{k}:{p.accepted_length:.3f}/{p.rounds}" for k, p in some.items()) for n, some in parts.items()
        },
    }


# --- tables ------------------------------------------------------------------------------------------------------


def lengths(rows: Sequence[Row], files: Sequence[str]) -> str:
    """Accepted lengths: a line for each drafter and way, a column for each file, their mean last."""
    by_file = {(r["drafter"], r["way"], r["file"]): r for r in rows}
    lines = [head("drafter", "way", *files, "mean", "prompt lookup")]
    for drafter, way in dict.fromkeys((r["drafter"], r["way"]) for r in rows):
        own = [by_file[drafter, way, file] for file in files]
        found = [float(str(r["accepted_length"])) for r in own]
        lookup = fmean(float(str(r["prompt_lookup_length"])) for r in own)
        lines.append(line(drafter, way, *(f"{x:.2f}" for x in found), f"{fmean(found):.2f}", f"{lookup:.2f}"))
    return "accepted length\n\n" + "\n".join(lines)


def positions(rows: Sequence[Row]) -> str:
    """Acceptance of draft k, given that those before it were accepted, over all files."""
    together = [r for r in rows if r["file"] == "all"]
    gamma = max(len(numbers(r, "acceptance_by_position")) for r in together)
    lines = [head("drafter", "way", *(f"k = {k + 1}" for k in range(gamma)))]
    lines += [
        line(r["drafter"], r["way"], *(f"{x:.2f}" for x in numbers(r, "acceptance_by_position"))) for r in together
    ]
    return "acceptance by position\n\n" + "\n".join(lines)


def calibrations(rows: Sequence[Row]) -> str:
    """Calibration error of the first drafter at each position, by file, in percent."""
    own = [r for r in rows if r["drafter"] == rows[0]["drafter"]]
    lines = [
        head("way", "file", "rounds", "error", *(f"k = {k + 1}" for k in range(len(numbers(own[0], "error_after")))))
    ]
    for r in own:
        for name in ("error_before", "error_after", "error_by_chance"):
            cells = [f"{100 * x:.1f}" for x in numbers(r, name)]
            lines.append(line(r["way"], r["file"], r["rounds"], name.removeprefix("error_").replace("_", " "), *cells))
    return f"calibration error in percent, {rows[0]['drafter']}\n\n" + "\n".join(lines)


def by(rows: Sequence[Row], column: str) -> str:
    """Accepted length by turn or by context, over all files."""
    together = [r for r in rows if r["file"] == "all"]
    names = list(dict.fromkeys(part.split(":")[0] for r in together for part in str(r[column]).split()))
    lines = [head("drafter", "way", *names)]
    for r in together:
        parts = dict(part.split(":") for part in str(r[column]).split())
        shown = [parts[n].replace("/", " (") + ")" if n in parts else "-" for n in names]
        lines.append(line(r["drafter"], r["way"], *shown))
    return f"accepted length (rounds) {column.replace('_', ' ')}\n\n" + "\n".join(lines)


def numbers(r: Row, column: str) -> list[float]:
    """A cell of several figures."""
    return [float(x) for x in str(r[column]).split()]


def head(*cells: object) -> str:
    """Of a table in Markdown."""
    return line(*cells) + "\n" + "|" + " --- |" * len(cells)


def line(*cells: object) -> str:
    """Of a table in Markdown."""
    return "| " + " | ".join(map(str, cells)) + " |"


# --- pictures ----------------------------------------------------------------------------------------------------


def draw_reliability(bins: Bins, path: Path) -> None:
    """Promised against observed prefix survival: a row for each way to accept, before and after."""
    charts = []
    for way, both in bins.items():
        for when, at in zip(("before", "after"), both, strict=True):
            series = [Series("as promised", [(0.0, 0.0), (1.0, 1.0)])]
            for k, some in enumerate(at):
                points = [(b.promised, b.held) for b in some if b.rounds >= SHOWN_ROUNDS]
                series += [Series(f"k = {k + 1}", points)] if len(points) > 1 else []
            title = f"{way}, {when} calibration"
            charts.append(line_chart(title, "promised prefix survival", "share of rounds that kept it", series))
    write_picture(path, charts, columns=2)


def curve(r: Row) -> list[tuple[float, float]]:
    """Position and acceptance, as far as enough rounds come."""
    points: list[tuple[float, float]] = []
    reached = float(str(r["rounds"]))
    for k, acceptance in enumerate(numbers(r, "acceptance_by_position"), 1):
        if reached >= SHOWN_ROUNDS:
            points.append((float(k), acceptance))
        reached *= acceptance
    return points


def draw_positions(rows: Sequence[Row], path: Path) -> None:
    """Acceptance by position: a chart for each way to accept, a line for each drafter."""
    charts = []
    together = [r for r in rows if r["file"] == "all"]
    for way in dict.fromkeys(r["way"] for r in together):
        series = [Series(str(r["drafter"]), curve(r)) for r in together if r["way"] == way]
        charts.append(line_chart(f"{way}: accepted, given those before", "position k", "acceptance", series))
    write_picture(path, charts)


if __name__ == "__main__":
    main()
