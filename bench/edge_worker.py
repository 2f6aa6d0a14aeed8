"""One engine in a process of its own, for bench/edge.py: reads commands as JSON lines, answers each with one.

    python bench/edge_worker.py dspark|llama|openvino|lookup|vllm MODEL THREADS [MOST_STREAMS]

It imports nothing of the project but where it runs the project's engine: the others have a Python of their own.
An answer with an ``error`` is the first line of what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPEATS = 9
CHUNK = 128
"""Rows of a pass where only the text matters: logits of more take gigabytes."""
AHEAD = 64
"""Token slots behind the context of a measured pass."""


class Told:
    """Answers as they come: their tokens, and how fast they came after the first."""

    def __init__(self, count: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self._first: list[tuple[float, int]] = [(0.0, 0)] * count
        self._last = [0.0] * count

    def add(self, answer: int, ids: list[int], at_s: float) -> None:
        """Some more tokens of one answer."""
        if not self.ids[answer]:
            self._first[answer] = (at_s, len(ids))
        self.ids[answer] += ids
        self._last[answer] = at_s

    def result(self) -> dict[str, Any]:
        """Tokens after the first ones and the seconds that they took, added up."""
        return {
            "ids": self.ids,
            "user_tokens": sum(len(ids) - count for ids, (_, count) in zip(self.ids, self._first, strict=True)),
            "user_s": sum(last - first for last, (first, _) in zip(self._last, self._first, strict=True)),
        }


class Dspark:
    """This project."""

    def __init__(self, model: str, threads: int, most: int) -> None:
        from dspark_stream.config import Config
        from dspark_stream.console import SILENT
        from dspark_stream.engine.build import build_engine
        from dspark_stream.engine.local import LocalEngine
        from dspark_stream.models.native.target import NativeTarget

        limits: dict[str, int] = {"max_num_seqs": most, "max_model_len": 2048} if most else {}
        self.engine, _ = build_engine(Config(model=model, threads=threads, **limits), SILENT)
        self.local = LocalEngine(self.engine)
        target = self.engine._models.target
        assert isinstance(target, NativeTarget), "no C++ compiler: there is nothing to measure"
        self.target = target

    def about(self) -> dict[str, Any]:
        """What the others have to know."""
        return {"drafter": self.engine.info.drafter, "ends": self.target.eos_token_ids, "bytes": self.target.pass_bytes}

    def generate(
        self,
        prompts: list[list[int]],
        tokens: list[int],
        streams: int = 1,
        how: str = "plain",
        sampling: dict[str, Any] | None = None,
        seed: int = 0,
        ends: list[int] | None = None,
    ) -> dict[str, Any]:
        """Answers of at most so many tokens each, by a schedule or plain; greedy where nothing is sampled."""
        from dspark_stream.types import FinishedEvent, GenerationRequest, SamplingParams, TokensEvent

        if how != "plain":
            self.engine.use_schedule(how)
        requests = [
            GenerationRequest(
                request_id=str(i),
                prompt_ids=tuple(ids),
                sampling=SamplingParams(
                    max_tokens=tokens[i], seed=seed + i, ignore_eos=not ends, **(sampling or {"temperature": 0.0})
                ),
                mode="plain" if how == "plain" else "dspark",
            )
            for i, ids in enumerate(prompts)
        ]
        told, accepted, rounds = Told(len(prompts)), 0, 0
        for event, at_s in self.local.run(requests, streams):
            if isinstance(event, TokensEvent):
                told.add(int(event.request_id), event.token_ids, at_s)
            elif isinstance(event, FinishedEvent):
                assert event.reason in ("stop", "length"), event.error
                accepted, rounds = accepted + event.usage.accepted, rounds + event.usage.rounds
        return told.result() | {"accepted_length": 1 + accepted / max(1, rounds)}

    def one_pass(self, rows: int, context: int) -> dict[str, Any]:
        """Milliseconds of one target pass over so many rows of one stream."""
        from dspark_stream.models.cache import Extent
        from dspark_stream.models.protocols import Rows

        place, store = Extent(0, context + AHEAD), self.target.make_store(context + AHEAD)
        for at in range(0, context, CHUNK):
            self.target.forward([Rows(place, at, [5] * min(CHUNK, context - at))], store, [])
        times = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            self.target.forward([Rows(place, context, [7] * rows)], store)
            times.append(1e3 * (time.perf_counter() - begun))
        return {"ms": sorted(times)[REPEATS // 2]}

    def likelihood(self, ids: list[int]) -> dict[str, Any]:
        """Mean negative log-likelihood of ids[1:], nats."""
        from torch import tensor
        from torch.nn.functional import cross_entropy

        from dspark_stream.models.cache import Extent
        from dspark_stream.models.protocols import Rows

        place, store, total = Extent(0, len(ids) + AHEAD), self.target.make_store(len(ids) + AHEAD), 0.0
        for at in range(0, len(ids) - 1, CHUNK):
            some, then = ids[:-1][at : at + CHUNK], ids[at + 1 : at + 1 + CHUNK]
            logits = self.target.forward([Rows(place, at, some)], store).logits(range(len(some)))
            total += float(cross_entropy(logits.double(), tensor(then), reduction="sum"))
        return {"nll": total / (len(ids) - 1)}

    def read_rate(self) -> dict[str, Any]:
        """Bytes a second that these threads read from memory now."""
        return {"bytes_per_s": self.target.llama.context.read_rate()}

    def memory(self) -> dict[str, Any]:
        """Resident bytes of this process."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"bytes": pages * os.sysconf("SC_PAGE_SIZE")}


