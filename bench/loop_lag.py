"""How long the event loop is kept from its sockets while streams decode.

Runs the whole service in this process (real model, real sockets) with N clients of a second process streaming from
it, and samples the loop: a task sleeps 5 ms and notes by how much it was woken late. Every repeat measures each
number of streams in turn. Prints a table, appends to a CSV.

    python bench/loop_lag.py --streams 0 8 32 --seconds 20 --repeats 3
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import uvloop

from dspark_stream.client.connection import DsparkClient
from dspark_stream.config import Config
from dspark_stream.console import Progress
from dspark_stream.engine.build import build_engine
from dspark_stream.server.app import Server
from dspark_stream.server.settings import ServerConfig

PERIOD_S = 0.005
PROMPT = "Explain step by step how a bill becomes law, with an example."


async def client(url: str, streams: int) -> None:
    """Keep ``streams`` lanes of one socket busy until the process is ended."""
    async with await DsparkClient.connect(url) as socket:

        async def lane(i: int) -> None:
            while True:
                body = {
                    "input": f"{PROMPT} ({i})",
                    "max_output_tokens": 400,
                    "temperature": 0.0,
                    "dspark": {"seed": i, "verification": "rejection", "ignore_eos": True},
                }
                async for _ in await socket.create(body, lane=f"lane{i}"):
                    pass

        await asyncio.gather(*(lane(i) for i in range(streams)))


async def sample(seconds: float) -> list[float]:
    """Milliseconds by which the loop woke a sleeping task late."""
    late: list[float] = []
    end = time.perf_counter() + seconds
    while (before := time.perf_counter()) < end:
        await asyncio.sleep(PERIOD_S)
        late.append((time.perf_counter() - before - PERIOD_S) * 1e3)
    return sorted(late)


async def run(args: argparse.Namespace) -> list[dict[str, object]]:
    config = Config(model=args.model, drafter=args.drafter, max_num_seqs=max(args.streams) or 1)
    engine, tokenizer = build_engine(config, Progress())
    assert tokenizer is not None
    server = Server(ServerConfig(port=0), engine, tokenizer)
    await server.start()
    rows: list[dict[str, object]] = []
    try:
        for repeat in range(args.repeats):
            for streams in args.streams:
                command = [
                    sys.executable,
                    __file__,
                    "--client",
                    f"ws://127.0.0.1:{server.port}",
                    "--streams",
                    str(streams),
                ]
                clients = subprocess.Popen(command) if streams else None
                try:
                    deadline = time.perf_counter() + 60
                    while engine.snapshot().running < streams and time.perf_counter() < deadline:
                        await asyncio.sleep(0.1)
                    await asyncio.sleep(args.warmup)
                    before = engine.snapshot().generation_tokens_total
                    late = await sample(args.seconds)
                    tokens = engine.snapshot().generation_tokens_total - before
                finally:
                    if clients:
                        clients.terminate()
                        clients.wait()
                while engine.snapshot().running:
                    await asyncio.sleep(0.05)
                rows.append(
                    {
                        "repeat": repeat,
                        "streams": streams,
                        "samples": len(late),
                        "lag_p50_ms": round(median(late), 3),
                        "lag_p99_ms": round(late[int(len(late) * 0.99)], 3),
                        "lag_max_ms": round(late[-1], 3),
                        "tokens_per_s": round(tokens / args.seconds, 1),
                    }
                )
                print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    finally:
        await server.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[0, 8, 32])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--warmup", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/loop_lag.csv"))
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        asyncio.run(client(args.client, args.streams[0]))
        return
    rows = uvloop.run(run(args))
    print(f"\n{'streams':>7} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'tok/s':>8}   (medians of {args.repeats})")
    for streams in args.streams:
        mine = [r for r in rows if r["streams"] == streams]
        figures = [
            median(float(str(r[k])) for r in mine) for k in ("lag_p50_ms", "lag_p99_ms", "lag_max_ms", "tokens_per_s")
        ]
        print(f"{streams:>7} " + " ".join(f"{f:>8.2f}" for f in figures))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()} {torch.get_num_threads()} threads",
        "command": " ".join(["python", *sys.argv]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(r | about for r in rows)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
