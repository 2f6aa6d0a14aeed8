"""Places for streams: one is taken before a prompt is tokenised, and given back on every way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dspark_stream.errors import DrainingError, OverloadedError, RateLimitError


class Admission:
    """Counts streams in flight, in all and for each client. Used from the loop only."""

    def __init__(self, capacity: int, per_client: int) -> None:
        self.capacity = capacity
        self.per_client = per_client
        self.limits: Mapping[str, int] = {}
        """Of clients that have one of their own, instead of ``per_client``."""
        self.draining = False
        self._clients: Counter[str] = Counter()
        self.in_flight = 0

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """Hold a place as long as the block runs.

        Raises:
            DrainingError: the server is shutting down.
            RateLimitError: this client has as many streams as one client may have.
            OverloadedError: the server has.
        """
        if self.draining:
            raise DrainingError("the server is shutting down; try another one, or later", retry_after_s=5)
        most = self.limits.get(client, self.per_client)
        if self._clients[client] >= most:
            raise RateLimitError(f"this client already has {most} streams; wait for one to end", retry_after_s=1)
        if self.in_flight >= self.capacity:
            raise OverloadedError(f"all {self.capacity} places are taken; try again in a moment", retry_after_s=2)
        self.in_flight += 1
        self._clients[client] += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]
