"""One response from its first event to its last: a pure state machine whose transitions are the table below.

Inputs come from the session (begin, cancel) and the engine (tokens, finished); outputs are unnumbered events.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from dspark_stream.server import wire
from dspark_stream.server.plan import Plan, new_id
from dspark_stream.types import EngineEvent, ErrorInfo, FinishedEvent, GenerationRequest, TokensEvent, Usage


class State(enum.Enum):
    """Where a response is."""

    NEW = "new"  # nothing was said about it
    CREATED = "created"  # the client has its id; the engine has its prompt
    STREAMING = "streaming"  # the message and its text part are open
    ENDED = "ended"  # the terminal event was said


class Input(enum.Enum):
    """What can happen to a response."""

    BEGIN = "begin"
    PREPARED = "prepared"  # nothing was to be generated
    TOKENS = "tokens"
    STOP = "stop"
    LENGTH = "length"
    CANCEL = "cancel"
    FAIL = "fail"


class Say(enum.Enum):
    """What is said; each has one maker in `ResponseMachine`."""

    CREATED = "created"
    IN_PROGRESS = "in_progress"
    ITEM_ADDED = "item_added"
    PART_ADDED = "part_added"
    DELTA = "delta"
    TEXT_DONE = "text_done"
    PART_DONE = "part_done"
    ITEM_DONE = "item_done"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"


_BEGIN = (Say.CREATED, Say.IN_PROGRESS)
_OPEN = (Say.ITEM_ADDED, Say.PART_ADDED)
_SHUT = (Say.TEXT_DONE, Say.PART_DONE, Say.ITEM_DONE)

TRANSITIONS: dict[tuple[State, Input], tuple[tuple[Say, ...], State]] = {
    (State.NEW, Input.BEGIN): (_BEGIN, State.CREATED),
    (State.NEW, Input.CANCEL): ((*_BEGIN, Say.CANCELLED), State.ENDED),
    (State.CREATED, Input.PREPARED): ((Say.COMPLETED,), State.ENDED),
    (State.CREATED, Input.TOKENS): ((*_OPEN, Say.DELTA), State.STREAMING),
    (State.CREATED, Input.STOP): ((*_OPEN, *_SHUT, Say.COMPLETED), State.ENDED),
    (State.CREATED, Input.LENGTH): ((*_OPEN, *_SHUT, Say.INCOMPLETE), State.ENDED),
    (State.CREATED, Input.CANCEL): ((Say.CANCELLED,), State.ENDED),
    (State.CREATED, Input.FAIL): ((Say.FAILED,), State.ENDED),
    (State.STREAMING, Input.TOKENS): ((Say.DELTA,), State.STREAMING),
    (State.STREAMING, Input.STOP): ((*_SHUT, Say.COMPLETED), State.ENDED),
    (State.STREAMING, Input.LENGTH): ((*_SHUT, Say.INCOMPLETE), State.ENDED),
    (State.STREAMING, Input.CANCEL): ((*_SHUT, Say.CANCELLED), State.ENDED),
    (State.STREAMING, Input.FAIL): ((*_SHUT, Say.FAILED), State.ENDED),
}
"""A pair that is not here cannot happen: `ResponseMachine` raises, and says nothing. ``ENDED`` has no way out."""

_FINISH: dict[str, Input] = {
    "stop": Input.STOP,
    "length": Input.LENGTH,
    "cancelled": Input.CANCEL,
    "failed": Input.FAIL,
}

Event = wire.NumberedEvent | wire.Step


class IllegalTransitionError(RuntimeError):
    """An input that the response's state does not allow: a bug on our side of the socket."""


