"""Decoding while other programs want the cores: tokens a second alone and beside busy loops.

Variants take turns in every repeat; figures are medians, and parts are of the same variant's median alone. The fair
part of the cores is printed beside them: that of so many threads among all that want one. Trees of this project can be
held against each other, and llama.cpp from an environment of its own:

    python bench/contention.py
    python bench/contention.py --source before=../before --source after=. --peers-python runs/peers/bin/python
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from common import write_csv
from dspark_stream.config import DEFAULT_MODEL, default_cache_dir
from dspark_stream.console import Progress
from dspark_stream.measure.evaluate import read_prompts
from dspark_stream.models.fetch import model_path
from dspark_stream.models.gguf import GgufFile
from dspark_stream.models.tokenizer import codec_from_gguf
from edge import HERE, PEERS, Worker

LOOP = "while True: pass"
HOW = {"plain": "plain", "DSpark": "adaptive"}


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many other programs that want a core each."""
    others = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(loops)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def fair_part(threads: int, loops: int) -> float:
    """What so many threads get of what they get alone, if everybody who wants a core gets as much."""
    cores = os.cpu_count() or 1
    return min(threads, cores, cores * threads / (threads + loops)) / min(threads, cores)


class Asked:
    """One model's prompts, and whoever answers them."""

    def __init__(self, model: str, sources: dict[str, str], args: argparse.Namespace, stack: ExitStack) -> None:
        path = model_path(model, default_cache_dir(), Progress())
        codec = codec_from_gguf(GgufFile(Path(path)).fields)
        prompts = read_prompts(HERE / "prompts" / "code.jsonl", args.limit)
        self.prompts = [codec.encode_chat([(m.role, m.content) for m in p.messages]) for p in prompts]
        self.prompts = [self.prompts[i % len(self.prompts)] for i in range(max(len(self.prompts), args.streams))]
        self.args = args
        self.answers: dict[str, object] = {}
        self.workers: dict[str, Worker] = {}
        for name, folder in sources.items():
            tree = Path(folder).resolve()
            os.environ["PYTHONPATH"] = f"{tree / 'src'}{os.pathsep}{tree / 'kernels'}"
            self.workers[name] = Worker(sys.executable, "dspark", model, args.threads, max(16, args.streams))
        if args.peers_python and args.streams == 1:
            self.workers[PEERS["llama"]] = Worker(args.peers_python, "llama", path, args.threads)
        for worker in self.workers.values():
            stack.callback(worker.close)

    def variants(self) -> list[tuple[str, str]]:
        """Who answers, and how."""
        return [(who, how) for who in self.workers for how in (HOW if who not in PEERS.values() else ["plain"])]

    def speed(self, who: str, how: str) -> float:
        """Tokens a second of all answers together, after the first of each."""
        lengths = [self.args.tokens] * len(self.prompts)
        if who in PEERS.values():
            told = self.workers[who].ask("generate", prompts=self.prompts, tokens=lengths, ends=[])
        else:
            told = self.workers[who].must(
                "generate", prompts=self.prompts, tokens=lengths, streams=self.args.streams, how=HOW[how]
            )
            if self.args.streams == 1 and self.answers.setdefault(how, told["ids"]) != told["ids"]:
                print(f"{who}, {how}: other answers than before")
        return float(self.args.streams * told["user_tokens"] / told["user_s"]) if "error" not in told else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[DEFAULT_MODEL, "smollm2-135m"])
    parser.add_argument("--source", action="append", metavar="NAME=FOLDER", help="a tree of this project")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4], help="loops; parts are of the first")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--limit", type=int, default=2, help="prompts")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers-python", help="the Python that has llama.cpp")
    parser.add_argument("--out", type=Path, default=Path("runs/contention.csv"))
    args = parser.parse_args()
    sources = dict(text.split("=", 1) for text in args.source or [f"this={HERE.parent}"])
    rows: list[dict[str, object]] = []
    for model in args.models:
        with ExitStack() as stack:
            asked = Asked(model, sources, args, stack)
            turns = asked.variants()
            for turn in turns:
                asked.speed(*turn)
            found: dict[tuple[str, str, int], list[float]] = {}
            for repeat in range(args.repeats):
                for loops in args.busy:
                    with busy(loops):
                        for turn in turns[repeat % len(turns) :] + turns[: repeat % len(turns)]:
                            speed = asked.speed(*turn)
                            found.setdefault((*turn, loops), []).append(speed)
                            print(f"  {repeat} {loops} {', '.join(turn):<24} {speed:8.1f}", flush=True)
        print(f"\n{model}, {args.streams} streams, {args.threads} threads on {os.cpu_count()} cores")
        print("  busy loops, fair part   " + "".join(f"{n:>8} {fair_part(args.threads, n):>6.0%}" for n in args.busy))
        for who, how in turns:
            middle = {n: median(found[who, how, n]) for n in args.busy}
            print(
                f"  {who + ', ' + how:<24}"
                + "".join(f"{middle[n]:>8.1f} {middle[n] / middle[args.busy[0]]:>6.0%}" for n in args.busy)
            )
            for n in args.busy:
                rows += [
                    {"model": model, "engine": who, "how": how, "streams": args.streams, "busy": n, "repeat": i}
                    | {"tokens_per_s": round(value, 2), "fair_part": round(fair_part(args.threads, n), 3)}
                    for i, value in enumerate(found[who, how, n])
                ]
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
