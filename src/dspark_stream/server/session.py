"""One socket's state, without the socket: lanes, what runs in them, and what is to be said and done next.

Fed with decoded client events and with what became of the work it asked for; answers with `Outcome`s: events for the
client and commands for the shell. No I/O, no loop, no clock: tests drive it call by call.
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from dspark_stream.errors import (
    DsparkError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
)
from dspark_stream.server import wire
from dspark_stream.server.admission import Held
from dspark_stream.server.bodies import ClientEvent, ResponseCancel, ResponseCreate
from dspark_stream.server.lifecycle import ResponseMachine
from dspark_stream.server.plan import Plan
from dspark_stream.types import EngineEvent, GenerationRequest

log = logging.getLogger(__name__)

Lane = str | None
"""A ``stream_id``; None is the lane of events that name none."""


class SessionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of what one socket can make us hold."""

    max_lanes: int = 64
    max_lane_queue: int = 8
    max_responses: int = 128


class Start(msgspec.Struct, frozen=True):
    """Command: admit, tokenise, submit. Answer with `Session.started` or `Session.refused`."""

    plan: Plan
    memory: Held
    """Given back here, when the response ends."""


class Abandon(msgspec.Struct, frozen=True):
    """Command: give up what `Start` began; the response has already ended here. No answer."""

    response_id: str


class Cancel(msgspec.Struct, frozen=True):
    """Command: tell the engine. The answer is its `FinishedEvent`."""

    response_id: str


Command = Start | Abandon | Cancel


class Outcome(NamedTuple):
    """What one input led to. ``events`` are (whose response, event), in order."""

    events: list[tuple[str | None, wire.ServerEvent]]
    commands: list[Command]


class Phase(enum.Enum):
    """How far a response of this socket has come."""

    WAITING = "waiting"  # behind another one in its lane
    STARTING = "starting"  # the shell is admitting and tokenising
    RUNNING = "running"  # the engine has it


class _Work:
    def __init__(self, machine: ResponseMachine, lane: Lane, event_id: str | None, memory: Held) -> None:
        self.machine = machine
        self.lane = lane
        self.event_id = event_id
        self.memory = memory
        self.phase = Phase.WAITING
        self.unwanted = False
        """Cancelled while it waited."""


