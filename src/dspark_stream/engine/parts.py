"""What a step works with, and what it does for a stream; and rounds that are run another way."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.lookup import LONGEST
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.engine.stream import Stream
from dspark_stream.errors import NoTokenError
from dspark_stream.load.controller import Controller
from dspark_stream.load.curve import CapacityCurve
from dspark_stream.load.schedule import Schedule
from dspark_stream.models.protocols import Drafter, Store, Target
from dspark_stream.types import FinishReason, RoundRecord, TokensEvent

log = logging.getLogger(__name__)


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


def commit(stream: Stream, tokens: list[int], accepted: int, record: RoundRecord | None) -> Committed:
    """`Stream.commit`; what goes wrong there is the stream's own affair.

    So is a last token that is none (-1): what was accepted before it stands, and ends the stream if it would anyway.
    """
    if tokens[-1] < 0:
        return _without_bonus(stream, tokens[:-1])
    try:
        event, reason = stream.commit(tokens, accepted, record)
    except Exception as error:
        log.exception("tokens could not be committed; their stream ends")
        return Committed(stream, None, "failed", record, error)
    return Committed(stream, event, reason, record)


def _without_bonus(stream: Stream, tokens: list[int]) -> Committed:
    done = commit(stream, tokens, len(tokens), None) if tokens else Committed(stream, None, None, None)
    if done.reason is not None:
        return done
    error = NoTokenError(
        f"the model has no next token after {stream.output_tokens} of its own: no score that is a finite number is "
        "left to choose from"
    )
    log.error("request %s: %s", stream.request.request_id, error)
    return done._replace(reason="failed", error=error)


class Rounds(Protocol):
    """Rounds that are run as a whole (engine/gpu)."""

    def decode_round(self, streams: Sequence[Stream], slowest_ms: float) -> list[Committed]:
        """See `engine.step.decode_round`."""

    def plain_ms(self, count: int) -> float:
        """What a round of so many streams takes with nothing drafted; 0 where nothing was measured."""

    def forget(self) -> None:
        """Something failed: whatever is under way is read by nobody."""


@dataclass
class Models:
    """What a step works with; made once (build.py)."""

    target: Target
    target_kv: Store
    drafter: Drafter | None
    drafter_kv: Store | None
    calibration: Calibration
    history: AcceptanceHistory
    schedule: Schedule
    capacity: CapacityCurve
    """As measured; the controller's cost table follows what rounds take."""
    rounds: Rounds | None = None
    """Captured rounds, on a GPU; they take the place of `decode_round`'s own steps."""

    lookup: bool = True
    """Whether drafts may be looked up in streams' own texts."""

    late_ms: float = 0.0
    """Of this round's time, what was spent on context features of earlier ones."""

    def __post_init__(self) -> None:
        self.controller = Controller(self.gamma, self.capacity)

    @property
    def gamma(self) -> int:
        """Draft block size; 0 without a drafter."""
        return self.drafter.gamma if self.drafter else 0

    @property
    def looks_up(self) -> bool:
        """Whether drafts are looked up at all; captured rounds know the drafter alone."""
        return self.lookup and self.rounds is None

    @property
    def widest(self) -> int:
        """Draft tokens of a stream and round at most."""
        return max(self.gamma, LONGEST if self.looks_up else 0)
