"""One engine step: draft → schedule → verify → accept → commit, for all streams as one ragged batch.

This file is the algorithm's table of contents; its words are in ARCHITECTURE.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import accumulate
from math import inf

import torch

from dspark_stream.decoding.accept import Outcome, accept
from dspark_stream.decoding.draft import Block, acceptance_of, draft, is_greedy
from dspark_stream.decoding.lookup import Found
from dspark_stream.decoding.survival import prefix_survival
from dspark_stream.decoding.verify import verify
from dspark_stream.engine.backlog import ROOM, hand_over, room
from dspark_stream.engine.parts import Committed, Models, commit
from dspark_stream.engine.stream import Stream
from dspark_stream.load.acceptance import Past
from dspark_stream.load.controller import Plan
from dspark_stream.load.costs import Shape
from dspark_stream.load.curve import Company
from dspark_stream.load.repeats import confidence
from dspark_stream.load.schedule import Candidate
from dspark_stream.models.protocols import Rows
from dspark_stream.types import RoundRecord

HANDED_A_ROUND = 512
"""Positions whose context features a round hands over for want of room; the rest waits for the next round."""


def decode_round(models: Models, streams: Sequence[Stream], slowest_ms: float = inf) -> list[Committed]:
    """One verification round for R streams; streams that are not drafted for take part with ℓ = 0.

    ``slowest_ms``: what the round may take, as far as the choice is ours: with nothing drafted it takes what it takes.
    """
    if models.rounds is not None:
        return models.rounds.decode_round(streams, slowest_ms)
    models.late_ms = 0.0
    clock = [time.perf_counter()]
    company = company_of(streams)
    plan = _plan(models, streams, company, slowest_ms)
    clock.append(time.perf_counter())
    found = _look_up(models, streams, plan)
    blocks, plan = _draft(models, streams, plan, found)
    clock.append(time.perf_counter())
    lengths = _schedule(models, streams, plan, blocks, company, slowest_ms)
    # what was looked up and is not worth verifying cost nothing and is no draft
    blocks = [b if n or b.source == "model" else Block() for b, n in zip(blocks, lengths, strict=True)]
    clock.append(time.perf_counter())
    output = verify(models.target, models.target_kv, streams, blocks, lengths)
    outcomes = accept(output, streams, blocks, lengths, models.drafter.draft_ids if models.drafter else None)
    clock.append(time.perf_counter())
    committed = _commit(models, streams, blocks, lengths, outcomes, output.taps, clock, slowest_ms < inf)
    round_ms = 1e3 * (time.perf_counter() - clock[0]) - models.late_ms
    shape = Shape(company, *plan.size, len(streams) + sum(lengths))
    _learn(models, streams, found, blocks, lengths, outcomes, shape, round_ms)
    return committed


def company_of(streams: Sequence[Stream]) -> Company:
    """What the cost of a round of these streams hangs on."""
    count = len(streams)
    drawn = sum(not is_greedy(s) for s in streams)
    return Company(count, sum([s.position for s in streams]) / count, drawn / count)


def _plan(models: Models, streams: Sequence[Stream], company: Company, slowest_ms: float) -> Plan:
    """Who is drafted for, from the past alone: everybody under a static schedule, else whoever it pays for."""
    slots = models.schedule.slots(models.gamma)
    if slots is None:
        plan = models.controller.plan([s.past for s in streams], company, looks=slowest_ms == inf)
    else:
        plan = Plan([s.drafts and slots > 0 for s in streams], slots, 0.0)
    if not any(plan.drafting) or slowest_ms == inf:
        return plan
    costs = models.controller.costs
    owed = sum(s.backlog.count for s, drafts in zip(streams, plan.drafting, strict=True) if drafts)
    ms = costs.round_cost(company, *plan.size).ms[0] + 1e-3 * costs.curve.feature_us * owed
    # where drafting alone would take too long, with nothing verified, nobody is drafted for
    if costs.pace * ms <= slowest_ms:
        return plan
    nobody = [False] * len(streams)
    return plan._replace(drafting=nobody, promised=[0.0] * len(streams) if plan.promised else ())


def _look_up(models: Models, streams: Sequence[Stream], plan: Plan) -> list[Found | None]:
    """What every stream's own text went on with before."""
    if not models.schedule.looks_up:
        return [None] * len(streams)
    return [s.look_up() for s in streams]


