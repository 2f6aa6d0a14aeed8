"""The whole service from outside: many clients over WebSockets against a server in a process of its own.

Closed loop: so many clients, each with a socket, ask one question after the other. Then Poisson arrivals at rising
rates, one socket an arrival, and goodput: answers a second that kept the limits on first token and time per token.
Reported are time to first token, time per token, gaps between chunks, bytes a token, how late the server's event loop
ran (its own histogram), and fairness: the slowest stream's speed over the median. Bytes are those of JSON frames.

(Not named "socket": files here come before the standard library's when a bench runs.)

    python bench/sockets.py --clients 1 8 64 --rates 0.5 1 2 4 --seconds 20
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec

from common import write_csv, write_picture
from dspark_stream.client.connection import ClientError, DsparkClient
from dspark_stream.measure.plot import Series, line_chart
from dspark_stream.measure.sweep import shipped_prompts

QUESTIONS = [p.messages[0].content for p in shipped_prompts()]


@dataclass
class Answer:
    """What one client saw of one response; times in milliseconds."""

    first_token: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    decode: float = 0.0
    """From the first token to the last."""
    frame_bytes: int = 0
    lost: bool = True

    @property
    def per_token(self) -> float:
        """Milliseconds a token after the first."""
        return self.decode / max(1, self.tokens - 1)


async def ask(client: DsparkClient, number: int, args: argparse.Namespace) -> Answer:
    """One question to its end."""
    body = {
        "input": QUESTIONS[number % len(QUESTIONS)],
        "max_output_tokens": args.tokens,
        "temperature": args.temperature,
        "store": False,
        "dspark": {"seed": number, "verification": "rejection", "ignore_eos": True, "mode": args.mode},
    }
    answer, asked = Answer(), time.perf_counter()
    last = first = 0.0
    async for event in await client.create(body):
        now = time.perf_counter()
        answer.frame_bytes += len(msgspec.json.encode(event))
        if event["type"] == "response.output_text.delta":
            if first:
                answer.gaps.append(1e3 * (now - last))
            else:
                first, answer.first_token = now, 1e3 * (now - asked)
            last = now
        elif event["type"] in ("response.completed", "response.incomplete"):
            answer.tokens, answer.lost = event["response"]["usage"]["output_tokens"], False
    answer.decode = 1e3 * (last - first)
    return answer


async def closed_loop(url: str, clients: int, args: argparse.Namespace) -> list[Answer]:
    """So many clients, each busy until the time is up; answers under way then are finished and counted."""
    end = time.perf_counter() + args.seconds
    answers: list[Answer] = []

    async def one(i: int) -> None:
        async with await DsparkClient.connect(url) as client:
            number = i
            while time.perf_counter() < end:
                answers.append(await guarded(client, number, args))
                number += clients

    await asyncio.gather(*(one(i) for i in range(clients)))
    return answers


async def arrivals(url: str, rate: float, args: argparse.Namespace) -> list[Answer]:
    """Clients that come at random, ``rate`` a second on the average, ask once and go."""
    end, chance, running = time.perf_counter() + args.seconds, random.Random(1), []

    async def one(i: int) -> Answer:
        try:
            async with await DsparkClient.connect(url) as client:
                return await guarded(client, i, args)
        except ClientError:
            return Answer()

    while time.perf_counter() < end:
        running.append(asyncio.create_task(one(len(running))))
        await asyncio.sleep(chance.expovariate(rate))
    return list(await asyncio.gather(*running))


async def guarded(client: DsparkClient, number: int, args: argparse.Namespace) -> Answer:
    """A refused or broken answer counts as lost."""
    try:
        return await ask(client, number, args)
    except ClientError:
        return Answer()


@contextmanager
def service(args: argparse.Namespace) -> Iterator[str]:
    """A server on a free port until the block ends; its address."""
    command = [sys.executable, "-m", "dspark_stream", "serve", "--port", "0", "--model", args.model]
    command += ["--drafter", args.drafter, "--schedule", args.schedule, "--max-num-seqs", str(max(args.clients))]
    command += ["--max-model-len", "2048", "--max-queue", "1024", "--max-streams-per-client", "4096"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                yield found[0].rstrip("/")
                return
        raise SystemExit("the service did not start")
    finally:
        process.terminate()
        process.wait(60)


def loop_lag(url: str) -> dict[float, int]:
    """The server's histogram of how late its loop was: bound in seconds → observations up to it."""
    with urllib.request.urlopen(f"{url}/metrics") as page:
        text = page.read().decode()
    found = re.findall(r'dspark:loop_lag_seconds_bucket\{.*le="([^"]+)"\} (\d+)', text)
    return {float(bound.replace("+Inf", "inf")): int(count) for bound, count in found}


