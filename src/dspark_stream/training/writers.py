"""Who lets the target write: our own engine in plain mode, or OpenVINO GenAI where it is installed.

Answers are most of the time of a small machine's run, and OpenVINO's continuous batching writes them several times as
fast from the same GGUF file. Its arithmetic differs in the last bits, so a greedy answer may leave ours at a near tie;
for a drafter that is text of the same target all the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

from dspark_stream.engine.local import LocalEngine
from dspark_stream.errors import ConfigError, InternalError
from dspark_stream.types import FinishedEvent, GenerationRequest, SamplingParams, TokensEvent

WriterName = Literal["auto", "engine", "openvino"]
OPENVINO = "openvino_genai"


class Ask(NamedTuple):
    """One text to be written."""

    number: int
    prompt_ids: tuple[int, ...]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


class Written(NamedTuple):
    """It, as far as it came."""

    ask: Ask
    ids: tuple[int, ...]
    """With the stop token that ended it, if one did."""
    ended: bool
    """By a stop token; False: the limit cut it off."""


class Writer(Protocol):
    """Writes many texts side by side."""

    name: str
    max_model_len: int

    def write(self, asks: Iterable[Ask]) -> Iterator[Written]:
        """All of them, in the order in which they are finished.

        Raises:
            InternalError: the engine behind it failed.
        """

    def close(self) -> None:
        """Give back what it holds."""


def choose_writer(name: WriterName, target: str, device: str) -> Literal["engine", "openvino"]:
    """Who writes for a target on a device.

    Raises:
        ConfigError: OpenVINO was asked for and cannot.
    """
    able = target.endswith(".gguf") and device != "cuda"
    installed = importlib.util.find_spec(OPENVINO) is not None
    if name == "openvino" and not (able and installed):
        why = (
            "it is not installed: pip install dspark-stream[openvino]" if able else "it needs a .gguf target on the CPU"
        )
        raise ConfigError(f"answers cannot be written by openvino: {why}", param="writer")
    if name == "auto":
        return "openvino" if able and installed else "engine"
    return name


class EngineWriter:
    """Our engine, plain mode."""

    name = "engine"

    def __init__(self, engine: LocalEngine, streams: int, max_model_len: int) -> None:
        self._engine, self._streams, self.max_model_len = engine, streams, max_model_len

    def write(self, asks: Iterable[Ask]) -> Iterator[Written]:
        """See `Writer.write`."""
        running: dict[str, tuple[Ask, list[int]]] = {}

        def requests() -> Iterator[GenerationRequest]:
            for ask in asks:
                running[str(ask.number)] = (ask, [])
                yield GenerationRequest(
                    request_id=str(ask.number),
                    prompt_ids=ask.prompt_ids,
                    sampling=SamplingParams(
                        max_tokens=ask.max_tokens, temperature=ask.temperature, top_p=ask.top_p, seed=ask.seed
                    ),
                    mode="plain",
                )

        for event, _ in self._engine.run(requests(), self._streams):
            if isinstance(event, TokensEvent):
                running[event.request_id][1].extend(event.token_ids)
            elif isinstance(event, FinishedEvent):
                ask, ids = running.pop(event.request_id)
                if event.reason not in ("stop", "length"):
                    why = event.error.message if event.error else event.reason
                    raise InternalError(f"the engine failed at text {ask.number}: {why}")
                yield Written(ask, tuple(ids), event.reason == "stop")

    def close(self) -> None:
        """See `Writer.close`."""
        self._engine.close()


class OpenVinoWriter:
    """OpenVINO GenAI's continuous batching on the CPU, from the GGUF file itself."""

    name = "openvino"

    def __init__(self, gguf: str, stop_ids: Iterable[int], *, streams: int, threads: int, max_model_len: int) -> None:
        import openvino_genai

        self._genai: Any = openvino_genai
        self._streams, self.max_model_len = streams, max_model_len
        self._stop_ids = set(stop_ids)
        properties = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        try:
            self._pipe = openvino_genai.ContinuousBatchingPipeline(
                gguf, openvino_genai.SchedulerConfig(), "CPU", properties
            )
        except RuntimeError as error:
            raise ConfigError(f"OpenVINO cannot load {gguf}: {error}", param="writer") from error

    def _config(self, ask: Ask) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = ask.max_tokens
        config.stop_token_ids = self._stop_ids
        config.eos_token_id = min(self._stop_ids, default=-1)
        if ask.temperature > 0:
            config.do_sample, config.temperature, config.top_p = True, ask.temperature, ask.top_p
            config.rng_seed = ask.seed % 2**63
        return config

    def write(self, asks: Iterable[Ask]) -> Iterator[Written]:
        """See `Writer.write`."""
        import numpy as np
        import openvino

        waiting = iter(asks)
        running: dict[int, tuple[Ask, Any]] = {}
        while True:
            while len(running) < self._streams and (ask := next(waiting, None)) is not None:
                tensor = openvino.Tensor(np.array([ask.prompt_ids], dtype=np.int64))
                running[ask.number] = (ask, self._pipe.add_request(ask.number, tensor, self._config(ask)))
            if not running:
                return
            try:
                self._pipe.step()
            except RuntimeError as error:
                raise InternalError(f"OpenVINO failed: {error}") from error
            for number, (ask, handle) in list(running.items()):
                if handle.get_status() == self._genai.GenerationStatus.RUNNING:
                    continue
                del running[number]
                ids = tuple(handle.read_all()[0].generated_ids)
                yield Written(ask, ids, bool(ids) and ids[-1] in self._stop_ids)

    def close(self) -> None:
        """See `Writer.close`."""
        del self._pipe
