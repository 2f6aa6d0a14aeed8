"""The listening socket: how many connections there may be, and which one makes room for another."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import Counter
from collections.abc import Iterable

from aiohttp import web

from dspark_stream.errors import BusyError, OverloadedError, RateLimitError
from dspark_stream.server.connections import Connection
from dspark_stream.server.descriptors import connections_that_fit
from dspark_stream.server.frames import CrowdedTurns
from dspark_stream.server.metrics import Metrics
from dspark_stream.server.seldom import Seldom
from dspark_stream.server.settings import ServerConfig

log = logging.getLogger(__name__)

RESERVE = 32
"""Connections beyond the limits that may still ask for the service's health."""


class Listener:
    """The listening socket, and all that came in by it.

    A connection without a request in hand is worth the least. At a limit the one that has waited longest makes room
    for the newest: half requests lock nobody out. Where all have requests in hand, a reserve still answers probes.
    """

    def __init__(self, config: ServerConfig, manager: web.Server, metrics: Metrics) -> None:
        self.config = config
        self.metrics = metrics
        self.manager = manager
        self.refused = Seldom(log, "%d requests that are not HTTP were refused; what they said is not logged")
        self._evicted = Seldom(log, "%d connections without a request made room for new ones; see --max-connections")
        self._beyond = Seldom(log, "%d connections too many, all with requests in hand; see --max-connections")
        self.crowds = CrowdedTurns()
        self.half_heads = 0
        """Bytes of heads whose end has not come."""
        self._limit = config.max_connections
        self._per_address = config.max_connections_per_address
        self._open: dict[Connection, str] = {}
        self._waiting: dict[Connection, None] = {}
        """Those without a request in hand, the longest first."""
        self._reserve: dict[Connection, None] = {}
        self._addresses: Counter[str] = Counter()
        self._server: asyncio.Server | None = None

    async def open(self) -> int:
        """Listen; returns the port.

        Raises:
            OSError, OverflowError: the address cannot be listened on.
        """
        wanted = self.config.max_connections
        self._limit = connections_that_fit(wanted, RESERVE)
        # Its share stays the same, or one address could take all that is left.
        self._per_address = max(1, self.config.max_connections_per_address * self._limit // wanted)
        host = self.config.host.strip("[]")
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), host, self.config.port, backlog=4096)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Accept nothing more; ending what is open is aiohttp's."""
        if self._server is not None:
            self._server.close()

    # --- coming and going ---------------------------------------------------------------------------------

    def admit(self, connection: Connection, peername: object) -> BusyError | None:
        """Count a new connection; returns what it is told if it may only ask for the service's health."""
        self.metrics.connections_total += 1
        peer = neighbourhood(peername)
        error = self._make_room(peer)
        if error is None:
            self._open[connection] = peer
            self._addresses[peer] += 1
            self._waiting[connection] = None
        else:
            self._beyond.count()
            self.metrics.connections_cut["limit"] += 1
            if len(self._reserve) >= RESERVE and not self._evict(self._reserve):
                connection.abort()
            self._reserve[connection] = None
        self.metrics.connections_open = len(self._open) + len(self._reserve)
        return error

    def lost(self, connection: Connection) -> None:
        """It has gone, or is about to."""
        self._waiting.pop(connection, None)
        self._reserve.pop(connection, None)
        peer = self._open.pop(connection, None)
        if peer is not None:
            self._addresses[peer] -= 1
            if not self._addresses[peer]:
                del self._addresses[peer]
        self.metrics.connections_open = len(self._open) + len(self._reserve)

    def busy(self, connection: Connection) -> None:
        """It has a request in hand."""
        self._waiting.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        """Its requests are answered."""
        if connection in self._open:
            self._waiting[connection] = None

    def longest_half_head(self) -> Connection | None:
        """Whoever holds the most bytes of a head whose end has not come."""
        return max((*self._waiting, *self._reserve), key=lambda c: c.head_bytes, default=None)

    def _make_room(self, peer: str) -> BusyError | None:
        most = self._per_address
        crowd = self._addresses[peer] >= most and most < self._limit
        if crowd and not self._evict(c for c in self._waiting if self._open[c] == peer):
            return RateLimitError(f"this address has {most} connections, all of them in use", retry_after_s=2)
        if len(self._open) >= self._limit and not self._evict(self._waiting):
            return OverloadedError(f"all {self._limit} connections are in use; try again in a moment", retry_after_s=2)
        return None

    def _evict(self, candidates: Iterable[Connection]) -> bool:
        oldest = next((found for found in candidates if not found.in_hand), None)
        if oldest is None:
            return False
        self.lost(oldest)
        oldest.cut("evicted")
        self._evicted.count()
        return True


def neighbourhood(peername: object) -> str:
    """Whose connections count together: an IPv4 address, or the /64 of which an IPv6 host can take any."""
    if not isinstance(peername, tuple):
        return "unknown"
    address = ipaddress.ip_address(str(peername[0]).partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.IPv6Network((address, 64), strict=False))