def lag_p99_ms(before: dict[float, int], after: dict[float, int]) -> float:
    """The bound under which 99 % of what came between two histograms lies."""
    counts = {bound: after[bound] - before.get(bound, 0) for bound in sorted(after)}
    total = counts[float("inf")]
    return 1e3 * next(bound for bound, count in counts.items() if count >= 0.99 * total) if total else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values the one that ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def summary(
    kind: str, load: float, answers: Sequence[Answer], took_s: float, lag: float, args: argparse.Namespace
) -> dict[str, object]:
    """One line of the table."""
    told = [a for a in answers if not a.lost and a.tokens > 1]
    gaps = [gap for a in told for gap in a.gaps]
    speeds = [1e3 / a.per_token for a in told if a.per_token > 0]
    good = [a for a in told if a.first_token <= args.limit_first_ms and a.per_token <= args.limit_token_ms]
    tokens = sum(a.tokens for a in told)
    return {
        "kind": kind,
        "load": load,
        "answers": len(answers),
        "lost": sum(a.lost for a in answers),
        "tokens_per_s": round(tokens / took_s, 1),
        "first_token_p50_ms": round(percentile([a.first_token for a in told], 0.5), 1),
        "first_token_p99_ms": round(percentile([a.first_token for a in told], 0.99), 1),
        "per_token_p50_ms": round(percentile([a.per_token for a in told], 0.5), 2),
        "per_token_p99_ms": round(percentile([a.per_token for a in told], 0.99), 2),
        "gap_p50_ms": round(percentile(gaps, 0.5), 2),
        "gap_p99_ms": round(percentile(gaps, 0.99), 2),
        "fairness": round(min(speeds) / median(speeds), 3) if speeds else 0.0,
        "goodput_per_s": round(len(good) / took_s, 3),
        "bytes_per_token": round(sum(a.frame_bytes for a in told) / max(1, tokens), 1),
        "loop_lag_p99_ms": lag,
    }


async def run(url: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """All loads, one after the other."""
    rows: list[dict[str, object]] = []
    await closed_loop(url, 1, argparse.Namespace(**{**vars(args), "seconds": min(2.0, args.seconds)}))  # warm-up
    for kind, loads in (("clients", args.clients), ("arrivals/s", args.rates)):
        for load in loads:
            before, begun = loop_lag(url), time.perf_counter()
            if kind == "clients":
                answers = await closed_loop(url, load, args)
            else:
                answers = await arrivals(url, load, args)
            took_s = time.perf_counter() - begun
            rows.append(summary(kind, load, answers, took_s, lag_p99_ms(before, loop_lag(url)), args))
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 1.0, 2.0, 4.0], help="arrivals a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--mode", choices=("dspark", "plain"), default="dspark")
    parser.add_argument("--schedule", default="adaptive")
    parser.add_argument("--limit-first-ms", type=float, default=1000.0)
    parser.add_argument("--limit-token-ms", type=float, default=100.0)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/sockets.csv"))
    args = parser.parse_args()
    with service(args) as url:
        rows = asyncio.run(run(url, args))
    heads = list(rows[0])
    widths = {h: max(len(h), *(len(str(r[h])) for r in rows)) for h in heads}
    print("\n" + "  ".join(f"{h:>{widths[h]}}" for h in heads))
    for row in rows:
        print("  ".join(f"{row[h]!s:>{widths[h]}}" for h in heads))
    write_csv(args.out, rows)
    closed, opened = ([r for r in rows if r["kind"] == kind] for kind in ("clients", "arrivals/s"))

    def line(some: list[dict[str, object]], *names: str) -> list[Series]:
        return [Series(n, [(float(str(r["load"])), float(str(r[n]))) for r in some]) for n in names]

    write_picture(
        args.out.with_suffix(".svg"),
        [
            line_chart("Clients in a closed loop", "clients", "tokens/s", line(closed, "tokens_per_s"), log_x=True),
            line_chart("Gaps between chunks", "clients", "ms", line(closed, "gap_p50_ms", "gap_p99_ms"), log_x=True),
            line_chart("Arrivals at random", "arrivals/s", "good answers/s", line(opened, "goodput_per_s")),
        ],
    )


if __name__ == "__main__":
    main()
