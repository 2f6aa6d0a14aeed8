"""What rounds are: asked for by the worker, run in one of two ways, and settled in one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dspark_stream.decoding.accept import Outcome
from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.draft import Block
from dspark_stream.decoding.schedule import Schedule
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.engine.context import Context
from dspark_stream.engine.stream import Stream
from dspark_stream.errors import NoTokenError
from dspark_stream.load.controller import Controller
from dspark_stream.load.costs import CapacityCurve, Company
from dspark_stream.models.protocols import Drafter, Store, Target
from dspark_stream.types import FinishReason, RoundRecord, TokensEvent

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """What rounds compute with, and what is learnt from them; made once (build.py)."""

    target: Target
    target_kv: Store
    drafter: Drafter | None
    drafter_kv: Store | None
    calibration: Calibration
    history: AcceptanceHistory
    capacity: CapacityCurve
    """As measured, of passes that run operation by operation."""
    controller: Controller

    @property
    def gamma(self) -> int:
        """Draft block size; 0 without a drafter."""
        return self.drafter.gamma if self.drafter else 0


class Committed(NamedTuple):
    """What a step did for one stream."""

    stream: Stream
    event: TokensEvent | None
    """None where it failed before any token."""
    reason: FinishReason | None
    """Why the stream ends here; None while it goes on."""
    round: RoundRecord | None
    """None for the token that ends a prefill."""
    error: Exception | None = None
    """Why it failed, alone of its batch."""


class RoundCounters(NamedTuple):
    """What rounds tell of themselves."""

    looks: int
    """Times that rounds were run another way than the best one, to learn."""
    pace: float
    """How many times as long they take as was measured."""


class Rounds(Protocol):
    """All that the worker asks of rounds: operation by operation (eager.py), or captured (captured/)."""

    models: Models
    context: Context
    schedule: Schedule
    """What the next rounds go by."""

    @property
    def looks_up(self) -> bool:
        """Whether drafts may be looked up in streams' own texts."""

    def decode(self, streams: Sequence[Stream], slowest_ms: float) -> list[Committed]:
        """One round of these streams; what it did may be told one round later.

        ``slowest_ms``: what it may take, as far as the choice is ours: with nothing drafted it takes what it takes.
        """

    def prefill(self, shares: Sequence[tuple[Stream, int]], company: Sequence[Stream]) -> list[Committed]:
        """See `prompts.prefill`."""

    def prompt_ms(self, tokens: Sequence[int], position: int) -> list[float]:
        """What passes over so many tokens of one prompt take at present, that far into it."""

    def rest(self) -> None:
        """Nobody decodes for a while: no time that passes meanwhile is a round's."""

    def forget(self) -> None:
        """Something failed: whatever is under way is read by nobody."""

    def counters(self) -> RoundCounters:
        """Now; any thread."""


def company_of(streams: Sequence[Stream]) -> Company:
    """What the cost of a round of these streams hangs on; positions to 32, so that costs are found again."""
    position = sum([s.position for s in streams]) / len(streams)
    return Company(len(streams), 32.0 * round(position / 32))


# --- what every round ends with ------------------------------------------------------------------------------


class Timings(NamedTuple):
    """What parts of a round took."""

    draft_ms: float
    verify_ms: float
    """Judging included; of a round that is not timed in parts, all of it."""


class Judged(NamedTuple):
    """One stream's part of a round."""

    stream: Stream
    block: Block
    length: int
    """ℓ."""
    outcome: Outcome


def settle(
    judged: Sequence[Judged], history: AcceptanceHistory, timings: Timings, *, batch_tokens: int, streams: int
) -> list[Committed]:
    """Accepted tokens and the bonus token leave for the client; records, counts and history say how it went.

    ``batch_tokens``, ``streams``: of the whole round, whoever of it has ended since.
    """
    committed = []
    for stream, block, length, (accepted, bonus) in judged:
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
            t_draft_ms=timings.draft_ms,
            t_verify_ms=timings.verify_ms,
            batch_tokens=batch_tokens,
            streams=streams,
        )
        stream.count_round(len(block.tokens), length, accepted)
        if block.tokens and block.source == "model":
            history.record(length, accepted)
        committed.append(commit(stream, [*block.tokens[:accepted], bonus], accepted, record))
    return committed


def commit(stream: Stream, tokens: list[int], accepted: int, record: RoundRecord | None) -> Committed:
    """`Stream.commit`; what goes wrong there is the stream's own affair.

    So is a last token that is none (-1): what was accepted before it stands, and ends the stream if it would anyway.
    """
    if tokens[-1] < 0:
        return _without_bonus(stream, tokens[:-1], accepted, record)
    try:
        event, reason = stream.commit(tokens, accepted, record)
    except Exception as error:
        log.exception("tokens could not be committed; their stream ends")
        return Committed(stream, None, "failed", record, error)
    return Committed(stream, event, reason, record)


def _without_bonus(stream: Stream, tokens: list[int], accepted: int, record: RoundRecord | None) -> Committed:
    done = commit(stream, tokens, accepted, record) if tokens else Committed(stream, None, None, record)
    if done.reason is not None:
        return done
    error = NoTokenError(
        f"the model has no next token after {stream.output_tokens} of its own: everything is ruled out, or a "
        "score is no finite number"
    )
    log.error("the model gave a stream no next token: is its file damaged, or everything ruled out?")
    return done._replace(reason="failed", error=error)
