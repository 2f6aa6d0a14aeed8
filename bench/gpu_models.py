"""What bench/gpu.py measures with: shapes, models of random weights, a synthetic acceptance, a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

import dspark_stream.engine.captured.round as rounds_module
from dspark_kernels.acceptance import Accepted
from dspark_kernels.acceptance import accept as real_accept
from dspark_kernels.noise import uniforms
from dspark_kernels.sequential_head import walk
from dspark_stream.decoding.calibration import Calibration, logit
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.engine.captured.graphs import Round
from dspark_stream.engine.captured.round import RoundModels, run_round
from dspark_stream.engine.captured.runner import CapturedRounds
from dspark_stream.engine.rounds import Models
from dspark_stream.engine.stream import Stream
from dspark_stream.load.controller import Controller
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.models.cache import Extent
from dspark_stream.models.drafter_config import DrafterConfig
from dspark_stream.models.torch.drafter import Drafter, backbone_config
from dspark_stream.models.torch.fusing import fuse_layers
from dspark_stream.models.torch.layers import ATTENTION_NAME
from dspark_stream.models.torch.quant import WEIGHT_ONLY_BITS, Quant, quantise_linears
from dspark_stream.models.torch.target import Target
from dspark_stream.types import GenerationRequest, Mode, SamplingParams

CONTEXT = 512
SYNTHETIC = 3
"""Purpose of the noise that decides about synthetic acceptance; no other draw uses it."""
TAU = {3.6: 0.7440, 2.6: 0.6186}
"""Accepted length at γ = 7 and the chance of each draft that gives it: τ = (1 - a⁸) / (1 - a)."""


class Shape(NamedTuple):
    """A target's sizes and its drafter's."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    taps: tuple[int, ...]
    tied: bool
    draft_layers: int = 5
    rank: int = 256


QWEN3_8B = Shape("Qwen3-8B shape", 4096, 12288, 36, 32, 8, 128, 151936, (1, 9, 17, 25, 33), False)
QWEN3_4B = Shape("Qwen3-4B shape", 2560, 9728, 36, 32, 8, 128, 151936, (1, 9, 17, 25, 33), True)
TINY = Shape("tiny shape", 64, 128, 4, 4, 2, 16, 1000, (0, 2), False, 2, 32)


class Clock:
    """Times what runs on a device, or on this CPU."""

    def __init__(self, device: torch.device, smoke: bool) -> None:
        self.device, self.smoke = device, smoke

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, run: Callable[[], Any], repeats: int = 9, warm: int = 3, each: int = 5) -> float:
        """Median milliseconds of one call among ``each`` that follow one another: what the device takes, not what a
        first launch waits for.
        """
        repeats, warm, each = (2, 1, 1) if self.smoke else (repeats, warm, each)
        for _ in range(warm):
            run()
        self.wait()
        times = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(each):
                    run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / each)
            else:
                begun = time.perf_counter()
                for _ in range(each):
                    run()
                times.append((time.perf_counter() - begun) * 1e3 / each)
        return median(times)

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """``run`` as a graph, so that what is timed is the device and not the host; itself where there is no GPU."""
        if self.device.type != "cuda":
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def random_models(shape: Shape, device: torch.device, slots: int, quant: Quant) -> Models:
    """Target and drafter of a shape, random weights, caches full of random numbers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = Qwen3Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=40960,
        tie_word_embeddings=shape.tied,
        attn_implementation=ATTENTION_NAME,
        dtype=dtype,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
        target = Target(model, tap_layers=shape.taps)
        with torch.device(device):
            drafter = Drafter(
                DrafterConfig(
                    backbone=backbone_config(target.config, shape.draft_layers),
                    num_layers=shape.draft_layers,
                    block_size=7,
                    mask_token_id=shape.vocab - 267,
                    target_layer_ids=shape.taps,
                    markov_rank=shape.rank,
                ),
                target,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    drafter = drafter.eval().requires_grad_(False)
    quantise_linears(drafter, quant)
    fuse_layers(target.decoder)
    fuse_layers(drafter)
    if quant in WEIGHT_ONLY_BITS:
        drafter.quantise_head()
    curve = CapacityCurve(tokens=[1], verify_ms=[1.0], streams=[1], draft_ms=[0.0], gamma=drafter.gamma)
    models = Models(
        target=target,
        target_kv=target.make_store(slots),
        drafter=drafter,
        drafter_kv=drafter.make_store(slots),
        calibration=Calibration(),
        history=AcceptanceHistory(7),
        capacity=curve,
        controller=Controller(7, curve),
    )
    for store in (models.target_kv, models.drafter_kv):
        assert store is not None
        for tensor in (*store.keys, *store.values):
            tensor.normal_()
    return models


def weight_bytes(target: Target) -> int:
    """What one pass has to read of a target: all of it but an embedding table that is not the LM head's too."""
    read = {p.data_ptr(): p.numel() * p.element_size() for p in target.model.parameters()}
    if target.embed_tokens.weight.data_ptr() != target.lm_head.weight.data_ptr():
        del read[target.embed_tokens.weight.data_ptr()]
    return sum(read.values())


