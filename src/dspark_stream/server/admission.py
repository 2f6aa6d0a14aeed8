"""Places for streams, and memory for what clients send: taken before there is work, given back on every way out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from dspark_stream.errors import DrainingError, EngineFailedError, OverloadedError, RateLimitError

KEPT_FREE = 64
"""Of so many places one is for clients that have none, and of so many bytes one for clients that hold little."""
LITTLE_BYTES = 128 << 10
"""One stream and some text."""


class Admission:
    """Counts streams in flight, in all and for each client. Used from the loop only.

    Args:
        capacity: places in all.
        per_client: places of one client at most. 0: as many as are free. Below ``capacity``: both limits hold. From
            ``capacity`` on: neither does. "As many as are free" (dynamic thresholds, as switches share their buffers)
            gives one client alone half of all, the next one half of what is left, and two that come together a third
            each. The last ones are kept for newcomers (`KEPT_FREE`).
        memory: bytes in all, shared in the same way.
    """

    def __init__(self, capacity: int, per_client: int = 0, memory: int = 1 << 30) -> None:
        self.capacity = capacity
        self.memory = memory
        self.per_client = per_client or capacity
        self.limits: Mapping[str, int] = {}
        """Of clients that have one of their own, instead of ``per_client``."""
        self.draining = False
        self.failure = ""
        """Why there is no engine to have places on; empty while there is one."""
        self.shared = per_client < capacity
        """Whether a client may have no more than are free."""
        self._clients: Counter[str] = Counter()
        self.in_flight = 0
        self._bytes: Counter[str] = Counter()
        self.bytes_held = 0
        self._stream_s = 2.0
        """How long streams last, lately: after so long about every place that is taken now is free again."""

    def lasted(self, seconds: float) -> None:
        """A stream has ended after so long."""
        self._stream_s += (seconds - self._stream_s) / 8

    @property
    def wait_s(self) -> int:
        """How long it is fair to wait for a place, in whole seconds."""
        return max(1, min(30, math.ceil(self._stream_s)))

    def most_alone(self, client: str = "") -> int:
        """What this client may have while there is no other one."""
        own = self.limits.get(client, self.per_client)
        return min(own, (self.capacity + 1) // 2) if self.shared else min(own, self.capacity)

    def check(self) -> None:
        """Raise if nothing is taken any more; whoever had to wait since he got his place asks again.

        Raises:
            EngineFailedError: the engine has failed.
            DrainingError: the server is shutting down.
        """
        if self.failure:
            raise EngineFailedError(self.failure, retry_after_s=5)
        if self.draining:
            raise DrainingError("the server is shutting down; try another one, or later", retry_after_s=5)

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """Hold a place as long as the block runs.

        Raises:
            EngineFailedError: the engine has failed.
            DrainingError: the server is shutting down.
            RateLimitError: this client has as many streams as one client may have.
            OverloadedError: the server has.
        """
        self.check()
        mine, free = self._clients[client], self.capacity - self.in_flight
        wait_s = self.wait_s
        if not free:
            raise OverloadedError(f"all {self.capacity} places are taken; try again in a moment", retry_after_s=wait_s)
        if mine >= self.limits.get(client, self.per_client):
            raise RateLimitError(f"this client already has {mine} streams; wait for one to end", retry_after_s=wait_s)
        if self.shared and mine and (mine >= free or free <= self.capacity // KEPT_FREE):
            raise RateLimitError(
                f"this client (key or address) already has {mine} of the server's {self.capacity} places, and what is "
                "left is for others; wait for a stream to end (--max-streams-per-client sets another limit)",
                retry_after_s=wait_s,
            )
        self.in_flight += 1
        self._clients[client] += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    def holding(self, client: str) -> Held:
        """Memory that this client takes until the block ends or `Held.give` is called, as much as `Held.grow` says."""
        return Held(self, client)

    def take(self, client: str, size: int) -> None:
        """Memory for a client.

        Raises:
            RateLimitError: this client has as much as one client may have.
            OverloadedError: the server has no more.
        """
        mine, free = self._bytes[client] + size, self.memory - self.bytes_held - size
        if free < 0:
            raise OverloadedError(
                f"what is waiting takes all of the {self.memory >> 20} MiB for requests; try again in a moment",
                retry_after_s=self.wait_s,
            )
        if self.shared and (mine > free or (mine > LITTLE_BYTES and free < self.memory // KEPT_FREE)):
            raise RateLimitError(
                f"this client's (key's or address') requests take {mine >> 20} of the server's {self.memory >> 20} MiB "
                "for them, and what is left is for others; wait for a stream to end",
                retry_after_s=self.wait_s,
            )
        self._bytes[client] = mine
        self.bytes_held += size

    def give(self, client: str, size: int) -> None:
        """What was taken."""
        self.bytes_held -= size
        self._bytes[client] -= size
        if not self._bytes[client]:
            del self._bytes[client]


class Held:
    """What a client's request takes of the memory for requests."""

    def __init__(self, admission: Admission, client: str) -> None:
        self.size = 0
        self._admission, self._client = admission, client

    def grow(self, size: int) -> None:
        """So many bytes more; raises what `Admission.take` raises."""
        self._admission.take(self._client, size)
        self.size += size

    def give(self) -> None:
        """Back, all of it; more than once does no harm."""
        size, self.size = self.size, 0
        self._admission.give(self._client, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give()
