"""What the benches share: where a figure comes from, and CSV files."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from dspark_kernels.cpu import cpu_name
from dspark_stream.load.costs import CapacityCurve


class Stored(msgspec.Struct):
    """The part of a stored curve's file that counts here."""

    curve: CapacityCurve
    key: list[str] = []


def about() -> dict[str, object]:
    """Columns that say what was measured where."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "command": " ".join(["python", *sys.argv]),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """One line a row, with `about`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    more = about()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *more])
        writer.writeheader()
        writer.writerows({**row, **more} for row in rows)
    print(f"written to {path}")


def write_picture(path: Path, drawings: Sequence[str], columns: int = 1) -> None:
    """SVG drawings of 640 by 400, so many in a row, in one SVG file."""
    width, height = 640 * columns, 400 * -(-len(drawings) // columns)
    sized = [d.replace("<svg ", '<svg height="400" ', 1) for d in drawings]  # inside another it would take its height
    body = "".join(
        f'<g transform="translate({640 * (i % columns)} {400 * (i // columns)})">{d}</g>' for i, d in enumerate(sized)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"{body}</svg>\n"
    )
    print(f"drawn in {path}")
