"""What a better schedule could still bring: recorded rounds, replayed against schedulers that know more.

Rounds are recorded with every draft made and verified, so each says what was promised and what was accepted. They are
then replayed at every load by the cost table of this machine. All of them pay for drafting, and choose for themselves
whether to. From the one that knows most to the one that is:

    clairvoyant   knows how many drafts of each round will be accepted
    oracle        knows what promises are worth (calibrated on these very rounds), the cost table, and the best price
    promised      the same with the promises as they are: what calibration costs
    table         the same by a cost table that was measured at another time: what the cost table costs
    adaptive      the engine's own: begins with that table and follows its drift, decides about drafting from the past,
                  early stop where it must: what staleness costs, less what following the drift wins back

Streams come one company at a time to an engine that has seen nothing; the first half of a replay is for learning.

A replay takes rounds as independent of what was verified before; the true text would go on elsewhere. It takes ℓ drafts
of a round to accept min(ℓ, what all of them did). At temperature 0 that is so. Under rejection, which judges a block as
a whole, it is so on average over outcomes (docs/decisions/019), which is all that a choice not knowing them can ask;
the clairvoyant knows them, and is a bound for this one outcome only.

    python bench/regret.py --streams 1 4 16 64 --temperature 0
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from dspark_stream.engine.drift import Drift, watch
from dspark_stream.spec.capacity import CapacityCurve, Costs, RoundCost
from dspark_stream.spec.handicap import Shape
from dspark_stream.spec.skipping import DraftPast, Plan, Skipping

from common import write_csv, write_picture
from dspark_stream.config import Config
from dspark_stream.engine.build import build_engine
from dspark_stream.evaluate import Prompt, read_prompts
from dspark_stream.load.schedule import Candidate, Schedule, admit_mixed, parse_schedule
from dspark_stream.local import LocalEngine
from dspark_stream.progress import Progress
from dspark_stream.report.plot import Series, line_chart
from dspark_stream.report.sweep import shipped_prompts
from dspark_stream.spec.calibration import BINS
from dspark_stream.types import Acceptance, GenerationRequest, SamplingParams, TokensEvent


class Round(NamedTuple):
    """A recorded one: what was promised, and how many drafts would have been accepted."""

    survival: tuple[float, ...]
    accepted: int


Rounds = list[list[Round]]
"""Of every stream, in order."""


def record(args: argparse.Namespace, prompts: Sequence[Prompt]) -> tuple[Rounds, CapacityCurve, CapacityCurve]:
    """Rounds with all drafts verified, and the capacity curve measured twice."""
    config = Config(model=args.model, drafter=args.drafter, max_num_seqs=max(args.streams), max_model_len=2048)
    curves = []
    for _ in range(2):
        engine, tokenizer = build_engine(config, Progress(), measure_again=True)
        curves.append(engine.capacity)
    assert tokenizer is not None
    streams: dict[str, list[Round]] = {}
    requests = [
        GenerationRequest(
            request_id=str(i),
            prompt_ids=tuple(tokenizer.encode_chat([(m.role, m.content) for m in p.messages])),
            sampling=SamplingParams(max_tokens=args.tokens, temperature=args.temperature, seed=i, ignore_eos=True),
            record_rounds=True,
        )
        for i, p in enumerate(prompts)
    ]
    with LocalEngine(engine) as local:
        engine.use_schedule(f"fixed:{engine.info.gamma}")
        for event, _ in local.run(requests, 8):
            if isinstance(event, TokensEvent) and event.round is not None:
                one = Round(tuple(event.round.survival), event.round.accepted)
                streams.setdefault(event.request_id, []).append(one)
    return list(streams.values()), curves[0], curves[1]


# --- replays -----------------------------------------------------------------------------------------------

Choose = Callable[[Sequence[Round], RoundCost, float], list[int]]
"""Lengths for streams that have drafted, at a price."""


class Machine(NamedTuple):
    """What time is taken from, and what decisions go by."""

    true: Costs
    believed: Costs
    position: float

    def rounds(self, streams: int, drafting: int, slots: int) -> tuple[RoundCost, RoundCost]:
        """True and believed cost of a round."""
        true, believed = (c.round_cost(streams, self.position, drafting, slots) for c in (self.true, self.believed))
        return true, believed


def replay(
    rounds: Rounds, streams: int, steps: int, machine: Machine, n: int, slots: int, price: float, choose: Choose
) -> float:
    """Tokens a millisecond when the first ``n`` of the streams always draft so many slots."""
    true, believed = machine.rounds(streams, n, slots)
    tokens, ms = 0.0, 0.0
    for step in range(steps):
        now = [Round(r.survival[:slots], min(r.accepted, slots)) for r in at(rounds, streams, step)[:n]]
        lengths = choose(now, believed, price)
        tokens += streams + sum(min(length, r.accepted) for length, r in zip(lengths, now, strict=True))
        ms += true(streams + sum(lengths))
    return tokens / ms


def at(rounds: Rounds, streams: int, step: int) -> list[Round]:
    """What every stream would draft in a step; more streams than were recorded begin elsewhere in the same rounds."""
    found = []
    for s in range(streams):
        mine = rounds[s % len(rounds)]
        found.append(mine[(step + 7 * (s // len(rounds))) % len(mine)])
    return found


def companies(rounds: Rounds, streams: int) -> list[Rounds]:
    """So many recorded streams at a time, until each had its turn: few streams must not stand for all prompts."""
    return [rounds[i : i + streams] for i in range(0, max(1, len(rounds) - streams + 1), streams)]


def best(rounds: Rounds, streams: int, steps: int, machine: Machine, choose: Choose) -> float:
    """The best constant choice of who drafts and how much, each at its own best price (Dinkelbach's iteration).

    Streams are taken in the order of what their drafts bring, which only somebody who has seen them all can know.
    """
    gamma = len(rounds[0][0].survival)
    whole = [rounds[s % len(rounds)] for s in range(streams)]
    whole.sort(key=lambda one: -sum(r.accepted for r in one) / len(one))
    found = streams / machine.rounds(streams, 0, 0)[0].ms[0]
    for n in sorted({streams, *(2**k for k in range(7) if 2**k < streams), 3 * streams // 4, streams // 2} - {0}):
        for slots in sorted({1, 2, 3, 5, gamma}):
            price = found
            for _ in range(2):
                price = replay(whole, streams, steps, machine, n, slots, price, choose)
            found = max(found, price)
    return found


def clairvoyant(now: Sequence[Round], cost: RoundCost, price: float) -> list[int]:
    """Everything that will be accepted, as far as it is worth its time."""
    these = [Candidate([1.0] * r.accepted, True) for r in now]
    return search(these, cost, price)


def search(these: Sequence[Candidate], cost: RoundCost, price: float) -> list[int]:
    """The global best at a price; the streams that do not draft cost what the cost begins with."""
    shifted = RoundCost(len(these), cost.ms)
    return admit_mixed(these, shifted, lambda tokens, ms: tokens - price * ms)


def promised(now: Sequence[Round], cost: RoundCost, price: float) -> list[int]:
    """By the promises as they are."""
    return search([Candidate(r.survival, True) for r in now], cost, price)


def calibrated(rounds: Rounds) -> Choose:
    """By what such promises were worth in these very rounds: at each position, in bins of the promise."""
    sums: dict[tuple[int, int], list[float]] = {}
    for one in rounds:
        for r in one:
            for k, a in enumerate(r.survival):
                seen = sums.setdefault((k, min(int(a * BINS), BINS - 1)), [0.0, 0.0])
                seen[0] += r.accepted > k
                seen[1] += 1

    def worth(r: Round) -> list[float]:
        held = [sums[k, min(int(a * BINS), BINS - 1)] for k, a in enumerate(r.survival)]
        falling, least = [], 1.0
        for kept, seen in held:
            least = min(least, kept / seen)
            falling.append(least)
        return falling

    return lambda now, cost, price: search([Candidate(worth(r), True) for r in now], cost, price)


def engine_like(
    rounds: Rounds, streams: int, steps: int, machine: Machine, way: Acceptance, schedule: Schedule
) -> float:
    """The engine's own decisions, with nothing known beforehand; the first half of the steps is for learning.

    A schedule of fixed length drafts always.
    """
    gamma = len(rounds[0][0].survival)
    skipping, pasts = Skipping(gamma), [DraftPast(gamma, way) for _ in range(streams)]
    costs, drift = machine.believed, Drift(machine.believed.curve)
    tokens = ms = 0.0
    for step in range(2 * steps):
        slots = schedule.slots(gamma)
        plan = (
            skipping.plan(pasts, machine.position, costs)
            if slots is None
            else Plan([slots > 0] * streams, slots, slots, 0.0)
        )
        now = at(rounds, streams, step)
        drafted = [r.survival[: plan.slots] if d else () for r, d in zip(now, plan.drafting, strict=True)]
        n = sum(plan.drafting)
        true, believed = (c.round_cost(streams, machine.position, n, plan.slots) for c in (machine.true, costs))
        these = [
            Candidate(skipping.corrected(past, row), way != "rejection", past.survivals[0])
            for past, row in zip(pasts, drafted, strict=True)
        ]
        lengths = schedule.lengths(these, believed, plan.price)
        took = [min(length, r.accepted) for length, r in zip(lengths, now, strict=True)]
        spent = true(streams + sum(lengths))
        skipping.learn(pasts, drafted, lengths, took, spent)
        shape = Shape(streams, machine.position, n, plan.slots, streams + sum(lengths))
        verify_ms = spent - true.draft_ms - true.rest_ms
        costs = watch(drift, skipping.handicap, costs, shape, believed, round_ms=spent, verify_ms=verify_ms)
        if step >= steps:
            tokens, ms = tokens + streams + sum(took), ms + spent
    return tokens / ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--schedules", nargs="+", default=["adaptive", "early-stop", "lagged"])
    parser.add_argument("--prompts", type=Path, nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=None, help="prompts of each file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/regret.csv"))
    args = parser.parse_args()
    prompts = [p for path in args.prompts for p in read_prompts(path, args.limit)] or shipped_prompts()
    rounds, curve, other = record(args, prompts)
    random.Random(1).shuffle(rounds)
    knows = Machine(Costs(curve), Costs(curve), float(curve.context))
    believes = knows._replace(believed=Costs(other))
    way: Acceptance = "greedy" if args.temperature < 1e-5 else "rejection"
    rows: list[dict[str, object]] = []
    names = ["plain", "clairvoyant", "oracle", "promised", "table", *args.schedules]
    print(f"tokens/s by schedule, and regret against the oracle\n{'streams':>7} " + " ".join(f"{n:>12}" for n in names))
    for streams in args.streams:
        steps = max(30, args.steps // max(1, streams // 8))
        rate = {"plain": streams / knows.rounds(streams, 0, 0)[0].ms[0]}
        some = companies(rounds, streams)
        for name, machine, choose in (
            ("clairvoyant", knows, clairvoyant),
            ("oracle", knows, calibrated(rounds)),
            ("promised", knows, promised),
            ("table", believes, promised),
        ):
            rate[name] = fmean(best(company, streams, steps, machine, choose) for company in some)
        for name in args.schedules:
            schedule = parse_schedule(name)
            rate[name] = fmean(engine_like(company, streams, steps, believes, way, schedule) for company in some)
        print(f"{streams:>7} " + " ".join(f"{1e3 * rate[n]:>12.1f}" for n in names))
        print(f"{'regret':>7} " + " ".join(f"{1 - rate[n] / rate['oracle']:>12.1%}" for n in names))
        rows += [
            {"streams": streams, "temperature": args.temperature, "schedule": name,
             "tokens_per_s": round(1e3 * rate[name], 2), "regret": round(1 - rate[name] / rate["oracle"], 4)}
            for name in names
        ]  # fmt: skip
    parts = {
        "calibration": ("oracle", "promised"),
        "cost table": ("promised", "table"),
        "staleness": ("table", "adaptive" if "adaptive" in args.schedules else args.schedules[0]),
    }
    value = {(r["streams"], r["schedule"]): float(str(r["tokens_per_s"])) for r in rows}
    print("\nwhere it comes from, of the oracle's throughput")
    for part, (better, worse) in parts.items():
        shares = [(value[s, better] - value[s, worse]) / value[s, "oracle"] for s in args.streams]
        print(f"{part:>12} " + " ".join(f"{s}: {share:+.1%} " for s, share in zip(args.streams, shares, strict=True)))
    write_csv(args.out, rows)
    lines = [Series(n, [(s, value[s, n] / value[s, "oracle"]) for s in args.streams]) for n in names]
    title = f"Throughput over the calibrated oracle's, temperature {args.temperature:g}"
    write_picture(args.out.with_suffix(".svg"), [line_chart(title, "streams", "share", lines, log_x=True)])


if __name__ == "__main__":
    main()
