"""Measure the capacity curve with the engine's own passes, once for each machine and model; kept on disk."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from dspark_kernels.cpu.build import library_path
from dspark_stream import __version__
from dspark_stream.engine.stream import Stream
from dspark_stream.models.cache import Extent, ExtentAllocator, KVStore
from dspark_stream.models.drafter import Drafter
from dspark_stream.models.native import NativeTarget
from dspark_stream.models.target import Target
from dspark_stream.progress import Progress
from dspark_stream.spec.accept import accept
from dspark_stream.spec.calibration import Calibration
from dspark_stream.spec.capacity import CapacityCurve, ladder, measure
from dspark_stream.spec.draft import Block, draft
from dspark_stream.spec.survival import AcceptanceHistory
from dspark_stream.spec.verify import verify
from dspark_stream.types import GenerationRequest, SamplingParams

CONTEXT = 256
"""Positions that a measured stream already holds, where the model allows as many."""
LONGEST_CHUNK = 512
"""Rows of one stream up to which passes are measured: prompts are cut into chunks by this curve, too."""


class _Stored(msgspec.Struct):
    key: list[str]
    curve: CapacityCurve


def curve_key(target: Target, drafter: Drafter | None, fingerprints: Sequence[str], quants: Sequence[str]) -> list[str]:
    """Everything that a curve depends on, in words."""
    runner = ""
    if isinstance(target, NativeTarget):
        context = target.llama.context
        runner = f"{library_path(context.isa).name} x{context.threads}"
    device = (
        torch.cuda.get_device_name(target.device)
        if target.device.type == "cuda"
        else f"{platform.machine()} {_cpu_name()} x{torch.get_num_threads()}"
    )
    return [
        f"dspark-stream {__version__}",
        f"torch {torch.__version__}",
        device,
        str(target.dtype),
        runner,
        f"gamma {drafter.gamma if drafter else 0}",
        *quants,
        *fingerprints,
    ]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def load_or_measure(
    target: Target,
    target_kv: KVStore,
    drafter: Drafter | None,
    drafter_kv: KVStore | None,
    allocator: ExtentAllocator,
    *,
    max_seqs: int,
    max_model_len: int,
    key: list[str],
    folder: Path,
    progress: Progress,
) -> CapacityCurve:
    """The curve from ``folder`` where one was measured under the same key and up to the same size, else a new one."""
    key = [*key, f"seqs {max_seqs}", f"len {max_model_len}"]
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
        if stored.key == key:
            return stored.curve
    except (OSError, msgspec.MsgspecError):
        pass  # none yet, or written by another version: measured anew and written over
    with _Bench(target, target_kv, drafter, drafter_kv, allocator, max_seqs, max_model_len) as bench:
        points = len(ladder(bench.max_tokens)) + len(ladder(max_seqs)) * (2 if drafter else 1)
        with progress.bar("measuring the capacity curve", total=points) as bar:
            curve = measure(
                bench.time_rows_ms,
                bench.time_streams_ms,
                bench.time_draft_ms if drafter else None,
                max_tokens=bench.max_tokens,
                max_streams=max_seqs,
                on_point=bar.advance,
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(_Stored(key, curve)))
        part.replace(path)
    except OSError as error:
        progress.say(f"the capacity curve could not be kept in {folder}: {error}; it will be measured again next time")
    return curve


class _Bench:
    """Streams that exist only to be timed: each at the same position of an extent of its own, its past all zeros."""

    def __init__(
        self,
        target: Target,
        target_kv: KVStore,
        drafter: Drafter | None,
        drafter_kv: KVStore | None,
        allocator: ExtentAllocator,
        max_seqs: int,
        max_model_len: int,
    ) -> None:
        self._target, self._target_kv, self._allocator = target, target_kv, allocator
        self._drafter, self._drafter_kv = drafter, drafter_kv
        self._gamma = drafter.gamma if drafter else 0
        self._context = max(1, min(CONTEXT, max_model_len // 2))
        widest = max(LONGEST_CHUNK, max_seqs * (1 + self._gamma))
        self.max_tokens = max(1, min(widest, max_model_len - self._context))
        self._extents: list[Extent] = []
        for tokens in [self.max_tokens] + [1 + self._gamma] * (max_seqs - 1):
            extent = allocator.allocate(self._context + tokens)
            if extent is None:  # a small budget: some streams are then timed on each other's slots
                break
            self._extents.append(extent)

    def __enter__(self) -> _Bench:
        for store in (self._target_kv, self._drafter_kv):
            if store is not None:
                for extent in self._extents:
                    store.clear(extent)
        return self

    def __exit__(self, *_: object) -> None:
        for extent in self._extents:
            self._allocator.free(extent)

    def _streams(self, count: int) -> list[Stream]:
        request = GenerationRequest(
            request_id="profile",
            prompt_ids=(0,) * (self._context + 1),
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
        )
        streams = [Stream(request, self._target.vocab_size, self._gamma, frozenset(), None) for _ in range(count)]
        for i, stream in enumerate(streams):
            stream.extent = self._extents[i % len(self._extents)]
        return streams

    def _verify_ms(self, streams: list[Stream], length: int) -> float:
        blocks = [Block(tokens=[0] * length) for _ in streams]
        lengths = [length] * len(streams)
        begun = time.perf_counter()
        output = verify(self._target, self._target_kv, streams, blocks, lengths)
        accept(output, streams, blocks, lengths, None)
        return (time.perf_counter() - begun) * 1e3

    def time_rows_ms(self, tokens: int) -> float:
        """One stream with that many rows."""
        return self._verify_ms(self._streams(1), tokens - 1)

    def time_streams_ms(self, count: int) -> float:
        """That many streams with a row each."""
        return self._verify_ms(self._streams(count), 0)

    def time_draft_ms(self, count: int) -> float:
        """Drafting for that many streams."""
        assert self._drafter is not None
        assert self._drafter_kv is not None
        streams = self._streams(count)
        begun = time.perf_counter()
        draft(self._drafter, self._drafter_kv, streams, Calibration(), AcceptanceHistory(self._gamma))
        return (time.perf_counter() - begun) * 1e3
