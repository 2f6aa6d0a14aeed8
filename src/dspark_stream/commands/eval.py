"""``dspark-stream eval``: accepted length and speed on prompt files."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dspark_stream import config as settings
from dspark_stream.commands import common
from dspark_stream.errors import ConfigError
from dspark_stream.measure.evaluate import DEFINITIONS

if TYPE_CHECKING:
    from dspark_stream.config import Config
    from dspark_stream.measure.evaluate import Figures, Plan, Prompt
    from dspark_stream.types import ModelInfo

_EPILOG = f"""\
prompt files hold one JSON object a line: "messages" (chat turns, the user's last); others do not matter.

{DEFINITIONS}
With --draft-quant or --target-quant the pair is run unquantised as well, and what the quantisation costs in
accepted length is printed too.

examples:
  dspark-stream eval --prompts math.jsonl code.jsonl --limit 20
  dspark-stream eval --prompts chat.jsonl --streams 1 --temperature 1 --schedule fixed:4 --json
"""


def add(into: common.Subparsers) -> None:
    """Add ``eval`` and its flags."""
    parser = common.add_command(into, "eval", run, "measure accepted length and speed on prompt files", _EPILOG)
    common.add_prompts(parser)
    parser.add_argument(
        "--turns",
        type=common.number(int, 1, 64),
        default=1,
        metavar="N",
        help='go on with the prompts\' "follow_ups" for up to N turns (default: 1)',
    )
    parser.add_argument(
        "--no-quant-cost", action="store_true", help="leave out the unquantised run beside a quantised one"
    )
    common.add_decoding(parser, max_tokens=256)
    settings.add_arguments(parser, ("model", "engine"))


def run(args: argparse.Namespace) -> int:
    """Measure a pair on prompt files; a table or JSON on stdout."""
    from dspark_stream.measure.evaluate import Plan, labels, parts_table, quantisation_cost, read_prompts, table

    config = settings.resolve(vars(args)).config
    if args.streams > config.max_num_seqs:
        config = msgspec.structs.replace(config, max_num_seqs=args.streams)
    files = {str(path): read_prompts(path, args.limit) for path in args.prompts}
    plan = Plan(
        sampling=common.sampling(args),
        mode=args.mode,
        verification=args.verification,
        streams=args.streams,
        turns=args.turns,
    )
    figures, together, info = _measure(config, files, plan, quiet=common.quiet(args))
    unquantised = None
    if (config.draft_quant, config.target_quant) != ("none", "none") and not args.no_quant_cost:
        gc.collect()
        bare = msgspec.structs.replace(config, draft_quant="none", target_quant="none", cpu_kernels="off")
        unquantised = _measure(bare, files, plan, quiet=common.quiet(args))[1]
    if args.json:
        report = {"files": figures, "all": together, "unquantised": unquantised, "engine": info, "plan": plan}
        print(json.dumps(msgspec.to_builtins(report)))
        return 0
    several = len(figures) > 1
    rows = dict(zip(labels([Path(name) for name in figures]), figures.values(), strict=True)) if several else {}
    rows["all"] = together
    if unquantised is not None:
        rows["all, unquantised"] = unquantised
    print(table(rows))
    if parts := parts_table(together):
        print(parts)
    if unquantised is not None:
        print(quantisation_cost(together, unquantised))
    return 0


def _measure(
    config: Config, files: dict[str, list[Prompt]], plan: Plan, *, quiet: bool
) -> tuple[dict[str, Figures], Figures, ModelInfo]:
    """Load the pair, run all files, and give its memory back."""
    from dspark_stream.console import Progress
    from dspark_stream.engine.local import LocalEngine
    from dspark_stream.measure.evaluate import evaluate

    engine, tokenizer = common.load(config, quiet=quiet)
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so prompt files cannot be read", param="model")
    with LocalEngine(engine) as local:
        figures, together = evaluate(local, tokenizer, files, plan, Progress(enabled=not quiet))
    return figures, together, engine.info