def _draft(
    models: Models, streams: Sequence[Stream], plan: Plan, found: Sequence[Found | None]
) -> tuple[list[Block], Plan]:
    """A block for every stream that drafts or has looked one up that promises more; an empty one for the others.

    Also the plan, less those that need not be drafted for.
    """
    blocks = [Block()] * len(streams)
    for r, (stream, own) in enumerate(zip(streams, found, strict=True)):
        if own is None or not plan.promised:
            continue
        sure = confidence(stream.repeats, models.controller.acceptance.repeats, own)
        block = Block(own.tokens, sure, prefix_survival(sure), source="lookup")
        if sum(block.survival) >= plan.promised[r]:
            blocks[r] = block
    plan = plan._replace(drafting=[d and not b.tokens for d, b in zip(plan.drafting, blocks, strict=True)])
    drafting = [s for s, drafts in zip(streams, plan.drafting, strict=True) if drafts]
    if not drafting or models.drafter is None or models.drafter_kv is None:
        return blocks, plan
    owed = [s.backlog.count for s in drafting]
    begun = time.perf_counter()
    _hand_over(models, drafting)
    late = sum(max(0, count - 1 - models.gamma) for count in owed)  # more than the last round can have left
    models.late_ms += (time.perf_counter() - begun) * 1e3 * late / max(1, sum(owed))
    drafted = iter(draft(models.drafter, models.drafter_kv, drafting, models.calibration, models.history, plan.slots))
    return [next(drafted) if drafts else block for drafts, block in zip(plan.drafting, blocks, strict=True)], plan


def _schedule(
    models: Models,
    streams: Sequence[Stream],
    plan: Plan,
    blocks: Sequence[Block],
    company: Company,
    slowest_ms: float,
) -> list[int]:
    """ℓ of every stream, by prefix survival and what a round of this company costs."""
    looked_up = sum(len(b.tokens) for b in blocks if b.source == "lookup")
    if not any(plan.drafting) and not looked_up:
        return [0] * len(streams)
    controller = models.controller
    cost = controller.costs.round_cost(company, *plan.size, looked_up).within(
        (slowest_ms - models.late_ms) / controller.costs.pace
    )
    static = models.schedule.slots(models.gamma) is not None  # goes by promises as they are
    candidates = []
    same: dict[int, Past] = {}  # streams that draw the same x_1 have to be judged alike, or one decides about the other
    for stream, block in zip(streams, blocks, strict=True):
        if block.source == "lookup":  # a function of the past, so whatever is made of it is exact
            candidates.append(Candidate(block.survival, exact=True))
            continue
        if stream.past is None:
            candidates.append(Candidate(()))
            continue
        judged_by = same.setdefault(stream.round_key, stream.past)
        survival = block.survival if static else controller.acceptance.corrected(judged_by, block.survival)
        candidates.append(Candidate(survival, acceptance_of(stream) != "rejection", stream.past.survivals[0]))
    return models.schedule.lengths(candidates, cost, plan.price)


def _learn(
    models: Models,
    streams: Sequence[Stream],
    found: Sequence[Found | None],
    blocks: Sequence[Block],
    lengths: Sequence[int],
    outcomes: Sequence[Outcome],
    shape: Shape,
    round_ms: float,
) -> None:
    """What this round took and what its drafts were worth goes into the decisions of later ones."""
    survivals = [b.survival if b.source == "model" else () for b in blocks]
    accepted = [o.accepted for o in outcomes]
    models.controller.learn([s.past for s in streams], survivals, lengths, accepted, shape, round_ms)
    for stream, own, block, length, outcome in zip(streams, found, blocks, lengths, outcomes, strict=True):
        if block.tokens and block.source == "model":
            models.history.record(length, outcome.accepted)
        if own is not None:
            for repeats in (stream.repeats, models.controller.acceptance.repeats):
                repeats.learn(own, [*block.tokens[: outcome.accepted], outcome.bonus])


def _commit(
    models: Models,
    streams: Sequence[Stream],
    blocks: Sequence[Block],
    lengths: Sequence[int],
    outcomes: Sequence[Outcome],
    taps: torch.Tensor,
    clock: Sequence[float],
    bounded: bool,
) -> list[Committed]:
    """Accepted tokens and the bonus token leave for the client; context features of what stands are kept."""
    *first_rows, batch_tokens = [0, *accumulate(1 + length for length in lengths)]
    _keep_context(models, streams, first_rows, blocks, outcomes, taps, bounded)
    committed = []
    for stream, block, length, (accepted, bonus) in zip(streams, blocks, lengths, outcomes, strict=True):
        record = RoundRecord(
            start=stream.position,
            anchor=stream.anchor,
            draft_tokens=block.tokens,
            scheduled=length,
            accepted=accepted,
            bonus=bonus,
            confidence=block.confidence,
            survival=block.survival,
            source=block.source,
            t_draft_ms=(clock[2] - clock[1]) * 1e3,
            t_verify_ms=(clock[4] - clock[3]) * 1e3,
            batch_tokens=batch_tokens,
            streams=len(streams),
        )
        stream.count_round(len(block.tokens), length, accepted)
        committed.append(commit(stream, [*block.tokens[:accepted], bonus], accepted, record))
    return committed


