"""`dspark-stream train`: a drafter for a target, from prompts or from answers that exist.

Light to import: the command line reads `add_arguments` for its help.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from dspark_stream.config import parse_bytes
from dspark_stream.console import Progress
from dspark_stream.errors import ConfigError, DsparkError
from dspark_stream.training.plan import HEADS, STARTS, TrainPlan, alone, anew, settle, shaped

EXIT_INTERRUPTED = 130

Option = tuple[str, str, dict[str, Any]]
"""Field of the plan, help, and what else argparse is told."""


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers like 1,8,14,20,27") from None


DATA: list[Option] = [
    (
        "target",
        "model to draft for: a name (dspark-stream models lists them), a folder, a .gguf file or a hub name",
        {"metavar": "MODEL", "flags": ("--target", "--model")},
    ),
    (
        "prompts",
        'JSONL files of prompts, a line {"messages": [{"role": "user", "content": …}]}, with a "domain" or not; the '
        "target answers them (default: it writes prompts, too)",
        {"nargs": "+", "metavar": "FILE"},
    ),
    (
        "own_prompts",
        "prompts that the target writes itself (default: 2000 without --prompts, else none)",
        {"type": int},
    ),
    ("turns", "most turns of a conversation; later ones are written by the target", {"type": int}),
    ("follow_ups", "share of conversations that go on after their first answer", {"type": float, "metavar": "SHARE"}),
    (
        "answers",
        "JSONL file of answers that the target wrote before, as answers.jsonl of a run, instead of --prompts",
        {"metavar": "FILE"},
    ),
    (
        "licences",
        "a line on data and its licence for the card; may be repeated",
        {"flags": ("--licence",), "action": "append", "metavar": "TEXT"},
    ),
    ("limit", "most answers to write or to use (default: one a prompt; more than prompts: asked again)", {"type": int}),
    ("answer_tokens", "most tokens of an answer", {"type": int}),
    ("streams", "answers written at the same time", {"type": int}),
    (
        "writer",
        "who lets the target write: our engine, or openvino-genai (.gguf on a CPU), the faster where it is installed",
        {"choices": ("auto", "engine", "openvino")},
    ),
    ("held_out", "greedy answers kept out of training, to measure on", {"type": int}),
]
SHAPE: list[Option] = [
    (
        "init",
        "folder of a drafter to go on from, with its shape: of the options below only --add-layers counts",
        {"metavar": "DRAFTER"},
    ),
    (
        "add_layers",
        "with --init: layers put on top of its own, which change nothing until they are trained",
        {"type": int},
    ),
    (
        "start",
        "what layers start from: the target's last ones where shapes allow, or noise, to compare",
        {"choices": STARTS},
    ),
    ("layers", "layers of the backbone", {"type": int}),
    ("block_size", "draft block γ", {"type": int}),
    ("head", "sequential head; none is DFlash", {"choices": HEADS}),
    ("rank", "rank of the sequential head", {"type": int}),
    ("draft_vocab", "draft vocabulary: the target's most used tokens; 0 for all of them", {"type": int}),
    ("taps", "tapped target layers (default: five from 1 to L-3)", {"type": _layers, "metavar": "1,8,…"}),
    ("mask_token_id", "id that stands for tokens not drafted yet (default: an unused special token)", {"type": int}),
]
TRAINING: list[Option] = [
    ("minutes", "end after so many minutes of training (this or --steps is needed)", {"type": float}),
    ("steps", "end after so many steps (the first of both ends it)", {"type": int}),
    ("batch", "sequences a step", {"type": int}),
    ("anchors", "blocks a sequence and step", {"type": int}),
    ("lr", "highest learning rate", {"type": float}),
    ("optimizer", "of the layers' matrices; everything else is AdamW's", {"choices": ("muon", "adamw")}),
    ("seed", "of everything drawn at random", {"type": int}),
    ("validate_every", "steps between held-out figures", {"type": int, "metavar": "STEPS"}),
    ("checkpoint_minutes", "minutes between saved states", {"type": float, "metavar": "MINUTES"}),
    ("feature_budget", "disk for the target's hidden states, as 8GiB; the rest is computed anew", {"type": _size}),
    ("device", "where it runs", {"choices": ("auto", "cpu", "cuda")}),
    ("threads", "CPU threads; 0 leaves the choice to torch", {"type": int}),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train`."""
    defaults = {f.name: f.default for f in fields(TrainPlan) if f.default is not MISSING}
    for title, options in (("data", DATA), ("drafter", SHAPE), ("training", TRAINING)):
        group = parser.add_argument_group(title)
        for name, help_text, given in options:
            told = {"metavar": "N"} | given if "choices" not in given else dict(given)
            flags = told.pop("flags", ("--" + name.replace("_", "-"),))
            default: Any = [] if told.get("action") == "append" else defaults[name]
            described = help_text
            if default not in (None, (), []) and "default:" not in help_text:
                shown = f"{default // 2**30}GiB" if told.get("type") is _size else default
                described = f"{help_text} (default: {shown})"
            group.add_argument(*flags, dest=name, default=default, help=described, **told)
    group = parser.add_argument_group("places")
    group.add_argument(
        "--run-dir",
        type=Path,
        metavar="FOLDER",
        help="folder of the run (default: runs/NAME); the same command goes on where a stopped one left it. How far "
        "and how fast it goes (--minutes, --steps, --streams …) may be given anew, and what concerns training alone "
        "until its state is first saved",
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the drafter is written (default: drafter/ in the run's folder)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, stage by stage. 0: the drafter is saved; 130: stopped by a signal, to be gone on with.

    Raises:
        DsparkError: whatever cannot be used or written; what is done is kept.
    """
    # before torch is loaded: threads that wait spinning take the time of whoever shares the machine, and of us
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(TrainPlan)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    plan = shaped(TrainPlan(**values))
    folder: Path = args.run_dir or Path("runs") / run_name(plan.target)
    out: Path = args.out or folder / "drafter"
    if plan.add_layers and plan.init is not None and out.resolve() == Path(plan.init).resolve():
        # the same command again would add them to what it had written
        raise ConfigError("--out is the drafter of --init; with --add-layers it must be another folder", param="out")
    try:
        there = next(path for path in (out, *out.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise NotADirectoryError(f"{there} is no folder to write in")
    except OSError as error:
        raise ConfigError(f"no drafter can be written to {out}: {error}", param="out") from error
    with alone(folder):
        return _run_in(folder, out, plan)


def _run_in(folder: Path, out: Path, plan: TrainPlan) -> int:
    import torch

    from dspark_stream.training.pipeline import run_stages
    from dspark_stream.training.workers import keep_freed_memory

    settle(plan, folder)
    progress = Progress()
    keep_freed_memory()
    if plan.threads:
        torch.set_num_threads(plan.threads)
    try:
        finished = run_stages(plan, folder, out, progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's memory is full: {error}; fewer --streams take less to write and to calibrate, a smaller "
            f"--batch or --anchors less to train, {anew(folder)}",
            param="batch",
        ) from error
    except OSError as error:  # what no stage could say better: a log line, say, on a full disk
        raise ConfigError(f"{error}; what is done is kept in {folder}", param="run_dir") from error
    except KeyboardInterrupt:
        finished = False
    if not finished:
        progress.say(f"stopped; the same command goes on from {folder}")
        return EXIT_INTERRUPTED
    return 0


def run_name(target: str) -> str:
    """A folder's name for a target's."""
    name = Path(target).name.removesuffix(".gguf").lower()
    return re.sub(r"[^a-z0-9._-]+", "-", name) or "target"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dspark_stream.training.command`."""
    parser = argparse.ArgumentParser(prog="dspark-stream train", allow_abbrev=False)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except DsparkError as error:
        print(f"dspark-stream train: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