class Session:
    """The lanes of one socket. The head of a lane is starting or running; the rest waits.

    ``hold`` takes the memory of a response, which counts from here on to its end: what waits in a lane has a text too.
    """

    def __init__(
        self, limits: SessionLimits, plan: Callable[[ResponseCreate], Plan], hold: Callable[[Plan], Held]
    ) -> None:
        self._limits = limits
        self._plan = plan
        self._hold = hold
        self._lanes: dict[Lane, deque[_Work]] = {}
        self._works: dict[str, _Work] = {}
        self._out = Outcome([], [])

    @property
    def open_responses(self) -> int:
        """Responses that have not ended, waiting ones included."""
        return len(self._works)

    # --- inputs ---------------------------------------------------------------------------------------------

    def receive(self, event: ClientEvent) -> Outcome:
        """A decoded client event. Whatever is wrong with it becomes an error event; nothing is raised."""
        try:
            match event:
                case ResponseCreate():
                    self._create(event)
                case ResponseCancel():
                    self._cancel(event)
        except DsparkError as error:
            return self.refuse(error, event_id=event.event_id, stream_id=event.stream_id)
        return self._take()

    def refuse(self, error: DsparkError, *, event_id: object = None, stream_id: object = None) -> Outcome:
        """Something that is not even a client event."""
        self._say(None, wire.error_event(error, event_id=event_id, stream_id=stream_id))
        return self._take()

    def started(self, response_id: str, taken: GenerationRequest | None = None) -> Outcome:
        """The engine has it, as ``taken``; None: it does not need to."""
        work = self._works[response_id]
        work.phase = Phase.RUNNING
        self._tell(work, work.machine.begin(taken))
        return self._take()

    def refused(self, response_id: str, error: DsparkError) -> Outcome:
        """It could not be started; nothing was said about it yet, so an error event is its only one."""
        work = self._works[response_id]
        if work.phase is Phase.RUNNING:
            self._fail(work, error)
        else:
            self._say(None, wire.error_event(error, event_id=work.event_id, stream_id=work.lane))
        self._end(work)
        return self._take()

    def engine_event(self, event: EngineEvent) -> Outcome:
        """What the engine says about a running response; events of others are not for this socket."""
        work = self._works.get(event.request_id)
        if work is None:
            return self._take()
        try:
            self._tell(work, work.machine.receive(event))
        except Exception:
            log.exception("the answer %s cannot be gone on with", event.request_id)
            self._fail(work, InternalError("the server lost track of this response"))
        if work.machine.ended:
            self._end(work)
        return self._take()

    @property
    def waiting(self) -> list[str]:
        """Ids of the responses whose turn in their lanes has not come."""
        return [name for name, work in self._works.items() if work.phase is Phase.WAITING]

    def close(self) -> None:
        """The socket has gone: whatever is open holds no memory any more."""
        for work in self._works.values():
            work.memory.give()

    # --- what they lead to ---------------------------------------------------------------------------------

    def _create(self, event: ResponseCreate) -> None:
        lane = event.stream_id
        for name, value in (("stream_id", lane), ("event_id", event.event_id)):
            if value is not None and not 1 <= len(value) <= wire.MAX_ID_CHARS:
                raise InvalidRequestError(f"`{name}` must be 1 to {wire.MAX_ID_CHARS} characters long", param=name)
        machine = ResponseMachine(self._plan(event), lane=lane)
        queue = self._lanes.get(lane)
        limits = self._limits
        if len(self._works) >= limits.max_responses:
            raise RateLimitError(f"this socket already has {limits.max_responses} responses open")
        if queue is None and len(self._lanes) >= limits.max_lanes:
            raise RateLimitError(f"this socket already uses {limits.max_lanes} lanes", param="stream_id")
        if queue is not None and len(queue) > limits.max_lane_queue:
            raise RateLimitError(
                f"{limits.max_lane_queue} responses already wait in this lane; use another `stream_id`, or wait",
                param="stream_id",
            )
        work = _Work(machine, lane, event.event_id, self._hold(machine.plan))
        self._works[machine.response_id] = work
        if queue is None:
            self._lanes[lane] = deque([work])
            self._start(work)
        else:
            queue.append(work)

    def _cancel(self, event: ResponseCancel) -> None:
        if (event.response_id is None) == (event.stream_id is None):
            raise InvalidRequestError(
                "response.cancel needs `response_id` or `stream_id`, and only one of them", param="response_id"
            )
        if event.response_id is not None:
            work = self._works.get(event.response_id)
            if work is None:
                raise NotFoundError("no such response is open on this socket", param="response_id")
            self._cancel_work(work)
            return
        lane = self._lanes.get(event.stream_id)
        if not lane:
            raise NotFoundError("no response is open in this lane", param="stream_id")
        # The waiting ones first: ending the head would start the next.
        for work in reversed(list(lane)):
            self._cancel_work(work)

    def _cancel_work(self, work: _Work) -> None:
        match work.phase:
            case Phase.RUNNING:
                self._out.commands.append(Cancel(work.machine.response_id))
            case Phase.STARTING:
                self._out.commands.append(Abandon(work.machine.response_id))
                self._tell(work, work.machine.cancel())
                self._end(work)
            case Phase.WAITING:
                # Said when its turn comes: clients tell the responses of a lane apart by their order alone.
                work.unwanted = True

    def _fail(self, work: _Work, error: DsparkError) -> None:
        """A bug of ours must not leave the client waiting for an end that never comes."""
        self._out.commands.append(Cancel(work.machine.response_id))
        self._tell(work, work.machine.fail(wire.error_info(error)))

    def _start(self, work: _Work) -> None:
        work.phase = Phase.STARTING
        self._out.commands.append(Start(work.machine.plan, work.memory))

    def _end(self, work: _Work) -> None:
        """Take the head of a lane out and let the next one begin."""
        queue = self._lanes[work.lane]
        queue.popleft()
        self._forget(work)
        while queue and queue[0].unwanted:
            following = queue.popleft()
            self._forget(following)
            self._tell(following, following.machine.cancel())
        if queue:
            self._start(queue[0])
        else:
            del self._lanes[work.lane]

    def _forget(self, work: _Work) -> None:
        del self._works[work.machine.response_id]
        work.memory.give()

    def _tell(self, work: _Work, events: list[wire.NumberedEvent | wire.Step]) -> None:
        for event in events:
            self._say(work.machine.response_id, event)

    def _say(self, response_id: str | None, event: wire.ServerEvent) -> None:
        self._out.events.append((response_id, event))

    def _take(self) -> Outcome:
        out, self._out = self._out, Outcome([], [])
        return out
