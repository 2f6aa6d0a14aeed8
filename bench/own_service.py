"""A service in a process of its own, on loopback, with two clients' keys: what `abuse` and `soak` are tried on."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import websockets

KEYS = {"abuser": "sekret-of-the-abuser-4711", "victim": "sekret-of-the-victim-4712"}
_PATIENCE_S = 20.0
"""A victim that hears nothing for so long gives up, and counts so much."""
MARK = "zanzibar-quokka"
"""Stands in prompts: it must not be in the log."""
TERMINAL = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
WORDS = ("sun", "tree", "river", "why", "code", "blue", "seven", "Berg", "x=1;", "the", "of", "a", "wind", "house")


class OwnService:
    """Started by `start`; ``log`` has what it wrote."""

    def __init__(self, model: str, flags: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dspark-abuse-")
        folder = Path(self._folder.name)
        keys = folder / "keys"
        keys.touch(0o600)
        keys.write_text("".join(f"{label}:{key}\n" for label, key in KEYS.items()))
        self.log = folder / "log"
        self._command = [sys.executable, "-m", "dspark_stream", "serve", "--port", "0", "--model", model]
        self._command += ["--api-key-file", str(keys), *flags]
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self, timeout_s: float = 180.0) -> float:
        """Seconds until it could be asked."""
        begun = time.monotonic()
        before = len(self.log.read_text(errors="replace")) if self.log.exists() else 0
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        while time.monotonic() - begun < timeout_s and self.process.poll() is None:
            if found := re.search(r"is at http://127\.0\.0\.1:(\d+)", self.log.read_text(errors="replace")[before:]):
                self.port = int(found[1])
                return time.monotonic() - begun
            time.sleep(0.05)
        self.kill()
        raise SystemExit(f"the service did not start:\n{self.log.read_text()[-2000:]}")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int | None:
        """Its exit code; None if it did not end in time and was killed."""
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """Give it no chance."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Whatever happened, nothing is left."""
        self.kill()
        self._folder.cleanup()

    def figures(self) -> tuple[float, int, int]:
        """Resident megabytes, descriptors and threads, as the system says."""
        assert self.process is not None
        proc = Path(f"/proc/{self.process.pid}")
        resident = int((proc / "statm").read_text().split()[1]) * resource.getpagesize() / 1e6
        return resident, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))

    # --- asking ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def session(self, label: str | None = "victim", timeout_s: float = 120.0) -> aiohttp.ClientSession:
        """A client with a key, or without any."""
        headers = {} if label is None else {"Authorization": f"Bearer {KEYS[label]}"}
        return aiohttp.ClientSession(
            self.url,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )

    def socket(self, label: str = "victim") -> websockets.connect:
        """A WebSocket of a client."""
        return websockets.connect(
            self.url.replace("http", "ws") + "/v1/responses",
            additional_headers={"Authorization": f"Bearer {KEYS[label]}"},
            compression=None,
            max_size=None,
            open_timeout=60,
        )

    async def metrics(self) -> dict[str, float]:
        """Sample, with its labels but for the model's → value."""
        async with self.session() as http, http.get("/metrics") as answer:
            text = await answer.text()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {re.sub(r'model_name="[^"]*",?', "", name).replace("{}", ""): float(value) for name, value in lines}

    async def idle(self, timeout_s: float) -> float:
        """Streams that are still there after so long, or 0 as soon as there are none."""
        end = time.monotonic() + timeout_s
        while True:
            found = await self.metrics()
            left = sum(found[f"dspark:num_requests_{name}"] for name in ("running", "waiting", "admitted"))
            if not left or time.monotonic() > end:
                return left
            await asyncio.sleep(0.2)

    async def health(self, timeout_s: float = 30.0) -> float:
        """Seconds until a client without a key, on a connection of its own, had `/health`; endless if it had not."""
        begun = time.monotonic()
        try:
            async with self.session(None, timeout_s) as http, http.get("/health") as answer:
                return time.monotonic() - begun if answer.status == 200 else float("inf")
        except (TimeoutError, aiohttp.ClientError):
            return float("inf")


def prompt(chance: random.Random, words: int) -> str:
    """So many words, and the mark."""
    return " ".join([MARK, *(chance.choice(WORDS) for _ in range(words))])


def lag_p99_ms(before: dict[str, float], after: dict[str, float]) -> float:
    """How late the loop was, between two readings: the bucket's bound under which 99 % lie."""
    name = 'dspark:loop_lag_seconds_bucket{le="'
    bounds = sorted((float(key.removeprefix(name)[:-2]), key) for key in after if key.startswith(name))
    counts = [(bound, after[key] - before.get(key, 0.0)) for bound, key in bounds]
    total = counts[-1][1]
    return 1e3 * next(bound for bound, count in counts if count >= 0.99 * total) if total else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Of some values the one that ``share`` of them do not exceed; endless of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


async def events_of(
    socket: Any, body: dict[str, Any], seen: Callable[[dict[str, Any]], Any] = lambda _: None, patience_s: float = 120.0
) -> str:
    """Ask on a socket, and read to the end; its type, ``error`` for a refusal.

    Raises:
        TimeoutError: nothing came for so long.
    """
    await socket.send(json.dumps({"type": "response.create", **body}))
    while True:
        event = json.loads(await asyncio.wait_for(socket.recv(), patience_s))
        seen(event)
        if event["type"] in (*TERMINAL, "error"):
            return str(event["type"])


def many_descriptors() -> int:
    """Take as many as the system gives; how many that is."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


class Victim:
    """A well-behaved client that asks one question after the other; what it sees of the others."""

    def __init__(self, service: OwnService) -> None:
        self._service = service
        self.gaps_ms: list[float] = []
        self.first_ms: list[float] = []
        self.refused = 0

    async def run(self, seconds: float) -> Victim:
        """Until the time is up."""
        end = time.monotonic() + seconds
        last = 0.0
        first: list[bool] = []

        def seen(event: dict[str, Any]) -> None:
            nonlocal last
            now = time.monotonic()
            if event["type"] == "response.output_text.delta":
                (self.gaps_ms if first else self.first_ms).append(1e3 * (now - last))
                last = now
                first.append(True)
            self.refused += event["type"] == "error"

        async with self._service.socket("victim") as socket:
            while time.monotonic() < end:
                last = time.monotonic()
                first.clear()
                body = {"input": "A long story, please.", "max_output_tokens": 100, "temperature": 0}
                try:
                    await events_of(socket, {**body, "dspark": {"ignore_eos": True}}, seen, _PATIENCE_S)
                except TimeoutError:
                    (self.gaps_ms if first else self.first_ms).append(1e3 * _PATIENCE_S)
                    break
        return self