def seated(models: Models, count: int, mode: Mode, tokens: int) -> list[Stream]:
    """Streams in the middle of their answers, CONTEXT tokens behind them and up to ``tokens`` to come."""
    vocab = models.target.vocab_size
    streams = []
    for i in range(count):
        request = GenerationRequest(
            request_id=f"{mode}{i}",
            prompt_ids=tuple((7 * j + i) % vocab for j in range(CONTEXT)),
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0, seed=i, ignore_eos=True),
            mode=mode,
        )
        stream = Stream(request, vocab, models.gamma, frozenset(), None)
        size = CONTEXT + tokens + 16
        stream.admitted(Extent(i * size, size))
        stream.started()
        streams.append(stream)
    return streams


def synthetic(rate: float) -> Round:
    """A round whose drafts each stand with chance ``rate``, whatever the random weights say, and say so themselves."""

    def accept(logits: Any, first: Any, length: Any, drafts: Any, sampling: Any) -> Accepted:
        outcome = real_accept(logits, first, length, drafts, sampling)
        gamma = drafts.tokens.shape[1]
        index = torch.arange(gamma, device=logits.device)
        u = uniforms(sampling.seed.unsqueeze(1), sampling.position.unsqueeze(1), SYNTHETIC, index)
        stands = (u < rate) & (index < length.unsqueeze(1))
        accepted = stands.int().cumprod(1).sum(1).int()
        return Accepted(torch.where(length < 0, outcome.accepted, accepted), outcome.bonus)

    def confident(*args: Any) -> Any:
        walked = walk(*args)
        return walked._replace(confidence=torch.full_like(walked.confidence, logit(rate)))

    def run(models: RoundModels, state: Any, seats: int, rows: int, drafting: bool, context: bool) -> None:
        kept = rounds_module.accept, rounds_module.walk
        rounds_module.accept, rounds_module.walk = accept, confident
        try:
            run_round(models, state, seats, rows, drafting, context)
        finally:
            rounds_module.accept, rounds_module.walk = kept

    return run


class Pace(NamedTuple):
    """How rounds went, host included."""

    tokens_per_s: float
    round_ms: float
    accepted_length: float


def pace(rounds: CapturedRounds, streams: Sequence[Stream], clock: Clock, count: int) -> Pace:
    """``count`` rounds of streams that all go on, read one round late as the engine reads them."""
    count = 4 if clock.smoke else count
    for _ in range(3):
        rounds.decode(streams)
    clock.wait()
    begun, tokens = time.perf_counter(), 0
    for _ in range(count):
        tokens += sum(len(c.event.token_ids) for c in rounds.decode(streams))
    took = time.perf_counter() - begun
    return Pace(tokens / took, took / count * 1e3, tokens / count / len(streams))


def draft_bytes(models: Models) -> int:
    """What one draft has to read: the drafter and its LM head, but of the sequential head's tables only some rows."""
    drafter = models.drafter
    assert drafter is not None
    head = drafter._head[0] if drafter._head else models.target.lm_head
    parts = [t for name, t in (*drafter.named_parameters(), *drafter.named_buffers()) if "markov_w" not in name]
    return sum(t.numel() * t.element_size() for t in (*parts, *head.parameters(), *head.buffers()))
