"""One engine step: draft → schedule → verify → accept → commit, for all streams as one ragged batch.

This file is the algorithm's table of contents; the words are design/algorithm.md's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from dspark_stream.engine.stream import Stream
from dspark_stream.models.cache import KVStore
from dspark_stream.models.drafter import Drafter
from dspark_stream.models.target import Rows, Target
from dspark_stream.spec.accept import Outcome, accept
from dspark_stream.spec.calibration import Calibration
from dspark_stream.spec.capacity import CapacityCurve
from dspark_stream.spec.draft import Block, draft
from dspark_stream.spec.schedule import Schedule
from dspark_stream.spec.survival import AcceptanceHistory
from dspark_stream.spec.verify import verify
from dspark_stream.types import FinishReason, RoundRecord, TokensEvent

if TYPE_CHECKING:
    from dspark_stream.engine.gpu.runner import GraphRounds


@dataclass
class Models:
    """What a step works with; made once (build.py)."""

    target: Target
    target_kv: KVStore
    drafter: Drafter | None
    drafter_kv: KVStore | None
    calibration: Calibration
    history: AcceptanceHistory
    schedule: Schedule
    capacity: CapacityCurve
    rounds: GraphRounds | None = None
    """Captured rounds, on a GPU; they take the place of `decode_round`'s own steps."""

    @property
    def gamma(self) -> int:
        """Draft block size; 0 without a drafter."""
        return self.drafter.gamma if self.drafter else 0


class Committed(NamedTuple):
    """What a step did for one stream."""

    stream: Stream
    event: TokensEvent
    reason: FinishReason | None
    """Why the stream ends here; None while it goes on."""
    round: RoundRecord | None
    """None for the token that ends a prefill."""


def decode_round(models: Models, streams: Sequence[Stream]) -> list[Committed]:
    """One verification round for R streams; streams in plain mode take part with ℓ = 0."""
    if models.rounds is not None:
        return models.rounds.decode_round(streams)
    clock = [time.perf_counter()]
    blocks = _draft(models, streams)
    clock.append(time.perf_counter())
    lengths = _schedule(models, streams, blocks)
    logits, taps = verify(models.target, models.target_kv, streams, blocks, lengths)
    outcomes = accept(logits, streams, blocks, lengths, models.drafter.draft_ids if models.drafter else None)
    clock.append(time.perf_counter())
    return _commit(models, streams, blocks, lengths, outcomes, taps, clock)


def _draft(models: Models, streams: Sequence[Stream]) -> list[Block]:
    """A block for every stream; an empty one where it does not draft."""
    drafting = [s for s in streams if s.drafts]
    if not drafting or models.drafter is None or models.drafter_kv is None:
        return [Block() for _ in streams]
    drafted = iter(draft(models.drafter, models.drafter_kv, drafting, models.calibration, models.history))
    return [next(drafted) if s.drafts else Block() for s in streams]


def _schedule(models: Models, streams: Sequence[Stream], blocks: Sequence[Block]) -> list[int]:
    """ℓ of every stream, by prefix survival and what a round of this company costs."""
    drafting = sum(s.drafts for s in streams)
    return models.schedule.lengths(
        [block.survival for block in blocks], lambda tokens: models.capacity.sps(tokens, len(streams), drafting)
    )


def _commit(
    models: Models,
    streams: Sequence[Stream],
    blocks: Sequence[Block],
    lengths: Sequence[int],
    outcomes: Sequence[Outcome],
    taps: torch.Tensor,
    clock: Sequence[float],
) -> list[Committed]:
    """Accepted tokens and the bonus token leave for the client; context features of what stands are kept."""
    *first_rows, batch_tokens = [0, *accumulate(1 + length for length in lengths)]
    kept = [(s, row, s.position, 1 + o.accepted) for s, row, o in zip(streams, first_rows, outcomes, strict=True)]
    _keep_context(models, taps, kept)
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
            t_draft_ms=(clock[1] - clock[0]) * 1e3,
            t_verify_ms=(clock[2] - clock[1]) * 1e3,
            batch_tokens=batch_tokens,
            streams=len(streams),
        )
        stream.count_round(len(block.tokens), length, accepted)
        if block.tokens:
            models.history.record(length, accepted)
        event, reason = stream.commit([*block.tokens[:accepted], bonus], accepted, record)
        committed.append(Committed(stream, event, reason, record))
    return committed


def _keep_context(models: Models, taps: torch.Tensor, kept: Iterable[tuple[Stream, int, int, int]]) -> None:
    """Append context features of (stream, first row, first position, count): the anchor and the accepted tokens.

    Nothing else is kept. The target's keys and values of rejected rows need no clearing: the next round writes over
    them before anything reads them.
    """
    if models.drafter is None or models.drafter_kv is None:
        return
    rows: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for stream, row, start, count in kept:
        if stream.drafts:
            rows += range(row, row + count)
            positions += range(start, start + count)
            slots += range(stream.extent.slot + start, stream.extent.slot + start + count)
    if rows:
        models.drafter.append_context(taps[rows], positions, slots, models.drafter_kv)


def prefill(models: Models, streams: Sequence[Stream], budget: int) -> list[Committed]:
    """Up to ``budget`` prompt tokens, streams in order, as one ragged pass; who completes gets its first token.

    That token is an ordinary acceptance with ℓ = 0 whose anchor is the last prompt token.
    """
    batch: list[Rows] = []
    chunks: list[tuple[Stream, int, int, int]] = []
    completed: list[tuple[Stream, int]] = []
    row = 0
    for stream in streams:
        ids = stream.request.prompt_ids[stream.prefilled : stream.prefilled + budget - row]
        if not ids:
            break
        batch.append(Rows(stream.extent, stream.prefilled, list(ids)))
        chunks.append((stream, row, stream.prefilled, len(ids)))
        row += len(ids)
        if stream.prefilled + len(ids) == len(stream.request.prompt_ids):
            completed.append((stream, row - 1))
    logits, taps = models.target.forward(batch, models.target_kv, [last for _, last in completed])
    _keep_context(models, taps, chunks)
    for stream, _, _, count in chunks:
        stream.prefilled += count
    if not completed:
        return []
    started = [stream for stream, _ in completed]
    outcomes = accept(logits, started, [Block()] * len(started), [0] * len(started), None)
    committed = []
    for stream, outcome in zip(started, outcomes, strict=True):
        stream.started()
        event, reason = stream.commit([outcome.bonus], 0)
        committed.append(Committed(stream, event, reason, None))
    return committed
