"""What judging a block as a whole is worth: the same drafts judged both ways, on paper.

Of a round's drafts at least x_1 … x_k stand with probability Π min(1, p_t(x_i)/p_d(x_i)) token by token, and with the
block's share w_k (`spec.accept.rejection`). Both are summed over the rounds of one run at temperature 1, so they differ
by the judging alone and not by what was drafted. Every draft is verified. Prints a table, writes a line a file.

    python bench/judging.py --prompts eval/*.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, pstdev
from unittest import mock

import numpy as np
from torch import Tensor

import dspark_stream.spec.accept as engine_accept
from common import write_csv
from dspark_stream.config import MAX_FIXED, Config
from dspark_stream.engine.build import build_engine
from dspark_stream.evaluate import Plan, read_prompts, run_prompts
from dspark_stream.local import LocalEngine
from dspark_stream.models.distributions import Distributions
from dspark_stream.progress import Progress
from dspark_stream.spec.accept import Outcome, rejection
from dspark_stream.spec.draft import Block, StreamView
from dspark_stream.types import SamplingParams


class Watch:
    """`rejection`, keeping what either judging promises of every whole block that passes by."""

    def __init__(self, gamma: int) -> None:
        self.gamma = gamma
        self.by_token: list[list[float]] = []  # [rounds, γ]: at least x_1 … x_k stand
        self.by_block: list[list[float]] = []
        self.accepted: list[int] = []

    def __call__(
        self, p: Distributions, first: int, stream: StreamView, block: Block, length: int, draft_ids: Tensor | None
    ) -> Outcome:
        """See `spec.accept.rejection`."""
        outcome = rejection(p, first, stream, block, length, draft_ids)
        if length == self.gamma:
            assert block.q is not None
            slots = range(length)
            ratios = [
                p.probability(first + k, block.tokens[k]) / block.q.probability(k, block.indices[k]) for k in slots
            ]
            share, shares = 1.0, []
            for ratio in ratios:
                share = min(1.0, share * ratio)
                shares.append(share)
            self.by_token.append(np.cumprod(np.minimum(ratios, 1.0)).tolist())
            self.by_block.append(shares)
            self.accepted.append(outcome.accepted)
        return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=None, help="prompts of each file")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("runs/judging.csv"))
    args = parser.parse_args()
    config = Config(
        model=args.model,
        drafter=args.drafter,
        device=args.device,
        schedule=f"fixed:{MAX_FIXED}",
        max_num_seqs=args.streams,
    )
    engine, tokenizer = build_engine(config, Progress())
    assert tokenizer is not None
    plan = Plan(
        sampling=SamplingParams(max_tokens=args.tokens, temperature=1.0, seed=1),
        mode="dspark",
        verification="rejection",
        streams=args.streams,
        turns=1,
    )
    rows: list[dict[str, object]] = []
    with LocalEngine(engine) as local:
        for path in args.prompts:
            watch = Watch(engine.info.gamma)
            prompts = read_prompts(path, args.limit)
            with mock.patch.object(engine_accept, "rejection", watch):
                run_prompts(local, tokenizer, prompts, plan, Progress(), path.stem)
            if not watch.accepted:
                parser.error("no whole block was judged: captured rounds of a GPU cannot be watched (--device cpu)")
            rows.append(row(path.stem, watch))
    write_csv(args.out, rows)
    print("\n| file | rounds | token by token | whole blocks | gain | observed |")
    print("| --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print("| {file} | {rounds} | {by_token} | {by_block} | {gain:+.1%} | {observed} ± {error} |".format(**r))
    one, other, seen = (fmean(float(str(r[name])) for r in rows) for name in ("by_token", "by_block", "observed"))
    print(f"| mean | | {one:.3f} | {other:.3f} | {other / one - 1:+.1%} | {seen:.3f} |")


def row(file: str, watch: Watch) -> dict[str, object]:
    """Accepted lengths of one file, and how likely x_1 … x_k stand either way."""
    token, block = np.array(watch.by_token), np.array(watch.by_block)
    one, other = 1 + float(token.sum(1).mean()), 1 + float(block.sum(1).mean())
    return {
        "file": file,
        "rounds": len(token),
        "by_token": round(one, 3),
        "by_block": round(other, 3),
        "gain": round(other / one - 1, 4),
        "observed": round(1 + fmean(watch.accepted), 3),
        "error": round(pstdev(watch.accepted) / len(token) ** 0.5, 3),
        "survival_by_token": " ".join(f"{x:.3f}" for x in token.mean(0)),
        "survival_by_block": " ".join(f"{x:.3f}" for x in block.mean(0)),
    }


if __name__ == "__main__":
    main()
