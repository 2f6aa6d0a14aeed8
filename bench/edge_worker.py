"""One engine in a process of its own, for bench/edge.py: reads commands as JSON lines, answers each with one.

    python bench/edge_worker.py dspark|llama|openvino MODEL.gguf THREADS

Commands: {"do": "generate", "prompts": [[ids]], "tokens": n, "streams": n, "mode": "plain"|"dspark"},
{"do": "pass", "rows": n, "context": n}, {"do": "likelihood", "ids": [...]}, {"do": "memory"}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

REPEATS = 9


class Dspark:
    """This project, in plain and in speculative mode."""

    def __init__(self, model: str, threads: int) -> None:
        from dspark_stream.config import Config
        from dspark_stream.engine.build import build_engine
        from dspark_stream.local import LocalEngine
        from dspark_stream.models.native.target import NativeTarget
        from dspark_stream.progress import Progress

        config = Config(model=model, threads=threads, max_num_seqs=16, max_model_len=2048)
        self.engine, _ = build_engine(config, Progress(enabled=False))
        self.local = LocalEngine(self.engine)
        assert isinstance(self.engine._models.target, NativeTarget), "no C++ compiler: there is nothing to measure"
        self.context = self.engine._models.target.llama.context

    def generate(self, prompts: list[list[int]], tokens: int, streams: int, mode: str) -> dict[str, Any]:
        """Greedy answers of a fixed length."""
        from dspark_stream.types import GenerationRequest, SamplingParams, TokensEvent

        requests = [
            GenerationRequest(
                request_id=str(i),
                prompt_ids=tuple(ids),
                sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
                mode="plain" if mode == "plain" else "dspark",
                record_rounds=True,
            )
            for i, ids in enumerate(prompts)
        ]
        texts: list[list[int]] = [[] for _ in prompts]
        accepted = rounds = 0
        for event, _ in self.local.run(requests, streams):
            if isinstance(event, TokensEvent):
                texts[int(event.request_id)] += event.token_ids
                if event.round is not None:
                    accepted, rounds = accepted + event.round.accepted, rounds + 1
        return {"ids": texts, "accepted_length": 1 + accepted / max(1, rounds)}

    def one_pass(self, rows: int, context: int) -> float:
        """Milliseconds of one target pass over so many rows of one stream."""
        from dspark_stream.models.cache import Extent
        from dspark_stream.models.protocols import Rows

        target = self.engine._models.target
        store = target.make_store(context + 64)
        for at in range(0, context, 128):
            target.forward([Rows(Extent(0, context + 64), at, [5] * min(128, context - at))], store, [])
        times = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            target.forward([Rows(Extent(0, context + 64), context, [7] * rows)], store)
            times.append(1e3 * (time.perf_counter() - begun))
        return sorted(times)[REPEATS // 2]

    def likelihood(self, ids: list[int]) -> float:
        """Mean negative log-likelihood of ids[1:], nats."""
        import torch

        from dspark_stream.models.cache import Extent
        from dspark_stream.models.protocols import Rows

        target = self.engine._models.target
        output = target.forward([Rows(Extent(0, len(ids) + 16), 0, ids[:-1])], target.make_store(len(ids) + 16))
        logits = output.logits(range(len(ids) - 1))
        return float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids[1:])))

    def machine(self) -> dict[str, float]:
        """What these threads can read and multiply at most."""
        return {"bytes_per_s": self.context.read_rate(), "multiplies_per_s": self.context.multiply_rate()}


class Llama:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, model: str, threads: int) -> None:
        import llama_cpp

        options = {"n_ctx": 2048, "n_threads": threads, "n_threads_batch": threads, "n_batch": 512, "verbose": False}
        self.writer = llama_cpp.Llama(model, **options)
        self.model = llama_cpp.Llama(model, logits_all=True, **options)  # for what needs every row's logits

    def generate(self, prompts: list[list[int]], tokens: int, streams: int, mode: str) -> dict[str, Any]:
        """Greedy answers, one after the other: this library serves one stream."""
        texts = []
        for ids in prompts:
            self.writer.reset()
            texts.append([token for token, _ in zip(self.writer.generate(ids, temp=0.0), range(tokens), strict=False)])
        return {"ids": texts}

    def one_pass(self, rows: int, context: int) -> float:
        """See `Dspark.one_pass`."""
        times = []
        for _ in range(REPEATS):
            self.model.reset()
            self.model.eval([5] * context)
            begun = time.perf_counter()
            self.model.eval([7] * rows)
            times.append(1e3 * (time.perf_counter() - begun))
        return sorted(times)[REPEATS // 2]

    def likelihood(self, ids: list[int]) -> float:
        """See `Dspark.likelihood`."""
        import numpy as np

        self.model.reset()
        self.model.eval(ids[:-1])
        scores = np.asarray(self.model.scores[: len(ids) - 1], dtype=np.float64)
        top = scores.max(-1, keepdims=True)
        lse = np.log(np.exp(scores - top).sum(-1)) + top[:, 0]
        return float((lse - scores[np.arange(len(ids) - 1), ids[1:]]).mean())


class OpenVino:
    """OpenVINO GenAI's continuous batching."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino_genai

        self.genai: Any = openvino_genai
        self.pipe = openvino_genai.ContinuousBatchingPipeline(
            model, openvino_genai.SchedulerConfig(), "CPU", {"INFERENCE_NUM_THREADS": threads}
        )

    def generate(self, prompts: list[list[int]], tokens: int, streams: int, mode: str) -> dict[str, Any]:
        """Greedy answers of a fixed length, ``streams`` at once."""
        import numpy as np
        import openvino

        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = tokens, True
        texts: dict[int, list[int]] = {}
        waiting, running = list(enumerate(prompts)), {}
        while waiting or running:
            while waiting and len(running) < streams:
                i, ids = waiting.pop(0)
                running[i] = self.pipe.add_request(i, openvino.Tensor(np.array([ids], dtype=np.int64)), config)
            self.pipe.step()
            for i, handle in list(running.items()):
                if handle.get_status() != self.genai.GenerationStatus.RUNNING:
                    texts[i] = [int(t) for t in handle.read_all()[0].generated_ids]
                    del running[i]
        return {"ids": [texts[i] for i in range(len(prompts))]}


def memory_mib() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    engines: dict[str, Any] = {"dspark": Dspark, "llama": Llama, "openvino": OpenVino}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=engines)
    parser.add_argument("model")
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)
    engine = engines[args.kind](args.model, args.threads)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        begun = time.perf_counter()
        result: dict[str, Any] = {}
        match do:
            case "generate":
                result = engine.generate(**command)
            case "pass":
                result = {"ms": engine.one_pass(**command)}
            case "likelihood":
                result = {"nll": engine.likelihood(**command)}
            case "machine":
                result = engine.machine()
        result |= {"seconds": time.perf_counter() - begun, "memory_mib": memory_mib()}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
