"""A deterministic engine and tokenizer: they drive the real server over real sockets, without a model.

A `Script` says what a stream does; `FakeEngine` plays scripts on its own thread, one round for every stream a step,
and keeps the engine's promise: exactly one `FinishedEvent` for each submitted stream, whatever happens.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark_stream.engine.boundary import EventSink
from dspark_stream.errors import DrainingError, DsparkError, EngineFailedError, InternalError, ShutdownError
from dspark_stream.types import (
    EngineEvent,
    EngineSnapshot,
    ErrorInfo,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    Message,
    ModelInfo,
    Piece,
    RoundRecord,
    TokensEvent,
    Usage,
)

GAMMA = 4


def model_info(**changes: object) -> ModelInfo:
    values: dict[str, object] = {
        "model": "fake-135m",
        "drafter": "fake-drafter",
        "gamma": GAMMA,
        "vocab_size": 1000,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_token_bytes": 16,
        "dtype": "float32",
        "device": "cpu",
        "target_quant": "none",
        "draft_quant": "none",
        "schedule": "adaptive",
    }
    return ModelInfo(**{**values, **changes})  # type: ignore[arg-type]


class FakeTokenizer:
    """Bytes are tokens. ``gate``, while cleared, keeps `encode_chat` waiting, as a huge prompt would."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.chats: list[list[Message]] = []
        self.prompts: list[str] = []
        self.error: Exception | None = None

    def encode_prompt(self, text: str, most: int | None = None) -> list[int]:
        self.prompts.append(text)
        return self.encode(text)

    def encode_chat(self, messages: Sequence[Message], most: int | None = None) -> list[int]:
        self.chats.append(list(messages))
        self.gate.wait(20)
        if self.error is not None:
            raise self.error
        ids = self.encode("".join(f"<{role}>{''.join(said)}\n" for role, said in messages))
        return ids if most is None else ids[: most + 1]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


@dataclass
class Script:
    """What one stream does. The text ends with reason ``stop`` unless ``max_tokens`` comes first."""

    tokens: Sequence[str] = tuple(f"w{i} " for i in range(10))
    rounds: Sequence[int] = (3, 1, 2)
    """Tokens that each round commits, repeated: accepted drafts and one of the target's own."""
    prefill_steps: int = 1
    fail_after_rounds: int | None = None
    error: DsparkError | None = None
    """Raised by `submit`."""


@dataclass
class _Stream:
    request: GenerationRequest
    script: Script
    steps: int = 0
    rounds: int = 0
    written: int = 0
    accepted: int = 0
    cancelled: bool = False
    held: bool = False


