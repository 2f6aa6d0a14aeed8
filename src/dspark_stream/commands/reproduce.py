"""``dspark-stream reproduce``: what speculation brings on this machine, as a report with a verdict."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from dspark_stream import config as settings
from dspark_stream.commands import common
from dspark_stream.errors import ConfigError

_EPILOG = """\
Runs plain decoding, one-token drafts, whole blocks and the adaptive schedule at rising loads, at temperatures 0 and 1,
on real prompts, in turns on the same engine, and compares what each user gets at the same total throughput. Takes about
ten minutes on two cores, and leaves a page that can be shared.

examples:
  dspark-stream reproduce
  dspark-stream reproduce --minutes 30 --out report.html --drafter ./my-drafter
"""


def add(into: common.Subparsers) -> None:
    """Add ``reproduce`` and its flags."""
    parser = common.add_command(
        into,
        "reproduce",
        run,
        "check on this machine what speculation brings, with a report",
        _EPILOG,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reproduce.html"), metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=common.number(float, 0.1, 1440), metavar="N", help="repeat for so long (default: 9)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="seconds on few loads: shows that it works, proves nothing"
    )
    settings.add_arguments(parser, ("model", "engine"))


def run(args: argparse.Namespace) -> int:
    """Measure loads and schedules against each other, and write a report with a verdict."""
    from dspark_stream.console import Progress
    from dspark_stream.engine.local import LocalEngine
    from dspark_stream.measure.reproduce import FULL, QUICK, report, verdict
    from dspark_stream.measure.reproduce import run as measure
    from dspark_stream.measure.sweep import shipped_prompts

    config = settings.resolve(vars(args)).config
    plan = QUICK if args.quick else FULL
    if args.minutes is not None:
        plan = plan._replace(minutes=args.minutes)
    config = msgspec.structs.replace(config, max_num_seqs=max(config.max_num_seqs, *plan.streams))
    progress = Progress()
    engine, tokenizer = common.load(config)
    if not engine.info.gamma:
        raise ConfigError(
            "there is no drafter, so there is nothing to compare: name one with --drafter", param="drafter"
        )
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so prompts cannot be read", param="model")
    with LocalEngine(engine) as local:
        findings = measure(engine, local, tokenizer, shipped_prompts(), plan, progress)
    common.write(args.out, report(findings))
    print("\n".join(verdict(findings)))
    print(f"report: {args.out}")
    return 0
