"""Earlier turns, by response id, so that ``previous_response_id`` can continue them. In memory, bounded, oldest out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dspark_stream.errors import NotFoundError
from dspark_stream.server.plan import Message

_MESSAGE_COST = 128
"""About what Python adds to a message's text."""


class ConversationStore:
    """Least recently used first out, by count and by bytes.

    An entry holds its whole conversation, instructions left out, as the Responses API wants it. Turns share their
    strings with the entries they continue; each is counted in full all the same, so the bound is never exceeded.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[tuple[Message, ...], int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, response_id: str | None) -> tuple[Message, ...]:
        """The conversation up to and with a response; nothing for None.

        Raises:
            NotFoundError: never stored, or no longer kept.
        """
        if response_id is None:
            return ()
        found = self._entries.get(response_id)
        if found is None:
            raise NotFoundError(
                f"no stored response has the id {response_id[:128]!r}; it was never stored, or is no longer kept",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._entries.move_to_end(response_id)
        return found[0]

    def put(self, response_id: str, messages: Sequence[Message]) -> None:
        """Keep a conversation; one that is larger than the whole store is not kept."""
        size = sum(len(text.encode()) + _MESSAGE_COST for _, text in messages)
        if size > self._max_bytes or self._max_responses < 1:
            return
        self._entries[response_id] = (tuple(messages), size)
        self.bytes += size
        while self.bytes > self._max_bytes or len(self._entries) > self._max_responses:
            _, (_, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
