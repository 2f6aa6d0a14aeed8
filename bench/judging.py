"""What judging a block as a whole is worth: the same drafts judged both ways, on paper.

Of a round's drafts at least x_1 … x_k stand with probability Π min(1, p_t(x_i)/p_d(x_i)) token by token, and with the
block's share w_k (`decoding.accept.rejection`). Both are summed over the rounds of one run at temperature 1, so they
differ by the judging alone and not by what was drafted. Every draft is verified. Prints a table, writes a line a file.

    python bench/judging.py --prompts eval/*.jsonl

``--speed`` asks instead what drawing and judging take, by verification, of one stream whose drafts are all verified:
milliseconds a row of the target and a draft token beyond greedy ones, and tokens a second, in turns and as a ratio
within them.

    python bench/judging.py --speed --model qwen2.5-coder-0.5b --temperature 0.7 --top-p 0.8 --top-k 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor

import dspark_stream.decoding.accept as engine_accept
import dspark_stream.engine.step as engine_step
from common import write_csv
from dspark_stream.config import MAX_FIXED, Config
from dspark_stream.console import SILENT, Progress
from dspark_stream.decoding.accept import Outcome, rejection
from dspark_stream.decoding.draft import Block, StreamView
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.local import LocalEngine
from dspark_stream.measure.evaluate import Plan, Prompt, read_prompts, run_prompts
from dspark_stream.measure.sweep import shipped_prompts
from dspark_stream.models.distributions import Distributions
from dspark_stream.types import Acceptance, SamplingParams, Verification


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
        """See `decoding.accept.rejection`."""
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
    parser.add_argument("--prompts", type=Path, nargs="+", default=[], help="with --speed: default the shipped ones")
    parser.add_argument("--limit", type=int, default=None, help="prompts of each file")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--speed", action="store_true", help="what drawing and judging take, by verification")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0, help="with --speed, as the next two")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/judging.csv"))
    args = parser.parse_args()
    if not (args.prompts or args.speed):
        parser.error("--prompts is needed")
    config = Config(
        model=args.model,
        drafter=args.drafter,
        device=args.device,
        schedule=f"fixed:{MAX_FIXED}",
        max_num_seqs=args.streams,
    )
    engine, tokenizer = build_engine(config, Progress())
    assert tokenizer is not None
    if args.speed:
        return speed(engine, tokenizer, args)
    plan = Plan(
        sampling=SamplingParams(max_tokens=args.tokens, temperature=args.temperature, seed=1),
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


# --- what it takes ---------------------------------------------------------------------------------------------

WAYS: dict[Acceptance, Verification] = {"greedy": "rejection", "rejection": "rejection", "coupled": "coupled"}


class Turn(NamedTuple):
    """One way's turn."""

    row_ms: float
    """Of `accept`, a row of the target."""
    token_ms: float
    """Of `draft`, a draft token."""
    tokens_per_s: float
    accepted_length: float


class Clock:
    """A function of the engine's step, and the seconds that its calls took."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        begun = time.perf_counter()
        result = self._function(*args)
        self.seconds += time.perf_counter() - begun
        return result


def speed(engine: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    """Ways in turns over the same prompts; a table of medians."""
    prompts = [p for path in args.prompts for p in read_prompts(path, args.limit)] or shipped_prompts()[: args.limit]
    turns: dict[Acceptance, list[Turn]] = {way: [] for way in WAYS}
    with LocalEngine(engine) as local:
        for repeat in range(-1, args.repeats):  # the first fills buffers
            for way in WAYS:
                turn = one_turn(local, tokenizer, prompts, way, args, repeat)
                if repeat >= 0:
                    turns[way].append(turn)
    rows = [speed_row(way, turns[way], turns["greedy"], turns["rejection"]) for way in WAYS]
    write_csv(args.out, rows)
    print("\n| way | ms a row | ms a draft token | tokens/s | of rejection | accepted length |")
    print("| --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print("| {way} | {row_ms:+} | {token_ms:+} | {tokens_per_s} | {of_rejection} | {accepted_length} |".format(**r))


def one_turn(
    local: LocalEngine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    way: Acceptance,
    args: argparse.Namespace,
    repeat: int,
) -> Turn:
    """Every prompt once, one after the other."""
    cuts = {"top_p": args.top_p, "top_k": args.top_k}
    temperature = 0.0 if way == "greedy" else args.temperature
    plan = Plan(
        sampling=SamplingParams(max_tokens=args.tokens, temperature=temperature, seed=2 + repeat, **cuts),
        mode="dspark",
        verification=WAYS[way],
        streams=1,
        turns=1,
    )
    accept, draft = Clock(engine_step.accept), Clock(engine_step.draft)
    with mock.patch.object(engine_step, "accept", accept), mock.patch.object(engine_step, "draft", draft):
        tally = run_prompts(local, tokenizer, prompts, plan, SILENT, way)
    figures, verified = tally.figures(), sum(1 + r.scheduled for r in tally.rounds)
    drafted = sum(len(r.draft_tokens) for r in tally.rounds)
    return Turn(
        1e3 * accept.seconds / verified,
        1e3 * draft.seconds / drafted,
        figures.tokens_per_s_user or 0.0,
        figures.accepted_length or 0.0,
    )


def speed_row(
    way: Acceptance, turns: Sequence[Turn], greedy: Sequence[Turn], rejected: Sequence[Turn]
) -> dict[str, object]:
    """One way's line: milliseconds beyond those of greedy rounds of the same repeat."""
    pairs = list(zip(turns, greedy, strict=True))
    ratios = [own.tokens_per_s / other.tokens_per_s for own, other in zip(turns, rejected, strict=True)]
    return {
        "way": way,
        "row_ms": round(median(own.row_ms - other.row_ms for own, other in pairs), 3),
        "token_ms": round(median(own.token_ms - other.token_ms for own, other in pairs), 3),
        "tokens_per_s": round(median(t.tokens_per_s for t in turns), 1),
        "of_rejection": round(median(ratios), 3),
        "accepted_length": round(fmean(t.accepted_length for t in turns), 3),
    }


if __name__ == "__main__":
    main()
