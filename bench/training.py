"""What parts of the training pipeline are worth in time: block rows a second of whole steps, variants in turns.

Each is a run of its own on the same answers:

    as it is           layers and loss in the target's precision, logits over the draft vocabulary alone
    float32            everything in float32
    whole vocabulary   logits over all of the target's tokens

    python bench/training.py --answers runs/answers.jsonl
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from common import write_csv
from dspark_stream.config import default_cache_dir
from dspark_stream.console import Progress
from dspark_stream.models.fetch import model_path
from dspark_stream.models.loading import DType, load_target
from dspark_stream.training.answers import read_answers, split_answers
from dspark_stream.training.loop import Trainer
from dspark_stream.training.pipeline import new_trainer
from dspark_stream.training.plan import TrainPlan

VARIANTS: dict[str, tuple[DType, int]] = {
    "as it is": ("auto", 8192),
    "float32": ("float32", 8192),
    "whole vocabulary": ("auto", 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True, help="as `train` writes them")
    parser.add_argument("--limit", type=int, default=40, help="answers of them")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each variant")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/training.csv"))
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer(args, Path(folder) / str(i), name) for i, name in enumerate(VARIANTS)}
        for one in trainers.values():
            one.train_step()  # the first pays for buffers
        for _ in range(args.steps):
            for name, one in trainers.items():
                before, began = one.rows, time.perf_counter()
                one.train_step()
                seconds[name].append(time.perf_counter() - began)
                rows[name] = one.rows - before
        for one in trainers.values():
            one.close()
    table: list[dict[str, object]] = []
    for name, times in seconds.items():
        rate = rows[name] / median(times)
        print(f"{name:>18}  {median(times):6.3f} s a step  {rate:7,.0f} block rows/s")
        table.append({"variant": name, "step_s": round(median(times), 4), "rows_per_s": round(rate)})
    write_csv(args.out, table)


def trainer(args: argparse.Namespace, folder: Path, name: str) -> Trainer:
    """A run of one variant on the same answers, its features computed."""
    dtype, vocabulary = VARIANTS[name]
    model = model_path(args.model, default_cache_dir(), Progress())
    loaded = load_target(model, dtype=dtype, device="cpu")
    answers = read_answers(args.answers, loaded.target.vocab_size, limit=args.limit)
    plan = TrainPlan(steps=1000, anchors=32, draft_vocab=vocabulary, held_out=4, mask_token_id=3)
    folder.mkdir()
    torch.manual_seed(0)
    return new_trainer(plan, loaded, split_answers(answers, plan.held_out, 0), folder, Progress())


if __name__ == "__main__":
    main()
