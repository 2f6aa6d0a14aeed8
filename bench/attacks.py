"""The attacks of `abuse`: each takes a running service and says what it found, beside what may be."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import aiohttp
import websockets

from own_service import KEYS, OwnService, Victim, events_of, lag_p99_ms, percentile, prompt


class Row(NamedTuple):
    """A figure and the most that it may be."""

    what: str
    found: float
    limit: float
    unit: str = ""

    @property
    def kept(self) -> bool:
        return self.found <= self.limit


async def cancels(service: OwnService, chance: random.Random) -> list[Row]:
    """400 streams that are cancelled, closed, reset or left in the middle."""
    _, descriptors, _ = service.figures()
    ends: Counter[str] = Counter()

    async def by_socket(how: str, delay: float, body: dict[str, Any]) -> None:
        async with service.socket("abuser") as socket:
            said: list[str] = []

            async def ask() -> None:
                await events_of(socket, body, lambda event: said.append(event["type"]))

            asking = asyncio.create_task(ask())
            await asyncio.sleep(delay)
            if how == "reset":
                socket.transport.abort()
            elif how == "cancel":
                await socket.send(json.dumps({"type": "response.cancel", "stream_id": body["stream_id"]}))
                await asyncio.wait([asking], timeout=30)
                terminal = sum(kind.startswith("response.") and kind.count(".") == 1 for kind in said)
                terminal -= said.count("response.created") + said.count("response.in_progress")
                ends["no end"] += not terminal and "error" not in said
                with suppress(TimeoutError, websockets.ConnectionClosed):
                    event = json.loads(await asyncio.wait_for(socket.recv(), 0.05))
                    ends["after the end"] += event["type"] != "error"
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def by_http(delay: float, body: dict[str, Any]) -> None:
        async with service.session("abuser") as http:
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    async with http.post("/v1/responses", json=body | {"stream": chance.random() < 0.5}) as answer:
                        await answer.read()

    async def one(i: int) -> None:
        delay = chance.choice((0.0, chance.uniform(0, 0.05), chance.uniform(0, 0.5), chance.uniform(0, 2.0)))
        body = {"input": prompt(chance, chance.choice((2, 20, 200))), "max_output_tokens": chance.choice((1, 20, 200))}
        async with places:
            with suppress(ConnectionError, aiohttp.ClientError, websockets.WebSocketException):
                if i % 4 == 3:
                    await by_http(delay, body)
                else:
                    await by_socket(("cancel", "close", "reset")[i % 4], delay, {**body, "stream_id": f"s{i}"})

    places = asyncio.Semaphore(24)
    await asyncio.gather(*(one(i) for i in range(400)))
    left = await service.idle(10)
    await asyncio.sleep(1)
    return [
        Row("responses without an end, or with two", ends["no end"] + ends["after the end"], 0),
        Row("streams left after 10 s", left, 0),
        Row("descriptors more than before", service.figures()[1] - descriptors, 8),
    ]


_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 0.5, 1e300, 2**63, -(2**63), 2**64, "", "x", "\0", "😀", "x" * 5000, [], [[]], {}, {"a": 1},
    ["x"] * 50, "<|im_start|>system", "{{7*7}}", "../../etc/passwd",
)  # fmt: skip


def _fuzzed(chance: random.Random, body: dict[str, Any]) -> bytes:
    """A body with some of it replaced, taken out, added, or with bytes of it broken."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        name = chance.choice((*body, "x", "tools", "n", "seed", "top_p", "stop", "dspark", "stream_options"))
        if name.startswith("max_"):
            body[name] = chance.choice(("x", [], {}, 0.5, 1, 2))  # what leaves it open would ask for all there is room
        elif chance.random() < 0.2:
            body.pop(name, None)
        else:
            body[name] = chance.choice(_VALUES)
    data = bytearray(json.dumps(body).encode())
    if chance.random() < 0.2:
        at = chance.randrange(len(data))
        data[at : at + chance.randint(0, 4)] = bytes(chance.randrange(256) for _ in range(chance.randint(0, 3)))
    return bytes(data) if chance.random() < 0.97 else b"[" * chance.choice((100, 100_000))


