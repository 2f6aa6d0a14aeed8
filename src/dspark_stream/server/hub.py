"""From the engine's thread to the loop: one hand-over for each engine step, then each event to its stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from dspark_stream.types import EngineEvent, ErrorInfo, FinishedEvent, Usage

log = logging.getLogger(__name__)

Receiver = Callable[[EngineEvent], None]


class EventHub:
    """`sink` is the engine's; everything else is called on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._receivers: dict[str, Receiver] = {}

    def __len__(self) -> int:
        return len(self._receivers)

    def sink(self, events: Sequence[EngineEvent]) -> None:
        """`EventSink`: called on the engine's thread with all streams' events of one step."""
        try:
            self._loop.call_soon_threadsafe(self._dispatch, events)
        except RuntimeError:
            # The loop is closed: the process is going down, and nobody is left who could be told.
            log.debug("%d engine events after the loop was closed", len(events))

    def subscribe(self, request_id: str, receiver: Receiver) -> None:
        """Send the events of a request to ``receiver``."""
        self._receivers[request_id] = receiver

    def unsubscribe(self, request_id: str) -> None:
        """Drop what may still come for a request."""
        self._receivers.pop(request_id, None)

    def end_all(self, error: ErrorInfo) -> None:
        """End every stream that is still waited for: its engine will say nothing more."""
        usage = Usage(input_tokens=0, output_tokens=0)
        self._dispatch(
            [FinishedEvent(request_id=name, reason="failed", usage=usage, error=error) for name in self._receivers]
        )

    def _dispatch(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            receiver = self._receivers.get(event.request_id)
            if receiver is None:
                continue  # its client has gone, and the engine has been told to cancel it; or it has had its end
            if isinstance(event, FinishedEvent):
                self.unsubscribe(event.request_id)
            try:
                receiver(event)
            except Exception:
                # One stream's failure must not take the others' events with it.
                log.exception("the receiver of %s failed", event.request_id)
