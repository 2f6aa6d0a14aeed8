"""Half an hour of ordinary and rude clients against a service of our own: does it grow, leak or lose anything?

Prints the resident memory's slope over the last half, descriptors and threads, and what clients saw; the exit status
is 1 where a limit is missed.

    python bench/soak.py --minutes 30      # or make soak
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from statistics import linear_regression, median
from typing import Any, NamedTuple

import aiohttp
import websockets

from own_service import KEYS, TERMINAL, OwnService, events_of, many_descriptors, prompt

CLIENTS = 12
EVERY_S = 5.0
PATIENCE_S = 180.0
"""A client that has waited for so long counts as forgotten. On a machine that others use it may just be slow: what the
service was doing is told."""
MAX_SLOPE_MB_MIN, MAX_MORE_DESCRIPTORS, MAX_MORE_THREADS = 0.2, 8, 0
FILLING, FILLING_WORDS = 12, 2500
"""Prompts that fill the KV memory first, and words of each: its pages come to be as they are written, which is growth
that is foretold at start and no leak."""
FLAGS = ["--max-num-seqs", "16", "--max-model-len", "4096", "--kv-memory", "512MiB"]


class Reading(NamedTuple):
    """The process at one moment."""

    minutes: float
    resident_mb: float
    descriptors: int
    threads: int


class Client:
    """Does something else each time; ``seen`` counts what became of it, ``bad`` what may not be."""

    def __init__(self, service: OwnService, seed: int, seen: Counter[str], bad: Counter[str]) -> None:
        self._service = service
        self._chance = random.Random(seed)
        self._label = list(KEYS)[seed % len(KEYS)]
        self._seen, self._bad = seen, bad

    async def run(self, end: float) -> None:
        """Until the time is up."""
        ways = (self.converse, self.ask, self.ask, self.chat, self.leave, self.cancel, self.junk, self.look)
        while time.monotonic() < end:
            way, begun = self._chance.choice(ways), time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await way()
            except TimeoutError:
                self._bad[f"{way.__name__} hung"] += 1
                print(f"  {way.__name__} hung, {time.monotonic() - begun:.0f} s after it began", flush=True)
                print(f"  {await self._state()}", flush=True)
            except (ConnectionError, aiohttp.ClientError, websockets.WebSocketException) as error:
                self._bad[f"lost: {type(error).__name__}"] += 1
            await asyncio.sleep(self._chance.uniform(0, 0.3))

    async def _state(self) -> dict[str, float]:
        """How the service is: one that is slow writes on, one that has forgotten a stream has it still."""
        names = ("num_requests_running", "num_requests_waiting", "num_requests_held", "generation_tokens_total")
        with suppress(aiohttp.ClientError, TimeoutError):
            found = await self._service.metrics()
            return {name: found[f"dspark:{name}"] for name in names}
        return {}

    def _body(self, **more: Any) -> dict[str, Any]:
        chance = self._chance
        body = {"input": prompt(chance, chance.choice((3, 20, 200))), "max_output_tokens": chance.randint(1, 60)}
        return {**body, "temperature": chance.choice((0, 1)), **more}

    def _ended(self, way: str, kind: str) -> None:
        self._seen[f"{way}: {kind}"] += 1
        if kind == "response.failed":
            self._bad[f"{way} failed"] += 1

    async def converse(self) -> None:
        """A few turns on a socket, each continuing the one before."""
        async with self._service.socket(self._label) as socket:
            previous: str | None = None

            def seen(event: dict[str, Any]) -> None:
                nonlocal previous
                if event["type"] in TERMINAL:
                    previous = event["response"]["id"]

            for _ in range(self._chance.randint(1, 5)):
                kind = await events_of(socket, self._body(previous_response_id=previous), seen, PATIENCE_S)
                self._ended("conversation", kind)
                if kind == "error":
                    return

    async def _post(self, way: str, path: str, body: dict[str, Any]) -> None:
        async with self._service.session(self._label, PATIENCE_S) as http, http.post(path, json=body) as answer:
            await answer.read()
            self._seen[f"{way}: {answer.status}"] += 1
            if answer.status >= 500 and answer.status != 503:
                self._bad[f"{way} {answer.status}"] += 1

    async def ask(self) -> None:
        """Over HTTP, as a whole or as a stream."""
        await self._post("responses", "/v1/responses", self._body(stream=self._chance.random() < 0.5))

    async def chat(self) -> None:
        """The older API."""
        body = {"messages": [{"role": "user", "content": prompt(self._chance, 20)}], "max_tokens": 20}
        await self._post("chat", "/v1/chat/completions", body | {"stream": self._chance.random() < 0.5})

    async def leave(self) -> None:
        """Go away in the middle."""
        async with self._service.socket(self._label) as socket:
            task = asyncio.create_task(events_of(socket, self._body()))
            await asyncio.sleep(self._chance.uniform(0, 1))
            socket.transport.abort()
            await asyncio.gather(task, return_exceptions=True)
        self._seen["left"] += 1

    async def cancel(self) -> None:
        """Stop an answer over HTTP."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._chance.uniform(0, 1)):
                await self.ask()
        self._seen["stopped"] += 1

    async def junk(self) -> None:
        """Bodies that are none."""
        await self._post(
            "junk", "/v1/responses", self._chance.choice(({}, {"input": 1}, {"input": "x", "model": "no"}))
        )

    async def look(self) -> None:
        """What needs no tokens."""
        async with self._service.session(self._label) as http:
            for path in ("/health", "/ready", "/props", "/metrics", "/v1/models", "/nothing"):
                async with http.get(path) as answer:
                    await answer.read()