class FakeEngine:
    """Plays scripts. ``step_s`` is the time of one step; ``gate``, while cleared, stops the steps."""

    def __init__(
        self,
        script: Script | Callable[[GenerationRequest], Script] | None = None,
        *,
        step_s: float = 0.001,
        info: ModelInfo | None = None,
    ) -> None:
        self.info = info or model_info()
        self.script = script or Script()
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()
        self.submitted: list[GenerationRequest] = []
        self.cancels: list[str] = []
        self.holds: list[str] = []
        self.releases: list[str] = []
        self.finished: dict[str, FinishReason] = {}
        self.rounds_total = 0
        self.stuck_for_s = 0.0
        self.failure = ""
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Condition()
        self._closing_by: float | None = None
        self._sink: EventSink | None = None
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    # --- the boundary ---------------------------------------------------------------------------------------

    def start(self, sink: EventSink) -> None:
        self._sink = sink
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        script = self.script(request) if callable(self.script) else self.script
        if script.error is not None:
            raise script.error
        with self._lock:
            if self.failure:
                raise EngineFailedError(self.failure)
            if self._closing_by is not None:
                raise DrainingError("the engine is closing")
            self.submitted.append(request)
            self._streams[request.request_id] = _Stream(request, script)
            self._lock.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self.cancels.append(request_id)
            if request_id in self._streams:
                self._streams[request_id].cancelled = True
                self._lock.notify_all()

    def hold(self, request_id: str) -> None:
        self.holds.append(request_id)
        self._set_held(request_id, True)

    def release(self, request_id: str) -> None:
        self.releases.append(request_id)
        self._set_held(request_id, False)

    def snapshot(self) -> EngineSnapshot:
        with self._lock:
            held = sum(stream.held for stream in self._streams.values())
            running = min(len(self._streams), self.info.max_num_seqs)
            return EngineSnapshot(
                running=running,
                waiting=len(self._streams) - running,
                held=held,
                kv_tokens_used=sum(len(s.request.prompt_ids) + s.written for s in self._streams.values()),
                kv_tokens_total=10_000,
                rounds_total=self.rounds_total,
                num_drafts_total=self.rounds_total,
                num_draft_tokens_total=self.rounds_total * GAMMA,
                num_scheduled_tokens_total=self.rounds_total * GAMMA,
                num_accepted_tokens_total=self.rounds_total,
                num_accepted_tokens_per_pos=[self.rounds_total, 0, 0, 0],
                prompt_tokens_total=sum(len(r.prompt_ids) for r in self.submitted),
                generation_tokens_total=self.rounds_total,
                last_step_age_s=self.stuck_for_s,
                alive=self._thread.is_alive(),
                failure=self.failure,
            )

    def close(self, timeout_s: float) -> None:
        with self._lock:
            deadline = time.monotonic() + timeout_s
            self._closing_by = deadline if self._closing_by is None else min(self._closing_by, deadline)
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def fail(self, reason: str, *, silently: bool = False) -> None:
        """Do no more work, as an engine whose thread has ended: ``silently`` without an end for its streams."""
        with self._lock:
            error = EngineFailedError(reason)
            left = list(self._streams.values())
            if silently:
                self._streams.clear()
                self.finished.update({s.request.request_id: "failed" for s in left})
            else:
                self.failure = reason
            events = [] if silently else [self._finish(stream, "failed", error) for stream in left]
            self._closing_by = 0.0
            self._lock.notify_all()
        assert self._sink is not None
        self._sink(events)
        self._thread.join()

    # --- what tests ask ---------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Streams that have not finished."""
        with self._lock:
            return len(self._streams)

    # --- the thread -------------------------------------------------------------------------------------------

    def _set_held(self, request_id: str, held: bool) -> None:
        with self._lock:
            if request_id in self._streams:
                self._streams[request_id].held = held
                self._lock.notify_all()

    def _run(self) -> None:
        assert self._sink is not None
        while True:
            with self._lock:
                closing_by = self._closing_by
                if closing_by is not None and not self._streams:
                    return
                if not self._streams:
                    self._lock.wait(0.05)
                    continue
                out_of_time = closing_by is not None and time.monotonic() >= closing_by
                open_gate = self.gate.is_set()
                # Cancelling works whether or not steps do: a stream ends within one round.
                events = list(
                    itertools.chain.from_iterable(
                        self._step(stream, open_gate, out_of_time)
                        for stream in list(self._streams.values())[: self.info.max_num_seqs]
                    )
                )
            if events:
                self._sink(events)
            time.sleep(self.step_s)

    def _step(self, stream: _Stream, open_gate: bool, out_of_time: bool) -> list[EngineEvent]:
        if stream.cancelled:
            return [self._finish(stream, "cancelled")]
        if out_of_time:
            return [self._finish(stream, "failed", ShutdownError("the server shut down before the answer ended"))]
        if stream.held or not open_gate:
            return []
        stream.steps += 1
        if stream.steps <= stream.script.prefill_steps:
            return []
        script = stream.script
        if script.fail_after_rounds is not None and stream.rounds >= script.fail_after_rounds:
            return [self._finish(stream, "failed", InternalError("the engine failed on purpose"))]
        limit = stream.request.sampling.max_tokens
        room = min(limit, len(script.tokens)) - stream.written
        count = min(script.rounds[stream.rounds % len(script.rounds)], room)
        events: list[EngineEvent] = []
        if count > 0:
            events.append(self._round(stream, count))
        if stream.written >= len(script.tokens):
            events.append(self._finish(stream, "stop"))
        elif stream.written >= limit:
            events.append(self._finish(stream, "length"))
        return events

    def _round(self, stream: _Stream, count: int) -> TokensEvent:
        request, script = stream.request, stream.script
        texts = script.tokens[stream.written : stream.written + count]
        start = len(request.prompt_ids) + stream.written
        stream.written += count
        stream.rounds += 1
        stream.accepted += count - 1
        self.rounds_total += 1
        drafted = GAMMA if request.mode == "dspark" else 0
        record = RoundRecord(
            start=start,
            anchor=start % 100,
            draft_tokens=list(range(drafted)),
            scheduled=drafted,
            accepted=count - 1,
            bonus=start % 7,
            confidence=[0.9] * drafted,
            survival=[0.9**i for i in range(1, drafted + 1)],
            t_draft_ms=0.5,
            t_verify_ms=1.5,
            batch_tokens=drafted + 1,
            streams=len(self._streams),
        )
        return TokensEvent(
            request_id=request.request_id,
            token_ids=list(range(stream.written - count, stream.written)),
            text="".join(texts),
            pieces=[Piece(text=text, drafted=i < count - 1) for i, text in enumerate(texts)],
            round=record if request.record_rounds else None,
        )

    def _finish(self, stream: _Stream, reason: FinishReason, error: DsparkError | None = None) -> FinishedEvent:
        request = stream.request
        del self._streams[request.request_id]
        self.finished[request.request_id] = reason
        return FinishedEvent(
            request_id=request.request_id,
            reason=reason,
            usage=Usage(
                input_tokens=len(request.prompt_ids),
                output_tokens=stream.written,
                rounds=stream.rounds,
                drafted=stream.rounds * GAMMA,
                scheduled=stream.rounds * GAMMA,
                accepted=stream.accepted,
                accepted_per_position=[stream.rounds, min(stream.accepted, stream.rounds), 0, 0],
                queue_ms=0.1,
                prefill_ms=1.0,
                decode_ms=2.0,
            ),
            error=ErrorInfo(status=error.status, type=error.type, code=error.code, message=error.message)
            if error is not None
            else None,
        )
