"""The engine's thread: admits streams, steps them, publishes events. Owns every token slot and every stream.

The loop's thread and this one share an inbox of commands and the event sink, nothing else.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import msgspec
import torch

from dspark_stream.decoding.lookup import LONGEST
from dspark_stream.decoding.schedule import parse_schedule
from dspark_stream.engine.boundary import EventSink
from dspark_stream.engine.pacing import SAFE, pace
from dspark_stream.engine.rounds import Committed, Rounds, company_of
from dspark_stream.engine.sharing import in_turn, shares
from dspark_stream.engine.stream import Phase, Stream
from dspark_stream.errors import (
    ContextLengthError,
    DrainingError,
    DsparkError,
    EngineFailedError,
    InternalError,
    InvalidRequestError,
    ShutdownError,
)
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.models.cache import ExtentAllocator
from dspark_stream.models.tokenizer import TokenBytes
from dspark_stream.types import (
    MAX_BIASES,
    RANGES,
    EngineEvent,
    EngineSnapshot,
    ErrorInfo,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    SamplingParams,
    Verification,
)

log = logging.getLogger(__name__)

ALONE_MS = 250.0
"""How long a pass over prompts may take while no stream is decoding: a prompt that comes meanwhile waits for it."""
PREFILL_LEAST = 16
"""Prompt tokens of a pass, whatever they take."""
MAX_FAILED_STEPS = 3
"""Steps in a row that may fail outside of any stream's pass: nobody's request can be at fault there."""
MOST_DOUBTS = 3
"""Times in a row that the engine may fail at what it asks itself: then it has failed."""
LOOK_AGAIN_S = 1.0
"""How long an answer to itself counts. After a failure it asks itself again then, whether or not anybody else asks."""
OWN_TOKENS = 4
"""What it asks itself: an answer of so many tokens, in each of `OWN_WAYS`."""
OWN_WAYS: tuple[tuple[float, Verification], ...] = ((0.0, "rejection"), (1.0, "rejection"), (1.0, "coupled"))
"""Temperatures and verifications: the greatest, and both ways to draw."""
JOIN_PATIENCE_S = 30.0
"""How long `close` waits for the step under way, past its deadline."""

GC_THRESHOLDS = (20_000, 20, 20)
"""With Python's own, a body of many small objects is looked through so often that it takes three times as long to
decode, and everybody waits meanwhile."""


@dataclass
class Counters:
    """Only grow; written by the engine's thread, read by anyone."""

    rounds: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    scheduled: int = 0
    accepted: int = 0
    per_position: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    skipped: int = 0
    late_chunks: int = 0


