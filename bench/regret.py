"""What a better schedule could still bring: recorded rounds, replayed against schedulers that know more.

Rounds are recorded with every draft made and verified, so each says what was promised and what was accepted. They are
then replayed at every load by the cost table of this machine. From the schedule that knows most to the ones that are:

    clairvoyant   knows how many drafts of each round will be accepted
    oracle        knows what promises are worth (calibrated on these very rounds), the costs, and the best price
    promised      the same with the promises as they are: what calibration costs
    table         the same by a curve that was measured at another time: what a wrong curve costs
    adaptive      the engine's own: begins with that curve and nothing else, learns from rounds, decides about drafting
                  from the past, early stop where it must: what staleness costs, less what learning wins back
    best fixed    the best of all fixed lengths, which only somebody who has tried them can know

Those that know more choose who drafts, and how much, once for all rounds of a load. Streams come and go: each seat
plays one recorded stream after another, the same for every schedule. The first half of a replay is for learning. The
machine on which the engine's own learns swings: all its rounds take up to twice as long alike, for a while, and each of
them a little longer or shorter, a few a lot longer. Throughput is told by what rounds take without that, so that it can
be compared.

A replay takes rounds as independent of what was verified before; the true text would go on elsewhere. It takes ℓ drafts
of a round to accept min(ℓ, what all of them did). At temperature 0 that is so. Under rejection, which judges a block as
a whole, it is so on average over outcomes (docs/decisions/019), which is all that a choice not knowing them can ask;
the clairvoyant knows them, and is a bound for this one outcome only.

    python bench/regret.py --streams 1 4 16 64 --temperature 0 --recorded runs/rounds.json
    python bench/regret.py --own --recorded bench/recordings/smollm2-135m-T0.json.gz
"""

from __future__ import annotations

import argparse
import gzip
import random
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import msgspec

from common import Stored, write_csv, write_picture
from dspark_stream.config import Config
from dspark_stream.console import Progress
from dspark_stream.decoding.calibration import BINS
from dspark_stream.decoding.schedule import Candidate, RoundCost, Schedule, admit_mixed, parse_schedule
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.context import HANDED_A_ROUND
from dspark_stream.engine.local import LocalEngine
from dspark_stream.load.acceptance import Past
from dspark_stream.load.controller import Controller, Plan
from dspark_stream.load.costs import CapacityCurve, Company, CostTable, Shape
from dspark_stream.measure.evaluate import Prompt, read_prompts
from dspark_stream.measure.plot import Series, line_chart
from dspark_stream.measure.sweep import shipped_prompts
from dspark_stream.types import Acceptance, GenerationRequest, SamplingParams, TokensEvent


class Round(msgspec.Struct, array_like=True):
    """A recorded one: what was promised, and how many drafts would have been accepted."""

    survival: list[float]
    accepted: int


class Recording(msgspec.Struct):
    """What replays are made of."""

    rounds: list[list[Round]]
    """Of every stream, in order."""
    curve: CapacityCurve
    other: CapacityCurve | None = None
    """The curve measured again."""


def record(args: argparse.Namespace, prompts: Sequence[Prompt]) -> Recording:
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
                one = Round(list(event.round.survival), event.round.accepted)
                streams.setdefault(event.request_id, []).append(one)
    return Recording(list(streams.values()), *curves)


def read_recording(path: Path) -> Recording:
    """As `record` made it; the ones of bench/recordings are compressed."""
    data = path.read_bytes()
    return msgspec.json.decode(gzip.decompress(data) if path.suffix == ".gz" else data, type=Recording)


# --- streams and machines ----------------------------------------------------------------------------------


class Seat(NamedTuple):
    """Who sits there in a step."""

    visit: int
    """One number for every stream that comes."""
    brings: float
    """Drafts of its rounds that are accepted, in the mean."""
    round: Round


def timeline(rounds: Sequence[list[Round]], streams: int, steps: int, chance: random.Random) -> list[list[Seat]]:
    """What every stream would draft, step by step; where one ends the next begins, the first ones in their midst."""
    visits, line = 0, [*range(len(rounds))]
    chance.shuffle(line)
    seats: list[tuple[int, list[Round], int]] = []
    found = []
    for step in range(steps):
        for s in range(streams):
            if step == 0 or seats[s][2] == len(seats[s][1]):
                whole = rounds[line[visits % len(line)]]
                seat = (visits, whole, chance.randrange(len(whole)) if step == 0 else 0)
                seats[s:] = [seat, *seats[s + 1 :]]
                visits += 1
        found.append([Seat(v, fmean(r.accepted for r in whole), whole[at]) for v, whole, at in seats])
        seats = [(v, whole, at + 1) for v, whole, at in seats]
    return found


