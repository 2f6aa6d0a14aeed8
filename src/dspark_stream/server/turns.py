"""Threads for work that takes long, shared in turns: what one client has asked for holds up that client alone."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

_NICE = 10
"""How far the threads stand back behind the engine's, where the system gives threads a niceness of their own."""


class Turns:
    """A client has one thread at a time, and clients get theirs in a round. Used from the loop only."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_stand_back)
        self._free = threads
        self._busy: set[str] = set()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By client; whoever's turn ended last stands last."""

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """The result of ``work``, done on a thread when it is this client's turn.

        Cancelled while it runs, ``work`` goes on to its end, and so does the client's turn.

        Raises:
            Exception: what ``work`` raised; a RuntimeError for what is no `Exception`, which would end the loop.
        """
        await self._turn(client)
        loop = asyncio.get_running_loop()
        try:
            future = self._pool.submit(_guarded, work)
        except BaseException:
            self._done(client)
            raise

        def ended(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody waits for a turn
                loop.call_soon_threadsafe(self._done, client)

        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Let go of the threads; what they still do is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, client: str) -> None:
        if self._free and client not in self._busy and client not in self._waiting:
            self._take(client)
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():
                self._done(client)  # the turn came, and nobody takes it
            raise

    def _take(self, client: str) -> None:
        self._free -= 1
        self._busy.add(client)

    def _done(self, client: str) -> None:
        self._free += 1
        self._busy.discard(client)
        if client in self._waiting:
            self._waiting[client] = self._waiting.pop(client)  # to the end of the round
        for name, queue in list(self._waiting.items()):
            while queue and queue[0].cancelled():
                queue.popleft()
            if queue and self._free and name not in self._busy:
                self._take(name)
                queue.popleft().set_result(None)
            if not queue:
                del self._waiting[name]


def _guarded(work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception:
        raise
    except BaseException as error:  # a panic in Rust is one
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _stand_back() -> None:
    with suppress(AttributeError, OSError):  # elsewhere than on Linux a niceness is the whole process's
        if os.uname().sysname == "Linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
