"""Threads in turns: who waits for whom, and what is given back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dspark_stream.server.turns import Turns


class Work:
    """Pieces of work that last until they are let go; ``begun`` in order."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._gates: dict[str, threading.Event] = {}
        self._begins: dict[str, threading.Event] = {}
        self.begun: list[str] = []
        self.most = 0
        self._at_once = 0

    def start(self, client: str, name: str) -> asyncio.Task[str]:
        gate = self._gates[name] = threading.Event()
        begins = self._begins[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            begins.set()
            self._at_once += 1
            self.most = max(self.most, self._at_once)
            assert gate.wait(10)
            self._at_once -= 1
            return name

        return asyncio.create_task(self._turns.run(client, work))

    async def begins(self, *names: str) -> None:
        for name in names:
            assert await asyncio.to_thread(self._begins[name].wait, 5)

    def end(self, *names: str) -> None:
        for name in names or self._gates:
            self._gates[name].set()


@pytest.fixture
async def make() -> AsyncIterator[Callable[[int], Work]]:
    made: list[tuple[Turns, Work]] = []

    def new(threads: int) -> Work:
        turns = Turns(threads, "test")
        made.append((turns, Work(turns)))
        return made[-1][1]

    yield new
    for turns, work in made:
        work.end()
        turns.close()


async def test_a_client_with_much_work_holds_up_itself_alone(make: Callable[[int], Work]) -> None:
    """Guards against a hundred refused prompts of one client before another's first."""
    work = make(2)
    hog = [work.start("hog", f"hog{i}") for i in range(50)]
    await work.begins("hog0")
    other = work.start("other", "other")
    await work.begins("other")  # on the second thread, although the hog wants it
    work.end("other")
    assert await other == "other"
    assert work.begun == ["hog0", "other"]
    work.end()
    assert await asyncio.gather(*hog) == [f"hog{i}" for i in range(50)]
    assert work.most <= 2


async def test_clients_go_round(make: Callable[[int], Work]) -> None:
    work = make(1)
    tasks = [work.start(client, f"{client}{i}") for client in "abc" for i in range(3)]
    work.end()
    await asyncio.gather(*tasks)
    assert work.begun == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


async def test_who_leaves_the_line_takes_no_turn(make: Callable[[int], Work]) -> None:
    """Guards against a turn that is given to somebody who has gone, and never comes back."""
    work = make(1)
    first, gone, stays = (work.start(client, client) for client in ("a", "b", "c"))
    await work.begins("a")
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    work.end("a")
    await first
    await work.begins("c")
    work.end("c")
    assert await stays == "c"
    assert work.begun == ["a", "c"]


async def test_who_leaves_while_it_runs_keeps_the_turn_to_its_end(make: Callable[[int], Work]) -> None:
    """Guards against a client that asks and leaves, again and again, and has many threads at work for nobody."""
    work = make(2)
    left = work.start("hog", "left")
    await work.begins("left")
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    again, other = work.start("hog", "again"), work.start("other", "other")
    await work.begins("other")
    assert work.begun == ["left", "other"]
    work.end()
    assert await asyncio.gather(again, other) == ["again", "other"]


async def test_a_turn_that_comes_as_its_task_is_cancelled_goes_on(make: Callable[[int], Work]) -> None:
    work = make(1)
    first = work.start("a", "first")
    await work.begins("first")
    gone, stays = work.start("b", "gone"), work.start("c", "stays")
    await asyncio.sleep(0)
    work._turns._done("a")  # b's turn comes in this very moment
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    work._turns._take("a")
    work.end()
    assert await asyncio.gather(first, stays) == ["first", "stays"]


@pytest.mark.parametrize("fault", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_what_fails_gives_its_turn_back(make: Callable[[int], Work], fault: type[BaseException]) -> None:
    """Guards against a turn that a failure keeps, and against a panic on a thread that ends the loop."""
    turns = make(1)._turns

    def fail() -> Any:
        raise fault("no")

    for _ in range(3):
        with pytest.raises((ValueError, RuntimeError), match="no"):
            await turns.run("a", fail)
    assert await turns.run("a", lambda: 1) == 1