class Machine(NamedTuple):
    """What time is taken from, and what decisions begin with."""

    true: CostTable
    believed: CapacityCurve
    sampled: float
    """1.0 where tokens are drawn, 0.0 where they are greedy."""

    def company(self, streams: int) -> Company:
        """Of so many of the streams."""
        return Company(streams, float(self.true.curve.context))


class Swings:
    """What rounds take times as long as they would, one after the other."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._left, self._aim, self._pace = 0, 0.0, 0.0

    def __call__(self) -> float:
        """The next round's."""
        if self._left == 0:
            self._aim, self._left = self._chance.choice([-0.3, 0.0, 0.0, 0.3, 0.7]), self._chance.randint(40, 400)
        self._left -= 1
        self._pace += 0.2 * (self._aim - self._pace)
        interrupted = self._chance.uniform(0.2, 1.0) if self._chance.random() < 0.02 else 0.0
        return exp(self._pace + self._chance.gauss(0.0, 0.05) + interrupted)


# --- replays -----------------------------------------------------------------------------------------------

Choose = Callable[[Sequence[Round], RoundCost, float], list[int]]
"""Lengths for streams that have drafted, at a price."""


def replay(
    line: Sequence[Sequence[Seat]], machine: Machine, by: CostTable, n: int, slots: int, price: float, choose: Choose
) -> float:
    """Tokens a millisecond when the ``n`` of the streams whose drafts bring most always draft so many slots; ``by``:
    what rounds are thought to cost."""
    streams = len(line[0])
    true, believed = (costs.round_cost(machine.company(streams), n, slots) for costs in (machine.true, by))
    tokens = ms = 0.0
    for seats in line:
        ordered = sorted(seats, key=lambda seat: -seat.brings)[:n]
        now = [Round(s.round.survival[:slots], min(s.round.accepted, slots)) for s in ordered]
        lengths = choose(now, believed, price)
        tokens += streams + sum(min(length, r.accepted) for length, r in zip(lengths, now, strict=True))
        ms += true(streams + sum(lengths))
    return tokens / ms


