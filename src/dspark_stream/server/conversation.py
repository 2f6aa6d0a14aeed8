"""Earlier turns, by response id, so that ``previous_response_id`` can continue them. In memory, bounded, oldest out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from dspark_stream.errors import NotFoundError
from dspark_stream.types import Message

_MESSAGE_COST = 128
"""About what Python adds to a message's text."""


class _Entry(NamedTuple):
    messages: tuple[Message, ...]
    size: int
    owner: object


class ConversationStore:
    """Least recently used first out, by count and by bytes.

    An entry holds its whole conversation, instructions left out, as the Responses API wants it. Turns share their
    strings with the entries they continue; each is counted in full all the same, so the bound is never exceeded.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, response_id: str | None, owner: object = None) -> tuple[Message, ...]:
        """The conversation up to and with a response; nothing for None.

        Raises:
            NotFoundError: never stored, or for another owner, or no longer kept.
        """
        if response_id is None:
            return ()
        found = self._entries.get(response_id)
        if found is None or found.owner not in (None, owner):
            raise NotFoundError(
                f"no stored response has the id {response_id[:128]!r}; it was never stored, or is no longer kept",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._entries.move_to_end(response_id)
        return found.messages

    def put(self, response_id: str, messages: Sequence[Message], owner: object = None) -> None:
        """Keep a conversation, for everybody or one ``owner``; one that is larger than the whole store is not kept."""
        size = sum(_MESSAGE_COST + len("".join(said).encode()) for _, said in messages)
        if size > self._max_bytes or self._max_responses < 1:
            return
        self._entries[response_id] = _Entry(tuple(messages), size, owner)
        self.bytes += size
        while self.bytes > self._max_bytes or len(self._entries) > self._max_responses:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.size

    def forget(self, owner: object) -> None:
        """Keep nothing more for this owner."""
        for response_id in [name for name, entry in self._entries.items() if entry.owner is owner]:
            self.bytes -= self._entries.pop(response_id).size
