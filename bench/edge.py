"""A CPU without a GPU: what speculation brings, and this project beside llama.cpp, OpenVINO GenAI and vLLM on the same
GGUF file, in one run.

Every engine lives in a process of its own and only one computes at a time. Variants take turns in every repeat on the
same prompts, under the file's own chat template; ratios are taken within a repeat, figures are medians. What memory
gives is measured again and again in between. With one stream answers end where the model ends them; with many they
go on to lengths of their own, so that loads are what they are called. A peer that is not installed or fails says so
in its row. Peers may live in an environment of their own:

    python -m venv runs/peers && runs/peers/bin/pip install -r bench/requirements.txt
    python bench/edge.py --repeats 3 --sampled --peers-python runs/peers/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import msgspec

from common import write_csv
from dspark_stream.config import DEFAULT_MODEL, default_cache_dir
from dspark_stream.console import Progress
from dspark_stream.measure.evaluate import GOLDEN, read_prompts
from dspark_stream.models.fetch import model_path
from dspark_stream.models.gguf import GgufFile
from dspark_stream.models.recommended import recommended_sampling
from dspark_stream.models.tokenizer import codec_from_gguf
from dspark_stream.types import RecommendedSampling

HERE = Path(__file__).parent
PEERS = {
    "llama": "llama.cpp",
    "openvino": "OpenVINO GenAI",
    "lookup": "OpenVINO GenAI, prompt lookup",
    "vllm": "vLLM",
}
ROWS = (1, 2, 4, 8, 16)
CONTEXT = 256
LEAST_ANSWERS = 12
FILLED_STREAMS, FILLED_TOKENS, LAST_TOKENS = 4, 2048, 64
READY_WITHIN_S = 600.0
USER, IN_ALL, LENGTH = "tokens/s of the user", "tokens/s in all", "accepted length"


class Variant(NamedTuple):
    """One way of ours to write."""

    name: str
    how: str
    sampled: bool = False


PLAIN, ADAPTIVE, ONE = Variant("plain", "plain"), Variant("DSpark", "adaptive"), Variant("fixed:1", "fixed:1")
SAMPLED_PLAIN, SAMPLED = Variant("plain, sampled", "plain", True), Variant("DSpark, sampled", "adaptive", True)
RATIOS = (
    (ADAPTIVE.name, PLAIN.name),
    (ADAPTIVE.name, PEERS["llama"]),
    (PLAIN.name, PEERS["llama"]),
    (ADAPTIVE.name, ONE.name),
    (SAMPLED.name, SAMPLED_PLAIN.name),
)


class Worker:
    """An engine's process. ``error``: why there is none any more."""

    def __init__(
        self, python: str, kind: str, model: str, threads: int, most: int = 0, tree: Path | None = None
    ) -> None:
        """``tree``: a working tree of this project to run, in place of the one that is installed."""
        self.error = ""
        command = [python, str((tree or HERE.parent) / "bench/edge_worker.py"), kind, model, str(threads), str(most)]
        sources = {"PYTHONPATH": f"{tree / 'src'}{os.pathsep}{tree / 'kernels'}"} if tree else {}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **sources}
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        said = json.loads(line) if line else {"error": f"its process ended with status {self._process.wait()}"}
        self.error = said.get("error", "")
        return dict(said)

    def ask(self, do: str, **values: object) -> dict[str, Any]:
        """One command's answer, which has an ``error`` where there is none."""
        if self.error:
            return {"error": self.error}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
        return self._read()

    def must(self, do: str, **values: object) -> dict[str, Any]:
        """The same of our own engine, without which there is nothing to compare."""
        answer = self.ask(do, **values)
        if "error" in answer:
            raise SystemExit(f"dspark-stream: {answer['error']}; more of it is above")
        return answer

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class Figures:
    """All that was measured."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self._found: dict[tuple[str, str, str], dict[int, float]] = {}

    def note(self, what: str, engine: str, value: float, repeat: int = 0, where: str = "") -> None:
        """One figure of an engine; ``where``: the prompts, the streams or the rows."""
        self.rows.append({"what": what, "where": where, "engine": engine, "repeat": repeat, "value": round(value, 4)})
        self._found.setdefault((what, engine, where), {})[repeat] = value
        print(f"  {repeat} {what:<22} {where:<12} {engine:<30} {value:10.3f}", flush=True)

    def left_out(self, engine: str, why: str) -> None:
        """A peer that cannot be measured."""
        self.rows.append({"what": f"left out: {why}", "where": "", "engine": engine, "repeat": 0, "value": ""})
        print(f"{engine} is left out: {why}")

    def middle(self, what: str, engine: str, where: str = "") -> float:
        """The median over repeats; not a number where there is none."""
        return median(self._found.get((what, engine, where), {0: math.nan}).values())

    def ratio(self, what: str, engine: str, other: str, where: str = "") -> float:
        """The median of what it was of the other's in the same repeat."""
        theirs = self._found.get((what, other, where), {})
        own = self._found.get((what, engine, where), {})
        return median([own[r] / theirs[r] for r in own if theirs.get(r)] or [math.nan])

    def spread(self, what: str, engine: str) -> tuple[float, float, float]:
        """The least, the median and the most."""
        values = self._found[what, engine, ""].values()
        return min(values), median(values), max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a .gguf file")
    parser.add_argument("--tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    names = [HERE / "prompts" / f"{name}.jsonl" for name in ("code", "math", "chat")]
    parser.add_argument("--prompts", type=Path, nargs="+", default=names, help="first turns are asked")
    parser.add_argument("--limit", type=int, default=8, help="prompts of each file")
    parser.add_argument("--streams", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--sampled", action="store_true", help="many streams at the recommended sampling too")
    parser.add_argument("--peers-python", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--out", type=Path, default=Path("runs/edge.csv"))
    args = parser.parse_args()
    path = model_path(args.model, default_cache_dir(), Progress())
    codec = codec_from_gguf(GgufFile(Path(path)).fields)
    sets = {
        file.stem: [
            codec.encode_chat([(m.role, m.content) for m in p.messages]) for p in read_prompts(file, args.limit)
        ]
        for file in args.prompts
    }
    text = codec.encode((HERE / "perplexity.txt").read_text())
    figures = Figures()

    for repeat in range(args.repeats + 1):
        took_s = start_to_ready(args.model, args.threads)
        if repeat:  # the first sets up
            figures.note("seconds to ready", "dspark", took_s, repeat)
    figures.note("MiB of full streams", "dspark", filled(args.model, args.threads, text) / 2**20)

    own = Worker(sys.executable, "dspark", args.model, args.threads, max(16, *args.streams))
    about = own.must("about")
    if not about["drafter"]:
        print("no drafter is shipped for this model: nothing is speculated")
    peers = {kind: Worker(args.peers_python, kind, path, args.threads) for kind in PEERS}
    bench = Bench(figures, own, peers, about, recommended_sampling(args.model), args.tokens)
    bench.warm_up(sets)
    for repeat in range(1, args.repeats + 1):
        for name, prompts in sets.items():
            bench.one_stream(name, prompts, repeat)
        mixed = [ids for some in zip(*sets.values(), strict=False) for ids in some]
        for streams in args.streams:
            bench.many_streams(mixed, streams, repeat, args.sampled)
        bench.passes(repeat)
    for engine, worker in bench.judges():
        if "error" not in (answer := worker.ask("likelihood", ids=text[:1024])):
            figures.note("perplexity", engine, math.exp(answer["nll"]))
    for worker in (own, *peers.values()):
        worker.close()
    write_csv(args.out, figures.rows)
    report(figures, bench, list(sets), args, Path(path).stat().st_size)


class Bench:
    """What is asked of the engines."""

    def __init__(
        self,
        figures: Figures,
        own: Worker,
        peers: dict[str, Worker],
        about: dict[str, Any],
        sampling: RecommendedSampling,
        tokens: int,
    ) -> None:
        self.figures, self.own, self.peers, self.about, self.tokens = figures, own, peers, about, tokens
        said = {name: v for name, v in msgspec.to_builtins(sampling).items() if v is not None}
        self.sampling = {"temperature": 1.0, **said}
        self.one = [PLAIN, ADAPTIVE, ONE, SAMPLED_PLAIN, SAMPLED] if about["drafter"] else [PLAIN, SAMPLED_PLAIN]
        self.same = self.texts = self._rates = 0

    def judges(self) -> Iterator[tuple[str, Worker]]:
        """Engines that show what is inside them."""
        yield "dspark", self.own
        yield PEERS["llama"], self.peers["llama"]

    def written(self, variant: Variant, prompts: list[list[int]], tokens: list[int], repeat: int,
                streams: int = 1) -> dict[str, Any]:  # fmt: skip
        """Answers of ours; those of many streams do not end by themselves."""
        return self.own.must(
            "generate",
            prompts=prompts,
            tokens=tokens,
            streams=streams,
            how=variant.how,
            sampling=self.sampling if variant.sampled else None,
            seed=1 + 10_000 * repeat,
            ends=self.about["ends"] if streams == 1 else None,
        )

    def warm_up(self, sets: dict[str, list[list[int]]]) -> None:
        """Everybody answers once; peers that cannot are known then."""
        prompts = next(iter(sets.values()))[:1]
        for variant in self.one:
            self.written(variant, prompts, [self.tokens], 0)
        for kind, worker in self.peers.items():
            worker.ask("generate", prompts=prompts, tokens=[self.tokens], ends=self.about["ends"])
            if worker.error:
                self.figures.left_out(PEERS[kind], worker.error)

    def memory_gives(self) -> None:
        """What these threads can read now."""
        self._rates += 1
        self.figures.note("GB/s read", "memory", self.own.must("read_rate")["bytes_per_s"] / 1e9, self._rates)

    def one_stream(self, where: str, prompts: list[list[int]], repeat: int) -> None:
        """One prompt after the other, everybody in turn."""
        tokens = [self.tokens] * len(prompts)

        def of_ours(variant: Variant) -> Callable[[], dict[str, Any]]:
            return lambda: self.written(variant, prompts, tokens, repeat)

        def of_peer(worker: Worker) -> Callable[[], dict[str, Any]]:
            return lambda: worker.ask("generate", prompts=prompts, tokens=tokens, ends=self.about["ends"])

        turns = [(variant.name, of_ours(variant)) for variant in self.one]
        turns += [(PEERS[kind], of_peer(worker)) for kind, worker in self.peers.items()]
        first = repeat % len(turns)  # nobody always goes first
        texts: dict[str, list[list[int]]] = {}
        for name, write in turns[first:] + turns[:first]:
            answer = write()
            if "error" in answer:
                continue
            texts[name] = answer["ids"]
            if answer["user_s"]:
                self.figures.note(USER, name, answer["user_tokens"] / answer["user_s"], repeat, where)
            self.figures.note(IN_ALL, name, sum(map(len, answer["ids"])) / answer["seconds"], repeat, where)
            if "accepted_length" in answer:
                self.figures.note(LENGTH, name, answer["accepted_length"], repeat, where)
        for variant in (ADAPTIVE, ONE) if self.about["drafter"] else ():
            self.same += sum(a == b for a, b in zip(texts[PLAIN.name], texts[variant.name], strict=True))
            self.texts += len(prompts)
        self.memory_gives()

    def many_streams(self, prompts: list[list[int]], streams: int, repeat: int, sampled: bool) -> None:
        """Adaptive against plain with so many streams kept busy."""
        count = max(LEAST_ANSWERS, 2 * streams)
        asked = [prompts[i % len(prompts)] for i in range(count)]
        # lengths less or more a half, evenly: streams of one length would all end in the same round
        tokens = [max(1, round(self.tokens * (0.5 + i * GOLDEN % 1.0))) for i in range(count)]
        for pair in ((PLAIN, ADAPTIVE), (SAMPLED_PLAIN, SAMPLED))[: 1 + sampled]:
            turns = [v for v in pair if v in self.one]
            # there and back: a machine that becomes slower does so for both
            answers = [(v, self.written(v, asked, tokens, repeat, streams)) for v in (*turns, *reversed(turns))]
            for variant in turns:
                own = [answer for v, answer in answers if v is variant]
                written, seconds = sum(len(ids) for a in own for ids in a["ids"]), sum(a["seconds"] for a in own)
                length = fmean(a["accepted_length"] for a in own)
                self.figures.note(IN_ALL, variant.name, written / seconds, repeat, str(streams))
                self.figures.note(LENGTH, variant.name, length, repeat, str(streams))
        self.memory_gives()

    def passes(self, repeat: int) -> None:
        """Passes over few and many rows."""
        for rows in ROWS:
            for engine, worker in self.judges():
                if "error" not in (answer := worker.ask("one_pass", rows=rows, context=CONTEXT)):
                    self.figures.note("ms a pass", engine, answer["ms"], repeat, str(rows))
            self.memory_gives()


def start_to_ready(model: str, threads: int) -> float:
    """Seconds from starting a service until it says that it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dspark_stream", "serve", model, "--threads", str(threads), "--port", str(port)]
    begun = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None and time.perf_counter() - begun < READY_WITHIN_S:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                return time.perf_counter() - begun
            time.sleep(0.01)
    finally:
        server.terminate()
        server.wait()
    raise SystemExit(f"the service did not get ready: {' '.join(command)}")


def filled(model: str, threads: int, text: list[int]) -> int:
    """Resident bytes of an engine as a service has it, once a few streams are full."""
    worker = Worker(sys.executable, "dspark", model, threads)
    ids = (text * (1 + FILLED_TOKENS // len(text)))[: FILLED_TOKENS - LAST_TOKENS]
    how = "adaptive" if worker.must("about")["drafter"] else "plain"
    worker.must(
        "generate",
        prompts=[ids] * FILLED_STREAMS,
        tokens=[LAST_TOKENS] * FILLED_STREAMS,
        streams=FILLED_STREAMS,
        how=how,
    )
    found = int(worker.must("memory")["bytes"])
    worker.close()
    return found


def table(title: str, head: list[str], lines: list[list[object]]) -> None:
    """Columns of one width; what is not a number is left out."""
    print(f"\n{title}")
    for line in [head, *lines]:
        shown = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in line[1:]]
        print(f"{line[0]!s:<32}" + "".join(f"{'' if x == 'nan' else x:>13}" for x in shown))


def report(figures: Figures, bench: Bench, sets: list[str], args: argparse.Namespace, file_bytes: int) -> None:
    """The tables."""
    own, middle, ratio = [v.name for v in bench.one], figures.middle, figures.ratio
    said = ", ".join(f"{name} {value:g}" for name, value in bench.sampling.items())
    print(f"\n{args.model} on {args.threads} threads, medians of {args.repeats}; sampled: {said}, by rejection")
    for name in sets:
        lines: list[list[object]] = [
            [v, *(middle(what, v, name) for what in (USER, IN_ALL, LENGTH))]
            for v in [*own, *(PEERS[kind] for kind, worker in bench.peers.items() if not worker.error)]
        ]
        lines += [[PEERS[kind], worker.error] for kind, worker in bench.peers.items() if worker.error]
        table(f"one stream, {name}: tokens/s", ["", "of the user", "in all", "accepted"], lines)
    ratios = [[f"{a} / {b}", *(ratio(USER, a, b, n) for n in sets), *(ratio(IN_ALL, a, b, n) for n in sets)]
              for a, b in RATIOS]  # fmt: skip
    table("one stream, ratios: of the user; in all", ["", *sets, *sets], ratios)
    if bench.texts:
        print(f"greedy texts that are the plain one's: {bench.same} of {bench.texts}")

    loads = [str(n) for n in args.streams]
    lines = []
    for plain, fast in ((PLAIN, ADAPTIVE), (SAMPLED_PLAIN, SAMPLED)):
        if plain is PLAIN or args.sampled:
            for v in (plain, fast) if bench.about["drafter"] else (plain,):
                lines.append([v.name, *(middle(IN_ALL, v.name, n) for n in loads)])
            if bench.about["drafter"]:
                lines.append(["  their ratio", *(ratio(IN_ALL, fast.name, plain.name, n) for n in loads)])
                lines.append(["  accepted length", *(middle(LENGTH, fast.name, n) for n in loads)])
    table("tokens/s in all, by streams", ["", *loads], lines)

    lines = []
    for engine, _ in bench.judges():
        times = [middle("ms a pass", engine, str(n)) for n in ROWS]
        lines += [[engine, *times], ["  of one row's", *(t / times[0] for t in times)]]
    table(f"ms of a pass at {CONTEXT} tokens, by rows", ["", *map(str, ROWS)], lines)

    least, rate, most = figures.spread("GB/s read", "memory")
    floor_ms = bench.about["bytes"] / rate / 1e6
    users = [floor_ms * middle(USER, PLAIN.name, name) / 1e3 for name in sets]
    lines = [
        ["MB that a pass reads", bench.about["bytes"] / 1e6],
        ["GB/s: least, median, most", least, rate, most],
        ["ms that this takes", floor_ms],
        ["share of it, a pass of one row", floor_ms / middle("ms a pass", "dspark", "1")],
        [f"share of it, plain ({', '.join(sets)})", *users],
        ["seconds from start to ready", middle("seconds to ready", "dspark")],
        [f"MiB, {FILLED_STREAMS} streams of {FILLED_TOKENS}", middle("MiB of full streams", "dspark")],
        ["  without the file's size", middle("MiB of full streams", "dspark") - file_bytes / 2**20],
        *([f"perplexity, {engine}", middle("perplexity", engine)] for engine, _ in bench.judges()),
    ]
    table("the machine and the rest", [""], lines)


if __name__ == "__main__":
    main()
