"""The state machines of a socket without a socket: every order of client and engine events, chosen at random."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspark_stream.errors import InvalidRequestError
from dspark_stream.server import wire
from dspark_stream.server.admission import Admission, Held
from dspark_stream.server.bodies import DsparkOptions, ResponseCancel, ResponseCreate
from dspark_stream.server.lifecycle import TRANSITIONS, IllegalTransitionError, Input, ResponseMachine, State
from dspark_stream.server.outbox import Outbox
from dspark_stream.server.plan import Plan, Planner
from dspark_stream.server.session import Abandon, Cancel, Outcome, Session, SessionLimits, Start
from dspark_stream.types import EngineEvent, FinishedEvent, FinishReason, Piece, RoundRecord, TokensEvent, Usage
from fakes import model_info

LANES = st.sampled_from([None, "a", "b"])
SIZE = 1000
LIMITS = SessionLimits(max_lanes=2, max_lane_queue=2, max_responses=5)
ROUND = RoundRecord(
    start=1,
    anchor=2,
    draft_tokens=[3, 4],
    scheduled=2,
    accepted=1,
    bonus=5,
    confidence=[0.5, 0.5],
    survival=[0.5, 0.25],
    t_draft_ms=1.0,
    t_verify_ms=1.0,
    batch_tokens=3,
    streams=1,
)


def tokens(response_id: str, text: str) -> TokensEvent:
    return TokensEvent(request_id=response_id, token_ids=[1], text=text, pieces=[Piece(text, True)], round=ROUND)


def finished(response_id: str, reason: FinishReason) -> FinishedEvent:
    error = wire.error_info(InvalidRequestError("on purpose")) if reason == "failed" else None
    return FinishedEvent(
        request_id=response_id, reason=reason, usage=Usage(input_tokens=1, output_tokens=1), error=error
    )


class Socket(RuleBasedStateMachine):
    """A client, a shell and an engine that do anything they may do, in any order, with a reader of any speed."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(10, memory=10 * SIZE)
        self.session = Session(LIMITS, Planner(model_info()).response, self.hold)
        self.outbox = Outbox()
        self.starting: dict[str, str] = {}
        """What the shell was asked to start: response id -> the create's event id."""
        self.running: list[str] = []
        self.abandoned: set[str] = set()
        self.cancelling: set[str] = set()
        self.written: dict[str, list[wire.ServerEvent]] = defaultdict(list)
        self.errors: dict[str, int] = defaultdict(int)
        self.created: dict[str | None, list[str]] = defaultdict(list)
        """Numbers of the creates in each lane, in order."""
        self.begun: dict[str | None, list[str]] = defaultdict(list)
        self.numbers = 0

    def hold(self, plan: Plan) -> Held:
        held = self.admission.holding("me")
        held.grow(SIZE)
        return held

    # --- the shell ------------------------------------------------------------------------------------------

    def apply(self, outcome: Outcome) -> None:
        for response_id, event in outcome.events:
            if isinstance(event, wire.ErrorEvent):
                assert response_id is None
                if isinstance(event.event_id, str):
                    self.errors[event.event_id] += 1
            self.outbox.put(event, response_id)
        for command in outcome.commands:
            match command:
                case Start(plan=plan):
                    self.starting[plan.response_id] = plan.metadata["n"]
                case Abandon(response_id=response_id):
                    del self.starting[response_id]
                    self.abandoned.add(response_id)
                case Cancel(response_id=response_id):
                    assert response_id in self.running
                    self.cancelling.add(response_id)

    def write(self, count: int) -> None:
        for _ in range(count):
            event = self.outbox.pop()
            if event is None:
                return
            if isinstance(event, wire.ErrorEvent | wire.Hello):
                continue
            lane = None if event.stream_id is wire.UNSET else event.stream_id
            if isinstance(event, wire.Created):
                self.begun[lane].append(event.response.metadata["n"])
            number = self.begun[lane][-1]  # the lane's order is all that tells responses apart
            if not isinstance(event, wire.Step):
                self.written[number].append(event)

    # --- what may happen -------------------------------------------------------------------------------------

    @rule(lane=LANES, steps=st.booleans(), good=st.booleans())
    def create(self, lane: str | None, steps: bool, good: bool) -> None:
        self.numbers += 1
        number = str(self.numbers)
        event = ResponseCreate(
            input="x",
            metadata={"n": number},
            stream_id=lane,
            event_id=number,
            temperature=None if good else -1.0,
            dspark=DsparkOptions(steps=steps),
        )
        before = self.session.open_responses
        self.apply(self.session.receive(event))
        if self.session.open_responses > before:
            self.created[lane].append(number)
        else:
            assert self.errors[number] == 1

    @rule(lane=LANES)
    def cancel_lane(self, lane: str | None) -> None:
        self.apply(self.session.receive(ResponseCancel(stream_id=lane)))

    @rule(data=st.data())
    def cancel_one(self, data: st.DataObject) -> None:
        known = [*self.starting, *self.running, "resp_unknown"]
        self.apply(self.session.receive(ResponseCancel(response_id=data.draw(st.sampled_from(known)))))

    @precondition(lambda self: self.starting)
    @rule(data=st.data(), works=st.booleans())
    def start(self, data: st.DataObject, works: bool) -> None:
        response_id = data.draw(st.sampled_from(list(self.starting)))
        del self.starting[response_id]
        if works:
            self.running.append(response_id)
            self.apply(self.session.started(response_id))
        else:
            self.apply(self.session.refused(response_id, InvalidRequestError("no", param="input")))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), text=st.sampled_from(["", "ab", "é"]))
    def round(self, data: st.DataObject, text: str) -> None:
        response_id = data.draw(st.sampled_from(self.running))
        self.engine(tokens(response_id, text))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), reason=st.sampled_from(["stop", "length", "cancelled", "failed"]))
    def finish(self, data: st.DataObject, reason: FinishReason) -> None:
        response_id = data.draw(st.sampled_from(self.running))
        self.running.remove(response_id)
        self.cancelling.discard(response_id)
        self.engine(finished(response_id, reason))

    @rule()
    def stray(self) -> None:
        """The engine says something about a stream that this socket has given up."""
        for response_id in self.abandoned:
            outcome = self.session.engine_event(tokens(response_id, "late"))
            assert outcome == Outcome([], [])

    @rule(count=st.integers(1, 6))
    def read(self, count: int) -> None:
        self.write(count)

    def engine(self, event: EngineEvent) -> None:
        self.apply(self.session.engine_event(event))

    # --- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def one_running_in_each_lane(self) -> None:
        assert len(self.starting) + len(self.running) <= LIMITS.max_lanes
        assert self.session.open_responses <= LIMITS.max_responses

    @invariant()
    def what_is_open_is_counted(self) -> None:
        assert self.admission.bytes_held == SIZE * self.session.open_responses

    @invariant()
    def events_keep_the_rules(self) -> None:
        for events in self.written.values():
            assert [event.sequence_number for event in events] == list(range(len(events)))
            ends = [isinstance(event, wire.TerminalEvent) for event in events]
            assert not any(ends[:-1])

    def teardown(self) -> None:
        while self.starting or self.running:
            for response_id in list(self.starting):
                del self.starting[response_id]
                self.running.append(response_id)
                self.apply(self.session.started(response_id))
            for response_id in list(self.running):
                self.running.remove(response_id)
                reason: FinishReason = "cancelled" if response_id in self.cancelling else "stop"
                self.engine(finished(response_id, reason))
        self.write(10_000)
        assert self.session.open_responses == 0
        assert len(self.outbox) == 0
        assert self.outbox.pending_bytes == 0
        for lane, numbers in self.created.items():
            said = [number for number in numbers if number in self.written]
            assert self.begun[lane] == said  # first in, first out
            for number in numbers:
                events = self.written.get(number, [])
                ended = bool(events) and isinstance(events[-1], wire.TerminalEvent)
                assert ended != (self.errors[number] == 1)  # its own end, or an error instead of it
                texts = [event.delta for event in events if isinstance(event, wire.TextDelta)]
                done = [event.text for event in events if isinstance(event, wire.TextDone)]
                assert not done or done == ["".join(texts)]


