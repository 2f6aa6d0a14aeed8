"""``dspark-stream calibrate``: fit a drafter's confidence to what is accepted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec

from dspark_stream import config as settings
from dspark_stream.commands import common
from dspark_stream.errors import ConfigError
from dspark_stream.types import RANGES

_EPILOG = """\
Runs the prompts with every draft verified, greedily and at temperature 1 under both verifications, and fits a
temperature and a bias for each position of the draft block, so that promised prefix survival matches what was accepted
(Sequential Platt Scaling). calibration.json is written beside the drafter's weights, where every command
finds it; --calibration none leaves it aside. Take prompts that are like those that will be asked and that the
drafter was not trained on, as many of each kind: some hundreds do.

example:
  dspark-stream calibrate --drafter ./my-drafter --prompts math.jsonl chat.jsonl --limit 50
"""


def add(into: common.Subparsers) -> None:
    """Add ``calibrate`` and its flags."""
    parser = common.add_command(into, "calibrate", run, "fit a drafter's confidence to what is accepted", _EPILOG)
    common.add_prompts(parser)
    parser.add_argument(
        "--unseen-by",
        type=Path,
        metavar="ANSWERS",
        help="leave out prompts that this answers file of a training run holds (answers.jsonl), before --limit counts",
    )
    parser.add_argument(
        "--max-tokens",
        type=common.number(int, 2, 1 << 24),
        default=128,
        metavar="N",
        help="most tokens of an answer (default: 128)",
    )
    parser.add_argument("--seed", type=common.number(int, *RANGES["seed"]), default=0, metavar="S", help="(default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where calibration.json is written (default: the drafter's folder)"
    )
    settings.add_arguments(parser, ("model", "engine"))


def run(args: argparse.Namespace) -> int:
    """Fit a calibration, write it beside the drafter, and show what it does."""
    from dspark_stream.console import Progress
    from dspark_stream.decoding.calibration import save_calibration
    from dspark_stream.engine.build import drafter_folder
    from dspark_stream.engine.local import LocalEngine
    from dspark_stream.measure.calibrate import calibrate, calibration_config, table
    from dspark_stream.measure.evaluate import read_prompts
    from dspark_stream.models.checkpoint import read_config
    from dspark_stream.training.answers import read_answers

    files = [read_prompts(path, None if args.unseen_by else args.limit) for path in args.prompts]
    config = settings.resolve(vars(args)).config
    folder = drafter_folder(config)
    if folder is None:
        raise ConfigError("there is no drafter to calibrate: name one with --drafter", param="drafter")
    if not read_config(folder).enable_confidence_head:
        raise ConfigError(f"{folder} has no confidence head, so there is nothing to calibrate", param="drafter")
    out: Path = args.out or folder
    if not out.is_dir():
        raise ConfigError(f"{out} is no folder", param="out")
    engine, tokenizer = common.load(calibration_config(config), quiet=common.quiet(args))
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so prompt files cannot be read", param="model")
    progress = Progress(enabled=not common.quiet(args))
    seen: set[tuple[int, ...]] = set()
    if args.unseen_by:
        seen = {a.prompt_ids for a in read_answers(args.unseen_by, engine.info.vocab_size)}
    prompts: list[tuple[int, ...]] = []
    for path, asked in zip(args.prompts, files, strict=True):
        ids = [tuple(tokenizer.encode_chat([(m.role, m.content) for m in p.messages])) for p in asked]
        unseen = [i for i in ids if i not in seen]
        if args.unseen_by:
            progress.say(f"{path}: {len(ids) - len(unseen)} of {len(ids)} prompts are in {args.unseen_by}")
        prompts += unseen[: args.limit]
    if not prompts:
        raise ConfigError(f"every prompt is in {args.unseen_by}: none is left to calibrate with", param="unseen_by")
    with LocalEngine(engine) as local:
        calibration, fits = calibrate(
            local,
            prompts,
            gamma=engine.info.gamma,
            max_model_len=engine.info.max_model_len,
            max_tokens=args.max_tokens,
            streams=min(args.streams, config.max_num_seqs),
            seed=args.seed,
            progress=progress,
        )
    if not fits:
        raise ConfigError("too few rounds to calibrate with: nothing was written; give more prompts", param="prompts")
    path = save_calibration(calibration, out)
    if args.json:
        print(json.dumps(msgspec.to_builtins({"file": str(path), "calibration": calibration, "fits": fits})))
    else:
        print(table(calibration, fits))
        print(f"written to {path}")
    return 0
