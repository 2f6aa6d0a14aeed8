"""What one client was not yet sent: merged where it can be, numbered when it leaves. No socket, no loop."""

from __future__ import annotations

from collections import deque

from dspark_stream.server import wire

_EVENT_COST = 256
"""A guess at an event's size without its texts; close enough for a limit."""


class Outbox:
    """Events of one client in order. Text of a response that waits here grows instead of queueing up behind itself."""

    def __init__(self) -> None:
        self._queue: deque[tuple[str | None, wire.ServerEvent]] = deque()
        self._last: dict[str, wire.ServerEvent] = {}
        self._numbers: dict[str, int] = {}
        self.pending_bytes = 0
        self.merged = 0
        """Deltas that were added to one that was already waiting."""

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, event: wire.ServerEvent, response_id: str | None = None) -> None:
        """Add an event; ``response_id`` says whose, and None that it belongs to no response."""
        if response_id is not None:
            last = self._last.get(response_id)
            if isinstance(event, wire.TextDelta) and isinstance(last, wire.TextDelta):
                last.delta += event.delta
                last.usage = event.usage
                self.pending_bytes += len(event.delta)
                self.merged += 1
                return
            self._last[response_id] = event
        self._queue.append((response_id, event))
        self.pending_bytes += _cost(event)

    def pop(self) -> wire.ServerEvent | None:
        """The next event, numbered; None when there is none. It must then be written, or the socket closed."""
        if not self._queue:
            return None
        response_id, event = self._queue.popleft()
        self.pending_bytes -= _cost(event)
        if response_id is not None:
            if self._last.get(response_id) is event:
                # Written events must not grow any more.
                del self._last[response_id]
            self._number(response_id, event)
        return event

    def _number(self, response_id: str, event: wire.ServerEvent) -> None:
        if isinstance(event, wire.Step | wire.Hello | wire.ErrorEvent):
            return
        event.sequence_number = self._numbers.get(response_id, 0)
        if isinstance(event, wire.TerminalEvent):
            self._numbers.pop(response_id, None)
        else:
            self._numbers[response_id] = event.sequence_number + 1


def _cost(event: wire.ServerEvent) -> int:
    match event:
        case wire.TextDelta(delta=text):
            return _EVENT_COST + len(text)
        case wire.TextDone(text=text) | wire.Step(text=text):
            return _EVENT_COST + len(text)
        case wire.ContentPartDone(part=part):
            return _EVENT_COST + len(part.text)
        case wire.OutputItemDone(item=item):
            return _EVENT_COST + _text_size(item)
        case wire.ResponseEvent(response=response):
            texts = sum(_text_size(item) for item in response.output)
            return 2 * _EVENT_COST + len(response.instructions or "") + texts
        case _:
            return _EVENT_COST


def _text_size(item: wire.OutputMessage) -> int:
    return sum(len(part.text) for part in item.content)