class Llama:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, model: str, threads: int, most: int) -> None:
        import llama_cpp

        self._make = lambda **more: llama_cpp.Llama(
            model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False, **more
        )
        self.writer, self._judge = self._make(), None

    @property
    def judge(self) -> Any:
        """Where every row's logits are wanted: made when they first are."""
        self._judge = self._judge or self._make(logits_all=True)
        return self._judge

    def generate(self, prompts: list[list[int]], tokens: list[int], ends: list[int]) -> dict[str, Any]:
        """Greedy answers, one after the other: this library serves one stream."""
        told = Told(len(prompts))
        for i, ids in enumerate(prompts):
            self.writer.reset()
            for _, token in zip(range(tokens[i]), self.writer.generate(ids, temp=0.0), strict=False):
                told.add(i, [int(token)], time.perf_counter())
                if token in ends:
                    break
        return told.result()

    def one_pass(self, rows: int, context: int) -> dict[str, Any]:
        """See `Dspark.one_pass`."""
        self.judge.reset()
        self.judge.eval([5] * context)
        times = []
        for _ in range(REPEATS):
            self.judge.n_tokens = context  # rows behind it are dropped by the next call
            begun = time.perf_counter()
            self.judge.eval([7] * rows)
            times.append(1e3 * (time.perf_counter() - begun))
        return {"ms": sorted(times)[REPEATS // 2]}

    def likelihood(self, ids: list[int]) -> dict[str, Any]:
        """See `Dspark.likelihood`."""
        import numpy as np

        self.judge.reset()
        self.judge.eval(ids[:-1])
        total = 0.0
        for at, then in enumerate(ids[1:]):
            row = np.asarray(self.judge.scores[at], dtype=np.float64)
            total += float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[then])
        return {"nll": total / (len(ids) - 1)}


class OpenVino:
    """OpenVINO GenAI's continuous batching, as it is or with its prompt lookup."""

    def __init__(self, model: str, threads: int, most: int, lookup: bool = False) -> None:
        import openvino_genai

        self.genai: Any = openvino_genai
        self.lookup, self._number = lookup, 0
        properties = {"INFERENCE_NUM_THREADS": threads} | ({"prompt_lookup": True} if lookup else {})
        self.pipe = openvino_genai.ContinuousBatchingPipeline(
            model, openvino_genai.SchedulerConfig(), "CPU", properties
        )

    def generate(self, prompts: list[list[int]], tokens: list[int], ends: list[int]) -> dict[str, Any]:
        """Greedy answers, one after the other."""
        import numpy as np
        import openvino

        told, steps = Told(len(prompts)), 0
        for i, ids in enumerate(prompts):
            config = self.genai.GenerationConfig()
            config.max_new_tokens, config.stop_token_ids = tokens[i], set(ends)
            if self.lookup:
                config.num_assistant_tokens, config.max_ngram_size = 5, 3  # as its own samples set them
            self._number += 1
            handle = self.pipe.add_request(self._number, openvino.Tensor(np.array([ids], dtype=np.int64)), config)
            while self.pipe.has_non_finished_requests():
                self.pipe.step()
                while handle.can_read():
                    steps += bool(told.ids[i])  # the first tokens come out of the prompt's pass
                    for output in handle.read().values():
                        told.add(i, [int(t) for t in output.generated_ids], time.perf_counter())
        result = told.result()
        return result | ({"accepted_length": result["user_tokens"] / max(1, steps)} if self.lookup else {})


class Vllm:
    """vLLM on the CPU."""

    def __init__(self, model: str, threads: int, most: int) -> None:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, range(threads))))
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        self.vllm: Any = vllm
        self.engine = vllm.LLM(model=model, max_model_len=2048, max_num_seqs=1).llm_engine

    def generate(self, prompts: list[list[int]], tokens: list[int], ends: list[int]) -> dict[str, Any]:
        """Greedy answers, one after the other."""
        told = Told(len(prompts))
        for i, ids in enumerate(prompts):
            params = self.vllm.SamplingParams(temperature=0.0, max_tokens=tokens[i], stop_token_ids=ends)
            self.engine.add_request(str(i), {"prompt_token_ids": ids}, params)
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    new = list(output.outputs[0].token_ids)[len(told.ids[i]) :]
                    told.add(i, new, time.perf_counter())
        return told.result()


ENGINES = {
    "dspark": Dspark,
    "llama": Llama,
    "openvino": OpenVino,
    "lookup": lambda *args: OpenVino(*args, lookup=True),
    "vllm": Vllm,
}


def commands() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is asked for; first of all, that there is an engine."""
    yield "", {}
    for line in sys.stdin:
        command = json.loads(line)
        yield command.pop("do"), command


def main() -> None:
    kind, model, threads = sys.argv[1:4]
    most = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)
    engine: Any = None
    for do, command in commands():
        begun = time.perf_counter()
        try:
            if engine is None:
                engine = ENGINES[kind](model, int(threads), most)
            result = getattr(engine, do)(**command) if do else {}
            result["seconds"] = time.perf_counter() - begun
        except Exception as error:  # whatever a library throws is its row in the table
            if kind == "dspark":
                raise
            # "… failed at FILE:" says less than the line behind it
            said = [line for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
            first = said[0].strip() if said else type(error).__name__
            result = {"error": f"not installed: {first}" if isinstance(error, ModuleNotFoundError) else first}
        print(json.dumps(result), file=answers, flush=True)
        if "error" in result:
            raise SystemExit(1)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