class EngineThread:
    """`boundary.Engine` on a thread of its own.

    Args:
        rounds: how streams are stepped, and with what.
        info: what is served and its limits; checked on submit.
        allocator: the token slots.
        text: what tokens stand for; None for token ids only.
        prefill_budget_ms: how long a prompt chunk may hold up the streams that are decoding.
        max_chunk_gap_ms: bound on the gap between chunks of streams that set none; 0 for none.
    """

    def __init__(
        self,
        rounds: Rounds,
        info: ModelInfo,
        allocator: ExtentAllocator,
        text: TokenBytes | None,
        *,
        prefill_budget_ms: float = 60.0,
        max_chunk_gap_ms: float = 0.0,
    ) -> None:
        self.info = info
        self._rounds, self._models = rounds, rounds.models
        self._allocator = allocator
        self._text = text
        self._prefill_budget_ms = prefill_budget_ms
        self._max_chunk_gap_ms = max_chunk_gap_ms
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}  # every stream that has not ended, oldest first
        self._placed: dict[str, Stream] = {}  # those of them that have a place: all that a step looks at
        self._waiting: dict[str, dict[str, Stream]] = {}  # the others by client, each client's oldest first
        self._known: dict[str, Stream] = {}  # between submit and terminal event, as callers see them
        self._lock = threading.Lock()  # guards _known, _closing and _failure, the only state that callers touch
        self._closing = False
        self._failure = ""
        self._failed_steps = 0  # since the last one that went well
        self._doubts = 0  # times in a row that `_works` said no
        self._next_look = float("inf")
        self._sound_until = 0.0
        self._deadline = float("inf")
        self._events: list[EngineEvent] = []  # of the step under way
        self._counters = Counters(per_position=[0] * max(self._models.gamma, LONGEST if rounds.looks_up else 0))
        self._beat = time.perf_counter()
        self._resting = True  # nothing to do but wait for commands
        self._thread = threading.Thread(target=self._run, name="dspark-engine", daemon=True)
        self._sink: EventSink = lambda events: None

    # --- the boundary: any thread ------------------------------------------------------------------------

    def start(self, sink: EventSink) -> None:
        """See `boundary.Engine`."""
        self._sink = sink
        self._beat = time.perf_counter()
        # what is there now lives as long as the engine: looking through it for garbage would hold up rounds for long
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """See `boundary.Engine`."""
        check_request(request, self.info)
        if request.sampling.stop and self._text is None:
            raise InvalidRequestError("stop strings need a tokenizer, and this model has none", param="stop")
        eos = () if request.sampling.ignore_eos else self._models.target.eos_token_ids
        stops = frozenset(eos) | frozenset(request.sampling.stop_token_ids)
        if not request.max_chunk_gap_ms:
            request = msgspec.structs.replace(request, max_chunk_gap_ms=self._max_chunk_gap_ms)
        target = self._models.target
        stream = Stream(
            request,
            target.vocab_size,
            self._models.gamma,
            stops,
            self._text,
            eos_ids=target.eos_token_ids,
            lookup=self._rounds.looks_up,
        )
        if stream.slots_needed > self._allocator.total:
            raise ContextLengthError(
                f"prompt and max_tokens need {stream.slots_needed} token slots; the server's kv_memory holds "
                f"{self._allocator.total}",
                param="max_tokens",
            )
        with self._lock:
            if self._failure:
                raise EngineFailedError(self._failure)
            if self._closing:
                raise DrainingError("the engine is shutting down")
            if request.request_id in self._known:
                raise InvalidRequestError(f"request id {request.request_id} is in use", param="request_id")
            self._known[request.request_id] = stream
            # under the lock: after `close` nothing may enter, or it would wait for a thread that has gone
            self._inbox.put(lambda: self._enter(stream))

    @property
    def capacity(self) -> CapacityCurve:
        """The capacity curve as it was measured."""
        return self._models.capacity

    def use_schedule(self, name: str) -> None:
        """Go by another schedule from the next round on (for measurements; any thread)."""
        schedule = parse_schedule(name)
        self._inbox.put(lambda: setattr(self._rounds, "schedule", schedule))

    def cancel(self, request_id: str) -> None:
        """See `boundary.Engine`."""
        self._inbox.put(lambda: self._cancel(request_id))

    def hold(self, request_id: str) -> None:
        """See `boundary.Engine`."""
        self._inbox.put(lambda: self._set_held(request_id, True))

    def release(self, request_id: str) -> None:
        """See `boundary.Engine`."""
        self._inbox.put(lambda: self._set_held(request_id, False))

    def snapshot(self) -> EngineSnapshot:
        """See `boundary.Engine`."""
        streams = list(self._placed.values())
        c, of_rounds = self._counters, self._rounds.counters()
        return EngineSnapshot(
            running=sum(s.phase in (Phase.PREFILL, Phase.DECODE) for s in streams),
            waiting=max(0, len(self._known) - len(streams)),
            held=sum(s.held for s in streams),
            kv_tokens_used=self._allocator.used,
            kv_tokens_total=self._allocator.total,
            rounds_total=c.rounds,
            num_drafts_total=c.drafts,
            num_draft_tokens_total=c.draft_tokens,
            num_scheduled_tokens_total=c.scheduled,
            num_accepted_tokens_total=c.accepted,
            num_accepted_tokens_per_pos=list(c.per_position),
            prompt_tokens_total=c.prompt_tokens,
            generation_tokens_total=c.generation_tokens,
            num_skipped_drafts_total=c.skipped,
            num_probes_total=of_rounds.looks,
            late_chunks_total=c.late_chunks,
            capacity_drift=of_rounds.pace,
            last_step_age_s=0.0 if self._resting else time.perf_counter() - self._beat,
            alive=self._thread.is_alive(),
            failure=self._failure,
        )

    def close(self, timeout_s: float) -> None:
        """See `boundary.Engine`."""
        with self._lock:
            self._closing = True
        deadline = time.perf_counter() + timeout_s

        def set_deadline() -> None:
            self._deadline = min(self._deadline, deadline)

        self._inbox.put(set_deadline)
        if self._thread.is_alive():
            self._thread.join(timeout_s + JOIN_PATIENCE_S)
        if self._thread.is_alive():
            log.error("the engine's step does not end; it is left alone")
        gc.unfreeze()

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # whatever it was: nobody may wait for a thread that has gone
            log.exception("the engine ends")
            known = (
                error
                if isinstance(error, EngineFailedError)
                else EngineFailedError("the engine has failed and does no more work")
            )
            self._end_all(known)

    def _loop(self) -> None:
        events = self._events
        while True:
            self._take_commands()
            if time.perf_counter() >= self._deadline:
                self._fail(list(self._streams.values()), ShutdownError("the server shut down before the answer ended"))
            self._admit()
            try:
                if self._step():
                    self._failed_steps = 0
            except Exception as error:
                log.exception("engine step failed; its streams end")
                self._fail([*self._active(Phase.PREFILL), *self._active(Phase.DECODE)], error)
                self._failed_steps += 1
            self._beat = time.perf_counter()
            if events:
                self._hand_over(events)
            if time.perf_counter() >= self._next_look:
                self._look()
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise EngineFailedError(f"the engine has failed: {self._failed_steps} steps in a row went wrong")
            if self._doubts >= MOST_DOUBTS:
                raise EngineFailedError(
                    f"the engine has failed: {self._doubts} times in a row, not even a request of its own went well"
                )
            if not self._streams and self._deadline < float("inf") and self._inbox.empty():
                return

    def _end_all(self, error: EngineFailedError) -> None:
        """The engine's last words. Relies on nothing that may have been left half done: whoever is known gets an end,
        unless it is among the events that were not handed over yet.
        """
        with self._lock:
            self._failure = error.message
            known, self._known = self._known, {}
        ended = {event.request_id for event in self._events if isinstance(event, FinishedEvent)}
        info = _info(error)
        self._events += [stream.finished("failed", info) for name, stream in known.items() if name not in ended]
        for streams in (self._streams, self._placed, self._waiting):
            streams.clear()
        self._hand_over(self._events)

    def _hand_over(self, events: list[EngineEvent]) -> None:
        try:
            self._sink(events.copy())
        except Exception:  # the sink belongs to the caller: its loop may be gone, the engine's duty is not
            log.exception("the event sink failed; %d events are lost", len(events))
        events.clear()

    def _take_commands(self) -> None:
        """Everything that callers asked for since the last step; waits for it when there is nothing to do."""
        self._admit()
        if all(s.held for s in self._placed.values()):
            wake = min(self._deadline, self._next_look)
            timeout = None if wake == float("inf") else max(0.0, wake - time.perf_counter())
            self._resting = True
            self._rounds.rest()
            try:
                command = self._inbox.get(timeout=timeout)
            except queue.Empty:
                return
            finally:
                self._beat = time.perf_counter()
                self._resting = False
            command()
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _enter(self, stream: Stream) -> None:
        self._streams[stream.request.request_id] = stream
        self._waiting.setdefault(stream.request.client, {})[stream.request.request_id] = stream

    def _leave_queue(self, stream: Stream) -> None:
        own = self._waiting[stream.request.client]
        del own[stream.request.request_id]
        if not own:
            del self._waiting[stream.request.client]

    def _admit(self) -> None:
        """Give places, and slots, to whoever is next. A stream that does not fit yet is not overtaken."""
        free = self.info.max_num_seqs - len(self._placed)
        if not free or not self._waiting:
            return
        # nobody gets more than these: thousands may wait, and each step comes by here
        first = [s for own in self._waiting.values() for s in islice(own.values(), free)]
        first.sort(key=lambda s: s.submitted_s)
        for stream in in_turn([*self._placed.values(), *first], self.info.max_num_seqs):
            extent = self._allocator.allocate(stream.slots_needed)
            if extent is None:
                return
            self._leave_queue(stream)
            self._placed[stream.request.request_id] = stream
            try:
                stream.admitted(extent)
            except Exception as error:
                log.exception("a stream could not be admitted")
                self._fail([stream], error)
                continue
            self._counters.prompt_tokens += len(stream.request.prompt_ids)

    @torch.inference_mode()
    def _step(self) -> bool:
        """Read prompts and run a round; whether there was anything to do."""
        joining, decoding = self._active(Phase.PREFILL), self._active(Phase.DECODE)
        if joining:
            self._attempt(joining, self._read)
        if decoding:
            self._counters.rounds += 1
            self._attempt(decoding, self._round)
        return bool(joining or decoding)

    def _active(self, phase: Phase) -> list[Stream]:
        return [s for s in self._placed.values() if s.phase is phase and not s.held]

    def _read(self, joining: Sequence[Stream]) -> list[Committed]:
        company = list(self._placed.values()) or joining
        chunk = self._chunk(self._active(Phase.DECODE), max([s.prefilled for s in joining]))
        return self._rounds.prefill(shares(joining, chunk), company)

    def _round(self, decoding: Sequence[Stream]) -> list[Committed]:
        together, slowest_ms = pace(decoding, self._plain_ms(decoding), time.perf_counter())
        return self._rounds.decode(together, slowest_ms)

    # --- what fails ----------------------------------------------------------------------------------------

    def _attempt(self, streams: list[Stream], work: Callable[[Sequence[Stream]], list[Committed]]) -> None:
        """Do ``work`` for these streams. Where it fails, whoever it does not fail without goes on.

        It is done again for each half, and so on: whoever it fails for alone ends. Nobody is sought where the engine
        fails at a request of its own as well: then the fault is not in what was asked, and all of them end.
        """
        marks = [s.mark() for s in streams]
        try:
            committed = work(streams)
        except Exception as error:
            log.exception("a pass for %d streams failed", len(streams))
            self._rounds.forget()
            kept = [s for s, mark in zip(streams, marks, strict=True) if s.rewind(mark)]
            self._fail([s for s in streams if s not in kept], error)
            if len(streams) == 1:
                self._fail(kept, error)  # and then there is room to look
                self._doubted()
            elif self._doubted():
                self._fail(kept, error)
            else:
                half = (len(kept) + 1) // 2
                for some in filter(None, (kept[:half], kept[half:])):
                    self._attempt(some, work)
                    self._rounds.forget()  # or the other half would be given, and blamed for, this one's next round
            return
        self._publish(committed)
        if committed and all(done.error is not None for done in committed):
            self._doubted()

    def _doubted(self) -> bool:
        """Something failed: whether it may be the engine."""
        if not self._doubts:
            if time.perf_counter() >= self._sound_until:
                self._look()
            else:
                self._next_look = self._sound_until
        return self._doubts > 0

    def _look(self) -> None:
        """Find out whether the engine does its work. Its failure is what it fails at with a request of its own, and
        nothing else: whoever sends what cannot be answered ends nobody but himself.
        """
        works = self._works()
        now = time.perf_counter()
        if works:
            self._doubts, self._next_look, self._sound_until = 0, float("inf"), now + LOOK_AGAIN_S
        else:
            self._doubts = self._doubts + 1 if works is False else 0  # without room nothing is known
            self._next_look = now + LOOK_AGAIN_S

    @torch.inference_mode()
    def _works(self) -> bool | None:
        """Whether requests of the engine's own are answered; None: there is no room for one now."""
        for temperature, verification in OWN_WAYS:
            if not (works := self._answers(temperature, verification)):
                return works
        return True

    def _answers(self, temperature: float, verification: Verification) -> bool | None:
        target = self._models.target
        sampling = SamplingParams(max_tokens=OWN_TOKENS, temperature=temperature, ignore_eos=True)
        asked = GenerationRequest(request_id="", prompt_ids=(0,), sampling=sampling, verification=verification)
        stream = Stream(asked, target.vocab_size, self._models.gamma, frozenset(), None)
        extent = self._allocator.allocate(stream.slots_needed)
        if extent is None:
            return None
        self._rounds.forget()  # others' rounds are not to be read here
        try:
            stream.admitted(extent)
            reason = None
            while reason is None:
                work = self._read if stream.phase is Phase.PREFILL else self._round
                for done in work([stream]):
                    if done.error is not None:
                        raise done.error
                    reason = done.reason
            return True
        except Exception:
            log.exception("the engine fails at a request of its own")
            return False
        finally:
            stream.phase = Phase.DONE
            self._rounds.forget()
            self._allocator.free(extent)

    # --- the next pass -------------------------------------------------------------------------------------

    def _chunk(self, decoding: Sequence[Stream], position: int = 0) -> int:
        """Prompt tokens of a pass: as many as, by the curve, hold up nobody for too long.

        That is whoever decodes, beside whose round it runs; and whoever comes while nobody does. ``position``: how far
        a prompt has been read, at most: the further, the longer its next tokens take.
        """
        budget_ms = self._prefill_budget_ms if decoding else ALONE_MS
        tightest_ms = min([s.max_chunk_gap_ms for s in decoding], default=float("inf"))
        if tightest_ms < float("inf"):
            budget_ms = min(budget_ms, SAFE * tightest_ms - self._plain_ms(decoding)(len(decoding)))
        measured = self._models.capacity
        passes_ms = self._rounds.prompt_ms(measured.tokens, max(position, measured.context))
        fitting = [n for n, ms in zip(measured.tokens, passes_ms, strict=True) if ms <= budget_ms]
        return max([PREFILL_LEAST, *fitting])

    def _plain_ms(self, streams: Sequence[Stream]) -> Callable[[int], float]:
        """What a round of so many of these takes at present with nothing drafted."""
        costs, company = self._models.controller.costs, company_of(streams)
        return lambda count: costs.pace * costs.plain_ms(company._replace(streams=count))

    def _publish(self, committed: Sequence[Committed]) -> None:
        c = self._counters
        for stream, event, reason, record, error in committed:
            c.skipped += record is not None and stream.drafts and not record.draft_tokens
            if record is not None and record.draft_tokens:
                c.drafts += 1
                c.draft_tokens += len(record.draft_tokens)
                c.scheduled += record.scheduled
                c.accepted += record.accepted
                for k in range(record.accepted):
                    c.per_position[k] += 1
            if event is None:
                self._fail([stream], error or InternalError("the engine failed on this stream"))
                continue
            c.generation_tokens += len(event.token_ids)
            self._events.append(event)
            if error is not None:
                self._fail([stream], error)
            elif reason is not None:
                self._end(stream, reason)

    def _cancel(self, request_id: str) -> None:
        if (stream := self._streams.get(request_id)) is not None:
            self._end(stream, "cancelled")

    def _set_held(self, request_id: str, held: bool) -> None:
        if (stream := self._streams.get(request_id)) is not None:
            stream.held = held
            stream.last_chunk_s = time.perf_counter()  # what its reader missed was not for us to send
            if held:
                self._set_aside(stream)

    @torch.inference_mode()
    def _set_aside(self, stream: Stream) -> None:
        try:
            self._rounds.context.deliver([stream])  # it would take the room of others for who knows how long
        except Exception as error:  # it alone needs what went wrong
            log.exception("a held stream could not be set aside")
            self._fail([stream], error)

    def _fail(self, streams: Sequence[Stream], error: Exception) -> None:
        info = _info(error if isinstance(error, DsparkError) else InternalError("the engine failed on this request"))
        for stream in streams:
            self._end(stream, "failed", info)

    def _end(self, stream: Stream, reason: FinishReason, error: ErrorInfo | None = None) -> None:
        """The one way out: gives everything back and says so exactly once."""
        if reason in ("cancelled", "failed") and (rest := stream.rest_of_text()) is not None:
            self._events.append(rest)
        self._counters.late_chunks += stream.late_chunks
        had_slots = stream.phase is not Phase.WAITING
        if self._placed.pop(stream.request.request_id, None) is None:
            self._leave_queue(stream)
        self._events.append(stream.finished(reason, error))
        with self._lock:
            self._known.pop(stream.request.request_id, None)
        del self._streams[stream.request.request_id]
        if had_slots:
            self._allocator.free(stream.extent)