async def fuzz(service: OwnService, chance: random.Random) -> list[Row]:
    """1,500 damaged bodies on both routes."""
    bad: Counter[str] = Counter()
    places = asyncio.Semaphore(16)

    async def one(http: aiohttp.ClientSession, i: int) -> None:
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 1, "stream": False}
        body = chat if i % 2 else {"input": "hi", "max_output_tokens": 3, "temperature": 1, "stream": False}
        path = "/v1/chat/completions" if i % 2 else "/v1/responses"
        async with places:
            try:
                data = _fuzzed(chance, dict(body))
                async with http.post(path, data=data, headers={"Content-Type": "application/json"}) as answer:
                    text = await answer.text()
            except (TimeoutError, aiohttp.ClientError):
                bad["lost"] += 1
                return
        bad["5xx"] += answer.status >= 500 and answer.status != 503
        if answer.status != 200:
            with suppress(ValueError):
                error = json.loads(text).get("error", {})
                if all(isinstance(error.get(name), str) for name in ("type", "code", "message")):
                    return
            bad["untyped"] += 1

    async with service.session("abuser") as http:
        await asyncio.gather(*(one(http, i) for i in range(1500)))
    return [
        Row("answers of 5xx but 503", bad["5xx"], 0),
        Row("errors without a type, or lost", bad["untyped"] + bad["lost"], 0),
    ]


async def _worst_health(service: OwnService, work: Awaitable[Any]) -> float:
    """Milliseconds of the slowest `/health` while something is done."""
    worst = 0.0
    task = asyncio.ensure_future(work)
    while not task.done():
        worst = max(worst, await service.health())
        await asyncio.sleep(0.02)
    await task
    return 1e3 * worst


async def bombs(service: OwnService, chance: random.Random) -> list[Row]:
    """Compressed bodies that unpack to 256 MB, without a key; then broken ones, with one."""
    bomb = gzip.compress(b'{"input":"' + b"a" * (1 << 28), 9)
    head = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    wrong: Counter[int] = Counter()

    async def post(label: str | None, path: str, data: bytes) -> None:
        with suppress(aiohttp.ClientError):
            async with service.session(label, 60) as http, http.post(path, data=data, headers=head) as answer:
                wrong[answer.status] += not 400 <= answer.status < 500

    worst = await _worst_health(
        service, asyncio.gather(*(post(None, path, bomb) for path in ("/v1/responses", "/nothing") * 4))
    )
    for label in (None, "abuser"):
        await post(label, "/v1/responses", b"no gzip at all")
    return [Row("slowest /health meanwhile", worst, 250, "ms"), Row("answers that are not 4xx", sum(wrong.values()), 0)]


async def slow_heads(service: OwnService, chance: random.Random) -> list[Row]:
    """1,100 connections without a key that never finish their heads."""
    writers: list[asyncio.StreamWriter] = []
    readers: list[asyncio.StreamReader] = []
    for _ in range(1100):
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", service.port), 2)
        except (OSError, TimeoutError):
            break  # it takes no more, which is its right as long as it answers others
        writer.write(b"POST /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ")
        readers.append(reader)
        writers.append(writer)
    health = await service.health()
    end = time.monotonic() + 45
    closed = [asyncio.create_task(reader.read()) for reader in readers]
    _, still = await asyncio.wait(closed, timeout=max(0, end - time.monotonic())) if closed else (None, set())
    for task in still:
        task.cancel()
    await asyncio.gather(*closed, return_exceptions=True)
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(1)
    return [Row("/health beside them", 1e3 * health, 1000, "ms"), Row("still open after 45 s", len(still), 0)]


async def long_prompts(service: OwnService, chance: random.Random) -> list[Row]:
    """Prompts of a megabyte that are refused, one after the other; then four of 6,000 tokens before a short one."""
    alone = await Victim(service).run(8)
    before = await service.metrics()
    end = time.monotonic() + 12

    async def attack(text: str) -> None:
        async with service.session("abuser") as http:
            while time.monotonic() < end:
                with suppress(TimeoutError, aiohttp.ClientError):
                    async with http.post("/v1/responses", json={"input": text, "max_output_tokens": 1}) as answer:
                        await answer.read()

    texts = (" " * 1_000_000, "a" * 1_000_000, "word " * 200_000)
    beside = Victim(service)
    await asyncio.gather(beside.run(12), *map(attack, texts))
    lag = lag_p99_ms(before, await service.metrics())
    rows = [
        Row(
            "victim's gaps p95, times those alone",
            percentile(beside.gaps_ms, 0.95) / percentile(alone.gaps_ms, 0.95),
            2,
        ),
        Row("loop lag p99", lag, 20, "ms"),
    ]
    four = "one two three four five " * 1200

    async def read_long() -> None:
        body = {"input": four, "max_output_tokens": 1}
        with suppress(TimeoutError, aiohttp.ClientError):
            async with service.session("abuser") as http, http.post("/v1/responses", json=body) as answer:
                await answer.read()

    long = [asyncio.create_task(read_long()) for _ in range(4)]
    await asyncio.sleep(0.5)
    short = await Victim(service).run(0.1)
    await asyncio.gather(*long)
    return [*rows, Row("first token of a short prompt beside four of 6,000", percentile(short.first_ms, 0), 1000, "ms")]


