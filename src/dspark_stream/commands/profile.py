"""``dspark-stream profile``: what rounds cost on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec

from dspark_stream import config as settings
from dspark_stream.commands import common
from dspark_stream.measure.plot import SUFFIXES

_EPILOG = """\
The capacity curve says what a round takes as a function of target tokens, streams and context. It is measured once for
each machine, model, precision and version, at the first start; scheduling goes by it.

examples:
  dspark-stream profile
  dspark-stream profile --again --plot capacity.svg
  dspark-stream profile --plot capacity.png
"""


def _picture(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{name!r} ends in none of {', '.join(SUFFIXES)}")
    return path


def add(into: common.Subparsers) -> None:
    """Add ``profile`` and its flags."""
    parser = common.add_command(into, "profile", run, "show what rounds cost on this machine", _EPILOG)
    parser.add_argument("--again", action="store_true", help="measure anew, whether or not the curve is known")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="draw the curve as well: .svg or .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    settings.add_arguments(parser, ("model", "engine"))


def run(args: argparse.Namespace) -> int:
    """Print the capacity curve, measured now or before, and draw it."""
    from dspark_stream.measure.profile import plot, table

    engine, _ = common.load(settings.resolve(vars(args)).config, quiet=common.quiet(args), measure_again=args.again)
    curve = engine.capacity
    if args.plot is not None:
        chart = plot(curve)
        common.write(args.plot, chart.png() if args.plot.suffix.lower() == ".png" else chart.svg())
    print(json.dumps(msgspec.to_builtins(curve)) if args.json else table(curve))
    return 0