async def fill(service: OwnService, seed: int) -> None:
    """Write every page of the KV memory once."""
    chance = random.Random(seed)
    label = next(iter(KEYS))
    async with service.session(label, 10 * PATIENCE_S) as http:

        async def ask() -> None:
            body = {"input": prompt(chance, FILLING_WORDS), "max_output_tokens": 20}
            async with http.post("/v1/responses", json=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"a prompt that fills the memory got {answer.status}: {await answer.text()}")

        await asyncio.gather(*(ask() for _ in range(FILLING)))
    print(f"filled: {service.figures()[0]:.0f} MB resident", flush=True)


async def run(
    service: OwnService, minutes: float, seed: int
) -> tuple[list[Reading], Counter[str], Counter[str], float]:
    """Readings, what was seen, what was bad, and streams that were left at the end."""
    seen: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    await fill(service, seed)
    begun = time.monotonic()
    end = begun + 60 * minutes
    clients = [asyncio.create_task(Client(service, seed + i, seen, bad).run(end)) for i in range(CLIENTS)]
    readings: list[Reading] = []
    while (now := time.monotonic()) < end:
        readings.append(Reading((now - begun) / 60, *service.figures()))
        if len(readings) % 24 == 0:
            print(f"  {readings[-1]}  {sum(seen.values())} done, {sum(bad.values())} bad", flush=True)
        await asyncio.sleep(min(EVERY_S, max(0.0, end - now)))
    await asyncio.gather(*clients)
    return readings, seen, bad, await service.idle(30)


def verdicts(
    readings: Sequence[Reading], bad: Counter[str], left: float, resting: Reading
) -> list[tuple[str, float, float]]:
    """(figure, found, the most that it may be). The last half counts: caches and pages fill in the first."""
    half = [reading for reading in readings if reading.minutes >= readings[-1].minutes / 2]
    slope = linear_regression([r.minutes for r in half], [r.resident_mb for r in half]).slope
    quarter = max(1, len(readings) // 4)
    early, late = readings[quarter : 2 * quarter] or readings[:1], readings[-quarter:]
    return [
        ("RSS slope over the last half, MB/min", round(slope, 3), MAX_SLOPE_MB_MIN),
        (
            "descriptors, last quarter over second (medians)",
            median(r.descriptors for r in late) - median(r.descriptors for r in early),
            MAX_MORE_DESCRIPTORS,
        ),
        ("descriptors at rest over the start", resting.descriptors - readings[0].descriptors, MAX_MORE_DESCRIPTORS),
        (
            "threads, last quarter over second (medians)",
            median(r.threads for r in late) - median(r.threads for r in early),
            MAX_MORE_THREADS,
        ),
        ("streams left at the end", left, 0),
        ("requests that failed, hung or were lost", sum(bad.values()), 0),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="the rest: flags of the service")
    args = parser.parse_args()
    many_descriptors()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service must not outlive us
    service = OwnService(args.model, [*FLAGS, *args.flags])
    try:
        print(f"up after {service.start():.1f} s", flush=True)
        readings, seen, bad, left = asyncio.run(run(service, args.minutes, args.seed))
        time.sleep(min(30.0, 6 * args.minutes))  # what a connection leaves behind may take a while
        resting = Reading(args.minutes, *service.figures())
        tracebacks = service.log.read_text(errors="replace").count("Traceback")
        code = service.stop()
    finally:
        service.close()
    rows = [
        *verdicts(readings, bad, left, resting),
        ("tracebacks in the log", tracebacks, 0),
        ("exit code", 1 if code is None else abs(code), 0),
    ]
    first, last = readings[0], readings[-1]
    print(f"\n{sum(seen.values())} requests: {dict(sorted(seen.items()))}")
    print(f"bad: {dict(bad)}")
    print(
        f"RSS {first.resident_mb:.0f} MB at first, {last.resident_mb:.0f} MB at last, {resting.resident_mb:.0f} at rest"
    )
    print("\n| figure | found | limit | |\n| --- | --- | --- | --- |")
    for what, found, limit in rows:
        print(f"| {what} | {found:g} | {limit:g} | {'kept' if found <= limit else 'MISSED'} |")
    return int(any(found > limit for _, found, limit in rows))


if __name__ == "__main__":
    sys.exit(main())