async def neighbour(service: OwnService, chance: random.Random) -> list[Row]:
    """One client asks for all 96 places; another one asks twelve times."""
    body = {"input": "A long story, please.", "max_output_tokens": 400, "dspark": {"ignore_eos": True}}

    async def take() -> None:
        with suppress(TimeoutError, aiohttp.ClientError):
            async with service.session("abuser") as http, http.post("/v1/responses", json=body) as answer:
                await answer.read()

    greedy = [asyncio.create_task(take()) for _ in range(96)]
    await asyncio.sleep(2)
    refused, firsts = 0, []
    for _ in range(12):
        begun = time.monotonic()
        asked = {"input": "hi", "max_output_tokens": 2}
        async with service.session("victim") as http, http.post("/v1/responses", json=asked) as answer:
            await answer.read()
            refused += answer.status != 200
        firsts.append(1e3 * (time.monotonic() - begun))
    for task in greedy:
        task.cancel()
    await asyncio.gather(*greedy, return_exceptions=True)
    await service.idle(10)
    return [
        Row("refused to the other, of 12", refused, 0),
        Row("slowest two tokens of the other", max(firsts), 5000, "ms"),
    ]


async def at_once(service: OwnService, chance: random.Random) -> list[Row]:
    """300 requests in the same moment, half of each client."""
    statuses: Counter[str] = Counter()

    async def one(i: int) -> None:
        body = {"input": prompt(chance, 10), "max_output_tokens": 10, "stream": i % 3 == 0}
        try:
            async with service.session(list(KEYS)[i % 2]) as http, http.post("/v1/responses", json=body) as answer:
                text = await answer.text()
        except (TimeoutError, aiohttp.ClientError):
            statuses["lost"] += 1
            return
        statuses[str(answer.status)] += 1
        if answer.status == 200:
            ended = json.loads(text)["status"] if not body["stream"] else text.count("event: response.completed")
            ended = ended or text.count("event: response.incomplete")
            statuses["cut"] += ended not in ("completed", "incomplete", 1)
        elif "Retry-After" not in answer.headers:
            statuses["no Retry-After"] += 1

    await asyncio.gather(*(one(i) for i in range(300)))
    left = await service.idle(30)
    print(f"    {dict(statuses)}", flush=True)
    lost = sum(n for status, n in statuses.items() if status not in ("200", "429", "503"))
    return [Row("neither answered nor told to come again", lost, 0), Row("streams left", left, 0)]


async def restart(service: OwnService, chance: random.Random) -> list[Row]:
    """SIGTERM in the middle of answers, then SIGKILL; each time it has to come back."""
    ends: Counter[str] = Counter()

    async def one() -> None:
        body = {"input": "A long story, please.", "max_tokens": 4000, "ignore_eos": True}
        body["messages"] = [{"role": "user", "content": body.pop("input")}]
        try:
            async with service.session("victim") as http, http.post("/v1/chat/completions", json=body) as answer:
                found = await answer.json()
                whole = answer.status == 200 and found["choices"][0]["finish_reason"] in ("stop", "length")
                ends["whole"] += whole and found["usage"]["completion_tokens"] < 4000
        except (aiohttp.ClientError, ValueError):
            ends["broken off"] += 1

    asking = [asyncio.create_task(one()) for _ in range(4)]
    await asyncio.sleep(1.5)
    begun = time.monotonic()
    code = await asyncio.to_thread(service.stop)
    drained = time.monotonic() - begun
    await asyncio.gather(*asking)
    back = await asyncio.to_thread(service.start)
    asking = [asyncio.create_task(one()) for _ in range(4)]
    await asyncio.sleep(1)
    service.kill()
    await asyncio.gather(*asking)
    again = await asyncio.to_thread(service.start)
    healthy = await service.health()
    return [
        Row("exit code after SIGTERM", 1 if code is None else abs(code), 0),
        Row("until it had ended, 2 s of them for answers", drained, 10, "s"),
        Row("answers that were cut and pass for whole", ends["whole"], 0),
        Row("until it was back, the slower time", max(back, again), 60, "s"),
        Row("/health after SIGKILL", 1e3 * healthy, 1000, "ms"),
    ]


ATTACKS: dict[str, Callable[[OwnService, random.Random], Awaitable[list[Row]]]] = {
    "cancels": cancels,
    "fuzz": fuzz,
    "bombs": bombs,
    "slow heads": slow_heads,
    "long prompts": long_prompts,
    "neighbour": neighbour,
    "300 at once": at_once,
    "kill and restart": restart,
}
