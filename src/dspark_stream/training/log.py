"""The run's CSV log: a line every few steps (kind ``train``) and one for each held-out figure (kind ``held_out``)."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dspark_stream.training.loss import LossParts

FILE = "log.csv"
COLUMNS = ["kind", "step", "elapsed_s", "block_rows", "lr", "loss", "ce", "l1", "confidence", "accepted_length"]

Line = dict[str, Any]


@contextlib.contextmanager
def open_log(folder: Path, domains: set[str], step: int) -> Iterator[Callable[[Line], None]]:
    """A function that appends a line. Lines of steps past ``step`` were lost in a kill and are dropped."""
    path = folder / FILE
    names = [*COLUMNS, *(f"accepted_length_{d}" for d in sorted(domains)), "by_position"]
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(line for line in read_log(folder) if int(line["step"]) <= step)
    part.replace(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")

        def write(line: Line) -> None:
            writer.writerow(line)
            file.flush()

        yield write


def read_log(folder: Path) -> list[dict[str, str]]:
    """The whole lines of a run's log; none where there is no log yet."""
    path = folder / FILE
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [line for line in csv.DictReader(file) if (line["step"] or "").isdigit() and None not in line.values()]


def last_figures(folder: Path) -> dict[str, str]:
    """The last held-out line; empty where there is none."""
    lines = [line for line in read_log(folder) if line["kind"] == "held_out"]
    return lines[-1] if lines else {}


def loss_fields(parts: LossParts) -> Line:
    """A loss and its parts, as columns."""
    return {
        "loss": f"{parts.total.item():.4f}",
        "ce": f"{parts.ce:.4f}",
        "l1": f"{parts.l1:.4f}",
        "confidence": f"{parts.confidence:.4f}",
    }


def spoken(line: Line) -> str:
    """A held-out line in words."""
    shown = {name.replace("_", " "): value for name, value in line.items() if name.startswith("accepted")}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) + f", loss {line['loss']}"
