"""Measure the capacity curve with the engine's own passes, once for each machine and model; kept on disk."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from dspark_stream import __version__
from dspark_stream.engine.stream import Stream
from dspark_stream.models.cache import Extent, ExtentAllocator, KVStore
from dspark_stream.models.drafter import Drafter
from dspark_stream.models.target import Target
from dspark_stream.progress import Progress
from dspark_stream.spec.accept import accept
from dspark_stream.spec.capacity import CapacityCurve, ladder, measure
from dspark_stream.spec.draft import Block, draft
from dspark_stream.spec.survival import AcceptanceHistory, Calibration
from dspark_stream.spec.verify import verify
from dspark_stream.types import GenerationRequest, SamplingParams

CONTEXT = 256
"""Positions that a measured stream already holds, where the model allows as many."""


class _Stored(msgspec.Struct):
    key: list[str]
    curve: CapacityCurve


def curve_key(target: Target, drafter: Drafter | None, fingerprints: Sequence[str], quants: Sequence[str]) -> list[str]:
    """Everything that a curve depends on, in words."""
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
    gamma = drafter.gamma if drafter else 0
    max_tokens = max_seqs * (1 + gamma)
    context = max(1, min(CONTEXT, max_model_len - gamma - 1))
    extent = allocator.allocate(context + gamma + 1)
    assert extent is not None  # the budget was checked to hold at least one whole stream
    for store in (target_kv, drafter_kv):
        for tensor in [*store.keys, *store.values] if store else []:
            tensor[extent.slot : extent.slot + extent.size] = 0

    def stream() -> Stream:
        request = GenerationRequest(
            request_id="profile",
            prompt_ids=(0,) * (context + 1),
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
        )
        made = Stream(request, target.vocab_size, gamma, frozenset(), None)
        made.extent = Extent(extent.slot, extent.size)
        return made

    def time_verify_ms(tokens: int) -> float:
        count = -(-tokens // (1 + gamma))
        lengths = [gamma] * (count - 1) + [tokens - (count - 1) * (1 + gamma) - 1]
        streams = [stream() for _ in range(count)]
        blocks = [Block(tokens=[0] * gamma) for _ in streams]
        t = time.perf_counter()
        logits, _ = verify(target, target_kv, streams, blocks, lengths)
        accept(logits, streams, blocks, lengths, None)
        return (time.perf_counter() - t) * 1e3

    def time_draft_ms(count: int) -> float:
        assert drafter is not None
        assert drafter_kv is not None
        streams = [stream() for _ in range(count)]
        t = time.perf_counter()
        draft(drafter, drafter_kv, streams, Calibration(), AcceptanceHistory(gamma))
        return (time.perf_counter() - t) * 1e3

    points = len(ladder(max_tokens)) + (len(ladder(max_seqs)) if drafter else 0)
    try:
        with progress.bar("measuring the capacity curve", total=points) as bar:
            curve = measure(
                time_verify_ms,
                time_draft_ms if drafter else None,
                max_tokens=max_tokens,
                max_streams=max_seqs,
                on_point=bar.advance,
            )
    finally:
        allocator.free(extent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(_Stored(key, curve)))
        part.replace(path)
    except OSError as error:
        progress.say(f"the capacity curve could not be kept in {folder}: {error}; it will be measured again next time")
    return curve
