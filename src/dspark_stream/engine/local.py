"""An engine without a service: requests in, events out, in this process (for ``generate`` and ``eval``)."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dspark_stream.engine.boundary import Engine
from dspark_stream.errors import InternalError
from dspark_stream.types import EngineEvent, FinishedEvent, GenerationRequest, ModelInfo

_PATIENCE_S = 1.0


class Arrival(NamedTuple):
    """An event, and when it left the engine (``time.perf_counter``)."""

    event: EngineEvent
    at_s: float


class LocalEngine:
    """Starts an engine and runs requests on it, so many at once. Leaving the context closes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps: queue.SimpleQueue[tuple[float, Sequence[EngineEvent]]] = queue.SimpleQueue()
        engine.start(lambda events: self._steps.put((time.perf_counter(), tuple(events))))

    @property
    def info(self) -> ModelInfo:
        """What the engine runs, and its limits."""
        return self._engine.info

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and end the engine."""
        self._engine.close(0.0)

    def run(self, requests: Iterable[GenerationRequest], streams: int = 1) -> Iterator[Arrival]:
        """Yield the events of all requests, at most ``streams`` of them running; closing it cancels the rest.

        Raises:
            DsparkError: what `Engine.submit` refused, or an engine that died.
        """
        waiting = iter(requests)
        running: set[str] = set()
        try:
            while True:
                while len(running) < streams and (request := next(waiting, None)) is not None:
                    self._engine.submit(request)
                    running.add(request.request_id)
                if not running:
                    return
                at_s, events = self._next_step()
                for event in events:
                    if event.request_id not in running:
                        continue  # a late event of a run that was given up
                    if isinstance(event, FinishedEvent):
                        running.discard(event.request_id)
                    yield Arrival(event, at_s)
        finally:
            for request_id in running:
                self._engine.cancel(request_id)

    def _next_step(self) -> tuple[float, Sequence[EngineEvent]]:
        while True:
            try:
                return self._steps.get(timeout=_PATIENCE_S)
            except queue.Empty:
                if not self._engine.snapshot().alive:
                    raise InternalError("the engine died; its error is above") from None