def best(line: Sequence[Sequence[Seat]], machine: Machine, by: CostTable, choose: Choose) -> float:
    """The best constant choice of how many draft and how much, each at its own best price (Dinkelbach's iteration)."""
    streams, gamma = len(line[0]), len(line[0][0].round.survival)
    found = streams / machine.true.plain_ms(machine.company(streams))
    for n in sorted({streams, *(2**k for k in range(7) if 2**k < streams), 3 * streams // 4, streams // 2} - {0}):
        for slots in sorted({1, 2, 3, 5, gamma}):
            price = found
            for _ in range(2):
                price = replay(line, machine, by, n, slots, price, choose)
            found = max(found, price)
    return found


def best_fixed(line: Sequence[Sequence[Seat]], machine: Machine) -> float:
    """The best of all lengths that everybody drafts and verifies."""
    streams, gamma = len(line[0]), len(line[0][0].round.survival)

    def everything(now: Sequence[Round], cost: RoundCost, price: float) -> list[int]:
        return [len(r.survival) for r in now]

    return max(replay(line, machine, machine.true, streams, g, 0.0, everything) for g in range(1, gamma + 1))


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


def calibrated(rounds: Sequence[Sequence[Round]]) -> Choose:
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


def engine_like(line: Sequence[Sequence[Seat]], machine: Machine, schedule: Schedule, seed: int) -> float:
    """The engine's own decisions, with nothing known beforehand; the first half of the steps is for learning.

    A schedule of fixed length drafts always.
    """
    streams, gamma = len(line[0]), len(line[0][0].round.survival)
    way: Acceptance = "rejection" if machine.sampled else "greedy"
    company, controller, swing = machine.company(streams), Controller(gamma, machine.believed), Swings(seed)
    seen: dict[int, Past] = {}
    owed: dict[Past, int] = {}  # positions whose context features a drafter was not given
    tokens = ms = 0.0
    for step, seats in enumerate(line):
        seen = {seat.visit: seen.get(seat.visit) or Past(gamma, way) for seat in seats}
        pasts = list(seen.values())
        slots = schedule.slots(gamma)
        plan = controller.plan(pasts, company) if slots is None else Plan([slots > 0] * streams, slots, 0.0)
        drafted = [s.round.survival[: plan.slots] if d else [] for s, d in zip(seats, plan.drafting, strict=True)]
        these = [
            Candidate(controller.acceptance.corrected(past, row), way != "rejection", past.survivals[0])
            for past, row in zip(pasts, drafted, strict=True)
        ]
        cost = controller.costs.round_cost(company, *plan.size)
        lengths = schedule.lengths(these, cost, plan.price) if any(plan.drafting) else [0] * streams
        took = [min(length, seat.round.accepted) for length, seat in zip(lengths, seats, strict=True)]
        shape = Shape(company, *plan.size, streams + sum(lengths))
        round_ms = machine.true.ms(shape)
        late_ms = 0.0
        for past, row, accepted in zip(pasts, drafted, took, strict=True):
            if row:
                late_ms += 1e-3 * machine.true.curve.feature_us * owed.pop(past, 0)
            owed[past] = min(owed.get(past, 0) + 1 + accepted, HANDED_A_ROUND)
        controller.learn(zip(pasts, drafted, lengths, took, strict=True), shape, round_ms * swing(), late_ms)
        if 2 * step >= len(line):
            tokens, ms = tokens + streams + sum(took), ms + round_ms + late_ms
    return tokens / ms


def rates(recording: Recording, machine: Machine, streams: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens a millisecond of every schedule, at so many streams."""
    steps, believed = max(30, args.steps // max(1, streams // 8)), CostTable(machine.believed)
    found: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        line = timeline(recording.rounds, streams, 2 * steps, random.Random(seed))
        late = line[steps:]
        each = {
            "plain": streams / machine.true.plain_ms(machine.company(streams)),
            "best fixed": best_fixed(late, machine),
        }
        each |= (
            {}
            if args.own
            else {
                "clairvoyant": best(late, machine, machine.true, clairvoyant),
                "oracle": best(late, machine, machine.true, calibrated(recording.rounds)),
                "promised": best(late, machine, machine.true, promised),
                "table": best(late, machine, believed, promised),
            }
        )
        each |= {name: engine_like(line, machine, parse_schedule(name), seed) for name in args.schedules}
        for name, value in each.items():
            found.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=400, help="that count; as many before them are for learning")
    parser.add_argument("--seeds", type=int, default=2, help="orders of the streams, and machines that swing")
    parser.add_argument("--schedules", nargs="+", default=["adaptive", "early-stop", "lagged"])
    parser.add_argument("--prompts", type=Path, nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=None, help="prompts of each file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--recorded", type=Path, help="rounds and curves are kept there, and taken from there if it is")
    parser.add_argument(
        "--own",
        action="store_true",
        help="quicker: none that know more; regret is against the best fixed length",
    )
    parser.add_argument("--believe", type=Path, help="a stored curve that the engine begins with, not one measured now")
    parser.add_argument("--out", type=Path, default=Path("runs/regret.csv"))
    args = parser.parse_args()
    if args.recorded is not None and args.recorded.exists():
        recording = read_recording(args.recorded)
    else:
        recording = record(args, [p for f in args.prompts for p in read_prompts(f, args.limit)] or shipped_prompts())
        if args.recorded is not None:
            args.recorded.parent.mkdir(parents=True, exist_ok=True)
            args.recorded.write_bytes(msgspec.json.encode(recording))
    believed = recording.other or recording.curve
    if args.believe is not None:
        believed = msgspec.json.decode(args.believe.read_bytes(), type=Stored).curve
    machine = Machine(CostTable(recording.curve), believed, float(args.temperature >= 1e-5))
    rows: list[dict[str, object]] = []
    knowing = [] if args.own else ["clairvoyant", "oracle", "promised", "table"]
    names = ["plain", "best fixed", *knowing, *args.schedules]
    print("tokens/s by schedule, regret against the oracle, and throughput over that of plain decoding, and over the")
    print("better of that and the best fixed length\n" + " ".join(f"{n:>12}" for n in ["streams", *names]))
    for streams in args.streams:
        rate = rates(recording, machine, streams, args)
        better = max(rate["plain"], rate["best fixed"])
        best_known = rate["best fixed" if args.own else "oracle"]
        for title, form, values in (
            (str(streams), ".1f", {n: 1e3 * rate[n] for n in names}),
            ("regret", ".1%", {n: 1 - rate[n] / best_known for n in names}),
            ("over plain", ".3f", {n: rate[n] / rate["plain"] for n in names}),
            ("over better", ".3f", {n: rate[n] / better for n in names}),
        ):
            print(f"{title:>12} " + " ".join(f"{values[n]:>12{form}}" for n in names), flush=True)
        rows += [
            {"streams": streams, "temperature": args.temperature, "schedule": name,
             "tokens_per_s": round(1e3 * rate[name], 2), "regret": round(1 - rate[name] / best_known, 4),
             "over_plain": round(rate[name] / rate["plain"], 4), "over_better": round(rate[name] / better, 4)}
            for name in names
        ]  # fmt: skip
    if args.own:
        return write_csv(args.out, rows)
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