class ResponseMachine:
    """The state of one response and the makers of its events."""

    def __init__(self, plan: Plan, *, lane: str | None = None, clock: Callable[[], float] = time.time) -> None:
        self.plan = plan
        self.state = State.NEW
        self.usage: Usage | None = None
        self.error: ErrorInfo | None = None
        self._clock = clock
        self.created_at = round(clock(), 3)
        self._stream_id: str | UnsetType = UNSET if lane is None else lane
        self._item_id = new_id("msg")
        self._texts: list[str] = []
        self._delta = ""
        self._taken: GenerationRequest | None = None
        self._tokens = 0
        self._item_status: Literal["completed", "incomplete"] = "incomplete"

    @property
    def response_id(self) -> str:
        """Also the engine's ``request_id``."""
        return self.plan.response_id

    @property
    def ended(self) -> bool:
        """Whether the terminal event was said."""
        return self.state is State.ENDED

    @property
    def text(self) -> str:
        """Everything said so far."""
        return "".join(self._texts)

    @property
    def warnings(self) -> list[str]:
        """In what the engine's request differs from what the client wrote."""
        return self.plan.warnings(self._taken.sampling) if self._taken is not None else []

    def begin(self, taken: GenerationRequest | None = None) -> list[Event]:
        """The engine has ``taken`` the request; None: it does not need to."""
        self._taken = taken
        return self._advance(Input.BEGIN)

    def cancel(self) -> list[Event]:
        """End it although the engine never had it."""
        return self._advance(Input.CANCEL)

    def fail(self, error: ErrorInfo) -> list[Event]:
        """End it, also after `receive` has raised and in whatever state that left it."""
        self.error, self.usage = error, Usage(input_tokens=0, output_tokens=0)
        try:
            return self._advance(Input.FAIL)
        except Exception:
            self.state, self._item_status = State.ENDED, "incomplete"
            return [self._make_for(Say.FAILED)]

    def receive(self, event: EngineEvent) -> list[Event]:
        """Turn one event of the engine into what the client is told."""
        if isinstance(event, FinishedEvent):
            self.usage, self.error = event.usage, event.error
            return self._advance(_FINISH[event.reason] if self.plan.generate else Input.PREPARED)
        self._delta = event.text
        self._tokens += len(event.token_ids)
        if event.text:
            self._texts.append(event.text)
        said = self._advance(Input.TOKENS)
        if self.plan.steps and event.round is not None:
            said.append(self._step(event))
        return said

    def _advance(self, what: Input) -> list[Event]:
        try:
            says, after = TRANSITIONS[self.state, what]
        except KeyError:
            raise IllegalTransitionError(f"{what} in {self.state} ({self.response_id})") from None
        self._item_status = "completed" if what is Input.STOP else "incomplete"
        self.state = after
        said: list[Event] = []
        for say in says:
            if say is Say.DELTA and not self._delta:
                continue  # half a character, or what may yet be a stop string, is being held back
            said.append(self._make_for(say))
        return said

    def _make_for(self, say: Say) -> wire.NumberedEvent:
        event = self._make(say)
        event.stream_id = self._stream_id
        return event

    def _make(self, say: Say) -> wire.NumberedEvent:
        match say:
            case Say.CREATED:
                return wire.Created(response=self.snapshot("in_progress"))
            case Say.IN_PROGRESS:
                return wire.InProgress(response=self.snapshot("in_progress"))
            case Say.ITEM_ADDED:
                return wire.OutputItemAdded(
                    output_index=0, item=wire.OutputMessage(id=self._item_id, status="in_progress")
                )
            case Say.PART_ADDED:
                return wire.ContentPartAdded(item_id=self._item_id, part=wire.OutputTextPart(text=""))
            case Say.DELTA:
                usage = wire.usage_so_far(self.input_tokens, self._tokens) if self.plan.continuous_usage else UNSET
                return wire.TextDelta(item_id=self._item_id, delta=self._delta, usage=usage)
            case Say.TEXT_DONE:
                return wire.TextDone(item_id=self._item_id, text=self._whole_text())
            case Say.PART_DONE:
                return wire.ContentPartDone(item_id=self._item_id, part=wire.OutputTextPart(text=self._whole_text()))
            case Say.ITEM_DONE:
                return wire.OutputItemDone(output_index=0, item=self._item())
            case Say.COMPLETED:
                return wire.Completed(response=self.snapshot("completed"))
            case Say.INCOMPLETE:
                return wire.Incomplete(response=self.snapshot("incomplete"))
            case Say.FAILED:
                return wire.Failed(response=self.snapshot("failed"))
            case Say.CANCELLED:
                return wire.Cancelled(response=self.snapshot("cancelled"))

    @property
    def input_tokens(self) -> int:
        """Of the prompt, once the engine has it."""
        return len(self._taken.prompt_ids) if self._taken is not None else 0

    def _whole_text(self) -> str:
        # Joined once: the done events and the terminal one share the string.
        if len(self._texts) != 1:
            self._texts = [self.text]
        return self._texts[0]

    def _item(self) -> wire.OutputMessage:
        part = wire.OutputTextPart(text=self._whole_text())
        return wire.OutputMessage(id=self._item_id, status=self._item_status, content=[part])

    def snapshot(
        self, status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    ) -> wire.ResponseObject:
        """The response object as it is now."""
        plan, usage, taken = self.plan, self.usage, self._taken
        limit = plan.max_output_tokens
        ended = status != "in_progress"
        # A response that ended before its message began has none.
        has_item = ended and plan.generate and bool(self._texts or status in ("completed", "incomplete"))
        return wire.ResponseObject(
            id=plan.response_id,
            created_at=self.created_at,
            completed_at=round(self._clock(), 3) if status == "completed" else None,
            status=status,
            model=plan.model,
            system_fingerprint=plan.fingerprint,
            output=[self._item()] if has_item else [],
            instructions=plan.instructions,
            max_output_tokens=limit if limit is None or taken is None else taken.sampling.max_tokens,
            metadata=plan.metadata,
            previous_response_id=plan.previous_response_id,
            temperature=plan.temperature,
            top_p=plan.top_p,
            store=plan.store,
            dspark=self._stats(),
            error=wire.response_error(self.error) if self.error is not None else None,
            incomplete_details=wire.IncompleteDetails() if status == "incomplete" else None,
            usage=wire.response_usage(usage) if usage is not None else None,
        )

    def used(self) -> wire.DsparkStats:
        """What the answer was, or is, made with."""
        plan, taken = self.plan, self._taken
        return wire.DsparkStats(
            mode=plan.mode,
            verification=plan.verification,
            seed=plan.seed,
            max_tokens=taken.sampling.max_tokens if taken is not None else UNSET,
            warnings=self.warnings or UNSET,
        )

    def _stats(self) -> wire.DsparkStats:
        stats, usage = self.used(), self.usage
        if usage is None or not self.plan.generate:
            return stats
        return msgspec.structs.replace(
            stats,
            rounds=usage.rounds,
            drafted=usage.drafted,
            scheduled=usage.scheduled,
            accepted=usage.accepted,
            accepted_per_position=usage.accepted_per_position,
            accepted_length=usage.accepted_length,
            queue_ms=usage.queue_ms,
            prefill_ms=usage.prefill_ms,
            decode_ms=usage.decode_ms,
        )

    def _step(self, event: TokensEvent) -> wire.Step:
        record = event.round
        assert record is not None  # asked by the caller
        return wire.Step(
            response_id=self.response_id,
            stream_id=self._stream_id,
            start=record.start,
            drafted=len(record.draft_tokens),
            scheduled=record.scheduled,
            accepted=record.accepted,
            bonus=record.bonus,
            source=record.source,
            confidence=record.confidence,
            survival=record.survival,
            text=event.text,
            pieces=[(piece.text, piece.drafted) for piece in event.pieces],
            t_draft_ms=record.t_draft_ms,
            t_verify_ms=record.t_verify_ms,
            batch_tokens=record.batch_tokens,
            streams=record.streams,
        )