def _info(error: DsparkError) -> ErrorInfo:
    """An error as events carry it."""
    return ErrorInfo(status=error.status, type=error.type, code=error.code, message=error.message, param=error.param)


def check_request(request: GenerationRequest, info: ModelInfo) -> None:
    """Everything that the engine relies on; the server checks the same with the client's field names first.

    Raises:
        InvalidRequestError: ``param`` names the field.
        ContextLengthError: prompt and max_tokens exceed ``max_model_len``.
    """
    s = request.sampling

    def refuse(param: str, rule: str, value: object) -> None:
        raise InvalidRequestError(f"{param} must be {rule}, not {value!r}", param=param)

    if not request.prompt_ids:
        refuse("prompt_ids", "at least one token", [])
    for token in request.prompt_ids:
        if not 0 <= token < info.vocab_size:
            refuse("prompt_ids", f"token ids in 0 … {info.vocab_size - 1}", token)
    if s.max_tokens < 1:
        refuse("max_tokens", "at least 1", s.max_tokens)
    for param, allowed in RANGES.items():
        for value in [bias for _, bias in s.logit_bias] if param == "logit_bias" else [getattr(s, param)]:
            if value not in allowed:
                refuse(param, str(allowed), value)
    _check_adjustments(s, info, refuse)
    if not 0.0 <= request.max_chunk_gap_ms < float("inf"):
        refuse("max_chunk_gap_ms", "a number ≥ 0", request.max_chunk_gap_ms)
    if any(not text for text in s.stop):
        refuse("stop", "non-empty strings", "")
    total = len(request.prompt_ids) + s.max_tokens
    if total > info.max_model_len:
        raise ContextLengthError(
            f"prompt of {len(request.prompt_ids)} tokens and max_tokens {s.max_tokens} make {total}; "
            f"max_model_len is {info.max_model_len}",
            param="max_tokens",
        )


def _check_adjustments(s: SamplingParams, info: ModelInfo, refuse: Callable[[str, str, object], None]) -> None:
    if not 0 <= s.min_tokens <= s.max_tokens:
        refuse("min_tokens", f"in 0 … max_tokens, {s.max_tokens}", s.min_tokens)
    if len(s.logit_bias) > MAX_BIASES:
        refuse("logit_bias", f"at most {MAX_BIASES:,} tokens", len(s.logit_bias))
    for before, (token, _) in zip([(-1, 0.0), *s.logit_bias], s.logit_bias, strict=False):
        if not 0 <= token < info.vocab_size:
            refuse("logit_bias", f"of token ids in 0 … {info.vocab_size - 1}", token)
        if token <= before[0]:
            refuse("logit_bias", "of ascending token ids, each once", token)
