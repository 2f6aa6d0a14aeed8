"""A CPU without a GPU: this project beside llama.cpp and OpenVINO GenAI on the same GGUF file, in one run.

Every engine lives in a process of its own and only one computes at a time; variants take turns in every repeat, on the
same prompts, greedy, fixed answer length; medians. Peers that are not installed are left out and said so
(pip install -r bench/requirements.txt). The machine's own limits are measured in the same run.

    python bench/edge.py --tokens 128 --repeats 3
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from dspark_kernels.cpu import cpu_name
from dspark_stream.config import default_cache_dir
from dspark_stream.evaluate import read_prompts
from dspark_stream.models.fetch import ensure_model
from dspark_stream.models.gguf import GgufFile
from dspark_stream.models.names import MODELS
from dspark_stream.models.tokenizer import codec_from_gguf
from dspark_stream.progress import Progress

PEERS = {"llama": "llama_cpp", "openvino": "openvino_genai"}
ROWS = (1, 2, 4, 8, 16)
CONTEXT = 256
TEXT = Path(__file__).parent / "perplexity.txt"
Row = dict[str, object]


class Worker:
    """An engine's process."""

    def __init__(self, kind: str, model: Path, threads: int) -> None:
        self.kind = kind
        command = [sys.executable, str(Path(__file__).parent / "edge_worker.py"), kind, str(model), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        begun = time.perf_counter()
        self._read()
        self.ready_s = time.perf_counter() - begun

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.kind} engine ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **values: object) -> dict[str, Any]:
        """One command's answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self._process.stdin.flush()
        return self._read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--limit", type=int, default=8, help="prompts for one stream; 16 streams take 16")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/edge.csv"))
    args = parser.parse_args()
    model = args.model or ensure_model(MODELS["smollm2-135m"], default_cache_dir(), Progress())
    gguf = GgufFile(model)
    codec = codec_from_gguf(gguf.fields)
    prompts = [codec.encode_chat([(m.role, m.content) for m in p.messages]) for p in read_prompts(args.prompts)]
    prompts = [prompts[i % len(prompts)] for i in range(max(16, args.limit))]
    installed = [kind for kind, module in PEERS.items() if importlib.util.find_spec(module)]
    for kind in PEERS.keys() - set(installed):
        print(f"{kind} is left out: it is not installed")
    workers = {kind: Worker(kind, model, args.threads) for kind in ("dspark", *installed)}
    rows: list[Row] = []

    def note(what: str, engine: str, value: float, repeat: int = 0) -> None:
        rows.append({"repeat": repeat, "what": what, "engine": engine, "value": round(value, 4)})
        print(f"  {what:<28} {engine:<16} {value:10.3f}", flush=True)

    for kind, worker in workers.items():
        note("seconds to ready", kind, worker.ready_s)
    variants = [("dspark", "plain"), ("dspark", "dspark"), *((kind, "plain") for kind in installed)]
    texts: dict[str, list[list[int]]] = {}
    for repeat in range(args.repeats + 1):  # the first is for warming up
        for streams, some in ((1, prompts[: args.limit]), (16, prompts[:16])):
            for kind, mode in variants:
                if kind == "llama" and streams > 1:
                    continue
                answer = workers[kind].ask("generate", prompts=some, tokens=args.tokens, streams=streams, mode=mode)
                name = "dspark-stream, DSpark" if mode == "dspark" else f"{kind}, plain"
                texts[f"{name}, {streams}"] = answer["ids"]
                if repeat:
                    made = sum(map(len, answer["ids"]))
                    note(f"tokens/s, {streams} streams", name, made / answer["seconds"], repeat)
                    if mode == "dspark":
                        note(f"accepted length, {streams} streams", name, answer["accepted_length"], repeat)
        for kind in ("dspark", *(k for k in installed if k == "llama")):
            for count in ROWS if repeat else ():
                note(
                    f"ms a pass of {count}", kind, workers[kind].ask("pass", rows=count, context=CONTEXT)["ms"], repeat
                )
        if repeat:
            machine = workers["dspark"].ask("machine")
            note("GB/s read", "machine", machine["bytes_per_s"] / 1e9, repeat)
            note("G multiply-adds/s", "machine", machine["multiplies_per_s"] / 1e9, repeat)
    full = [(p * (1 + 900 // len(p)))[:896] for p in prompts[:16]]
    note("MiB, 16 x 1024 tokens", "dspark", workers["dspark"].ask("generate", prompts=full, tokens=128, streams=16,
                                                                 mode="dspark")["memory_mib"])  # fmt: skip
    ids = codec.encode(TEXT.read_text())[:1024]
    for kind in ("dspark", *(k for k in installed if k == "llama")):
        note("perplexity", kind, 2.718281828459045 ** workers[kind].ask("likelihood", ids=ids)["nll"])
    write(args.out, rows)
    report(rows, texts, model, gguf)


def report(rows: list[Row], texts: dict[str, list[list[int]]], model: Path, gguf: GgufFile) -> None:
    """The figures that are asked for, from medians."""

    def middle(what: str, engine: str) -> float:
        found = [float(str(r["value"])) for r in rows if r["what"] == what and r["engine"] == engine]
        return median(found) if found else float("nan")

    def best_peer(what: str) -> float:
        return max((v for kind in PEERS if (v := middle(what, f"{kind}, plain")) == v), default=float("nan"))

    plain, fast = middle("tokens/s, 1 streams", "dspark, plain"), middle("tokens/s, 1 streams", "dspark-stream, DSpark")
    peer, one = best_peer("tokens/s, 1 streams"), middle("ms a pass of 1", "dspark")
    multiplies = sum(t.shape[0] * t.shape[1] for n, t in gguf.tensors.items() if len(t.shape) == 2)
    peak = (
        16 * multiplies / (middle("ms a pass of 16", "dspark") / 1e3) / (middle("G multiply-adds/s", "machine") * 1e9)
    )
    floor_ms = model.stat().st_size / (middle("GB/s read", "machine") * 1e9) * 1e3
    same = sum(a == b for a, b in zip(texts["dspark, plain, 1"], texts["dspark-stream, DSpark, 1"], strict=True))
    lines = {
        "plain, one stream / the better peer": plain / peer,
        "DSpark, one stream / the better peer": fast / peer,
        "DSpark, one stream / plain": fast / plain,
        "DSpark, 16 streams / OpenVINO": middle("tokens/s, 16 streams", "dspark-stream, DSpark")
        / middle("tokens/s, 16 streams", "openvino, plain"),
        "pass of 4 / pass of 1": middle("ms a pass of 4", "dspark") / one,
        "pass of 8 / pass of 1": middle("ms a pass of 8", "dspark") / one,
        "share of the arithmetic peak, pass of 16": peak,
        "share of the bandwidth floor, plain": floor_ms / (1e3 / plain),
        "seconds to ready": middle("seconds to ready", "dspark"),
        "MiB, 16 streams of 1024 tokens": middle("MiB, 16 x 1024 tokens", "dspark"),
        "perplexity / llama.cpp's": middle("perplexity", "dspark") / middle("perplexity", "llama"),
        f"texts equal, plain and DSpark (of {len(texts['dspark, plain, 1'])})": same,
    }
    print()
    for name, value in lines.items():
        print(f"{name:<45} {value:8.3f}")


def write(path: Path, rows: list[Row]) -> None:
    """The CSV file, with the machine and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = {"machine": cpu_name(), "cores": os.cpu_count(), "commit": commit.stdout.strip()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows(one | machine for one in rows)


if __name__ == "__main__":
    main()