def _keep_context(
    models: Models,
    streams: Sequence[Stream],
    first_rows: Sequence[int],
    blocks: Sequence[Block],
    outcomes: Sequence[Outcome],
    taps: torch.Tensor,
    bounded: bool,
) -> None:
    """Context features of the anchor and the accepted tokens, for when the stream is next drafted for.

    Nothing else is kept. The target's keys and values of rejected rows need no clearing: the next round writes over
    them before anything reads them.
    """
    if models.drafter is None or models.drafter_kv is None:
        return
    kept = [
        (s, row, 1 + o.accepted, bool(b.tokens) and b.source == "model")
        for s, row, o, b in zip(streams, first_rows, outcomes, blocks, strict=True)
        if s.drafts
    ]
    # two copies, since a runner may write its next pass's taps over these: what is soon handed over, and what waits
    for soon in (True, False):
        mine = [(s, row, count) for s, row, count, drafted in kept if drafted is soon]
        wanted = sum(count for _, _, count in mine)
        if not mine:
            continue
        whole = wanted == len(taps) or (
            soon and 2 * wanted >= len(taps)
        )  # quicker; what is too much goes with the rest
        rows = [] if whole else [r for _, row, count in mine for r in range(row, row + count)]
        copy = taps.clone() if whole else taps[rows]
        at = 0
        for stream, row, count in mine:
            _owe(models, stream, copy, row if whole else at, count, stream.position)
            at += count
    most = ROOM if bounded else room(len(streams), taps)  # where rounds are, nobody should have much to catch up with
    begun = time.perf_counter()
    _hand_over(models, [s for s, _, _, _ in kept if s.backlog.count > most], HANDED_A_ROUND)
    models.late_ms += (time.perf_counter() - begun) * 1e3


def _keep_prompt(
    models: Models, taps: torch.Tensor, chunks: Sequence[tuple[Stream, int, int, int]], company: Sequence[Stream]
) -> None:
    """The same of prompts: (stream, first row, first position, count)."""
    if models.drafter is None or not any(stream.drafts for stream, _, _, _ in chunks):
        return
    copy = taps.clone()
    for stream, row, start, count in chunks:
        if stream.drafts:
            _owe(models, stream, copy, row, count, start)
    bounded = any(s.max_chunk_gap_ms < inf for s in company)
    most = 0 if models.rounds is not None else ROOM if bounded else room(len(company), taps)
    _hand_over(models, [stream for stream, _, _, _ in chunks if stream.backlog.count > most])


def _owe(models: Models, stream: Stream, taps: torch.Tensor, row: int, count: int, position: int) -> None:
    """Keep rows of ``taps`` for when the stream is drafted for."""
    stream.backlog.add(taps, row, count, position, models.drafter.context_window if models.drafter else 0)
    if stream.past is not None:
        stream.past.owed = stream.backlog.count


def _hand_over(models: Models, streams: Sequence[Stream], most: int = sys.maxsize) -> None:
    """Give the drafter what these streams' backlogs keep, at most so many positions."""
    if models.drafter is None or models.drafter_kv is None:
        return
    hand_over([(s.extent, s.backlog) for s in streams], models.drafter, models.drafter_kv, most)
    for stream in streams:
        if stream.past is not None:
            stream.past.owed = stream.backlog.count


def set_aside(models: Models, stream: Stream) -> None:
    """The stream is held: what it keeps would take the room of others for who knows how long."""
    _hand_over(models, [stream])


def prefill(models: Models, shares: Sequence[tuple[Stream, int]], company: Sequence[Stream]) -> list[Committed]:
    """Prompt tokens of these streams, so many of each, as one ragged pass; who completes gets its first token.

    ``company``: all streams that have slots, these among them.

    That token is an ordinary acceptance with ℓ = 0 whose anchor is the last prompt token.
    """
    batch: list[Rows] = []
    chunks: list[tuple[Stream, int, int, int]] = []
    completed: list[tuple[Stream, int]] = []
    row = 0
    for stream, count in shares:
        ids = stream.request.prompt_ids[stream.prefilled : stream.prefilled + count]
        batch.append(Rows(stream.extent, stream.prefilled, list(ids)))
        chunks.append((stream, row, stream.prefilled, len(ids)))
        row += len(ids)
        if stream.prefilled + len(ids) == len(stream.request.prompt_ids):
            completed.append((stream, row - 1))
    output = models.target.forward(batch, models.target_kv, [last for _, last in completed])
    _keep_prompt(models, output.taps, chunks, company)
    for stream, _, _, count in chunks:
        stream.read(count)
    if not completed:
        return []
    started = [stream for stream, _ in completed]
    outcomes = accept(output, started, [Block()] * len(started), [0] * len(started), None)
    committed = []
    for stream, outcome in zip(started, outcomes, strict=True):
        stream.started()
        committed.append(commit(stream, [outcome.bonus], 0, None))
    return committed