TestSocket = Socket.TestCase
TestSocket.settings = settings(
    stateful_step_count=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def machine(**fields: object) -> ResponseMachine:
    return ResponseMachine(Planner(model_info()).response(ResponseCreate(input="x", **fields)))  # type: ignore[arg-type]


def test_the_table_ends_where_it_should() -> None:
    """Guards against a state that something can lead out of after the end, or an end without a terminal event."""
    terminal = {"completed", "incomplete", "failed", "cancelled"}
    for (state, _), (says, after) in TRANSITIONS.items():
        assert state is not State.ENDED
        assert [say.value in terminal for say in says].count(True) == (1 if after is State.ENDED else 0)
        if after is State.ENDED:
            assert says[-1].value in terminal


@pytest.mark.parametrize("state", [State.NEW, State.ENDED])
def test_what_cannot_happen_is_an_error_and_says_nothing(state: State) -> None:
    """Guards against a second end, or text before a beginning."""
    response = machine()
    if state is State.ENDED:
        response.cancel()
    with pytest.raises(IllegalTransitionError):
        response.receive(tokens(response.response_id, "x"))
    with pytest.raises(IllegalTransitionError):
        response.receive(finished(response.response_id, "stop"))
    assert response.state is state
    assert (State.ENDED, Input.CANCEL) not in TRANSITIONS


def test_a_bug_in_the_engine_still_ends_the_response() -> None:
    """Guards against a client that waits for ever because of an event that makes no sense."""
    session = Session(LIMITS, Planner(model_info()).response, lambda plan: Admission(9).holding("me"))
    (start,) = session.receive(ResponseCreate(input="x")).commands
    assert isinstance(start, Start)
    response_id = start.plan.response_id
    session.started(response_id)
    outcome = session.refused(response_id, InvalidRequestError("after it was started"))
    assert isinstance(outcome.events[-1][1], wire.Failed)
    assert outcome.commands == [Cancel(response_id)]
    assert session.open_responses == 0


# --- the outbox ----------------------------------------------------------------------------------------------------


def delta(text: str) -> wire.TextDelta:
    return wire.TextDelta(item_id="m", delta=text)


def test_waiting_deltas_are_merged_and_written_ones_are_not_touched() -> None:
    """Guards against text added to an event that was already written, or numbers with gaps after merging."""
    outbox = Outbox()
    outbox.put(delta("a"), "r1")
    first = outbox.pop()
    outbox.put(delta("b"), "r1")
    outbox.put(delta("x"), "r2")
    outbox.put(delta("c"), "r1")
    assert isinstance(first, wire.TextDelta)
    assert (first.delta, first.sequence_number) == ("a", 0)
    second, third = outbox.pop(), outbox.pop()
    assert isinstance(second, wire.TextDelta)
    assert isinstance(third, wire.TextDelta)
    assert (second.delta, second.sequence_number) == ("bc", 1)
    assert (third.delta, third.sequence_number) == ("x", 0)
    assert outbox.pop() is None
    assert outbox.pending_bytes == 0
    assert outbox.merged == 1


def test_deltas_are_not_merged_over_other_events() -> None:
    """Guards against text that moves to the other side of a step or of the end."""
    outbox = Outbox()
    outbox.put(delta("a"), "r")
    outbox.put(wire.TextDone(item_id="m", text="a"), "r")
    outbox.put(delta("b"), "r")
    assert len(outbox) == 3
