"""Everything that docs/gpu.md promises of a GPU, measured in one call: floors of the machine, rounds, drafts, peers.

    python bench/gpu.py                # on a GPU, under eight minutes; the table, runs/gpu.csv and runs/gpu-profile.txt
    python bench/gpu.py --smoke        # the same code over tiny shapes, wherever it is: proves that it runs, no more

Shapes of Qwen3-8B and Qwen3-4B have random weights, and their drafts are accepted by a set rate: that is called
synthetic wherever it stands. SmolLM2-135M-Instruct is real. Every time is a median of repeats after warm-up.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

import dspark_stream.engine.gpu.round as rounds_module
from dspark_kernels.acceptance import Accepted
from dspark_kernels.acceptance import accept as real_accept
from dspark_kernels.noise import uniforms
from dspark_kernels.sequential_head import full_walk, prepare, walk
from dspark_stream.config import Config
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.gpu.graphs import Size
from dspark_stream.engine.gpu.round import RoundModels, run_round
from dspark_stream.engine.gpu.runner import GraphRounds
from dspark_stream.engine.step import Models
from dspark_stream.engine.stream import Stream
from dspark_stream.local import LocalEngine
from dspark_stream.models.cache import Extent
from dspark_stream.models.drafter import Drafter, DrafterConfig, backbone_config
from dspark_stream.models.embedded import ensure_embedded_model
from dspark_stream.models.families import ATTENTION_NAME
from dspark_stream.models.quant import Quant, quantise_linears
from dspark_stream.models.target import Target
from dspark_stream.progress import SILENT, Progress
from dspark_stream.spec.calibration import Calibration, logit
from dspark_stream.spec.capacity import CapacityCurve
from dspark_stream.spec.schedule import parse_schedule
from dspark_stream.spec.survival import AcceptanceHistory
from dspark_stream.types import GenerationRequest, Mode, SamplingParams, TokensEvent

DEADLINE_S = 460.0
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


@dataclass
class Report:
    """Lines of the table; printed at the end, written as CSV."""

    rows: list[dict[str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(
        self, what: str, value: float, unit: str, floor: float | None = None, goal: str = "", note: str = ""
    ) -> None:
        """One figure; ``floor`` negative means that less is better and its size is the limit."""
        met = ""
        if floor is not None:
            met = "yes" if (value >= floor if floor >= 0 else value <= -floor) else "NO"
        limit = "" if floor is None else f"{'≥' if floor >= 0 else '≤'} {abs(floor):g}"
        self.rows.append(
            {
                "what": what,
                "value": f"{value:.4g}",
                "unit": unit,
                "floor": limit,
                "goal": goal,
                "met": met,
                "note": note,
            }
        )
        print(f"{what}: {value:.4g} {unit} {limit} {met} {note}", flush=True)

    def show(self) -> None:
        """The one table."""
        keys = ("what", "value", "unit", "floor", "goal", "met", "note")
        width = {k: max(len(k), *(len(r[k]) for r in self.rows)) for k in keys}
        print("\n" + "  ".join(k.ljust(width[k]) for k in keys))
        for row in self.rows:
            print("  ".join(row[k].ljust(width[k]) for k in keys))


class Clock:
    """Times what runs on a device, or on this CPU."""

    def __init__(self, device: torch.device, smoke: bool) -> None:
        self.device, self.smoke = device, smoke
        self.began = time.perf_counter()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, run: Callable[[], Any], repeats: int = 30, warm: int = 3) -> float:
        """Median milliseconds of one call, device time where there is a device."""
        repeats, warm = (2, 1) if self.smoke else (repeats, warm)
        for _ in range(warm):
            run()
        self.wait()
        times = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                begun = time.perf_counter()
                run()
                times.append((time.perf_counter() - begun) * 1e3)
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

    @property
    def late(self) -> bool:
        return time.perf_counter() - self.began > DEADLINE_S


# --- models ------------------------------------------------------------------------------------------------------


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
    models = Models(
        target=target,
        target_kv=target.make_store(slots),
        drafter=drafter,
        drafter_kv=drafter.make_store(slots),
        calibration=Calibration(),
        history=AcceptanceHistory(7),
        schedule=parse_schedule("adaptive"),
        capacity=CapacityCurve(tokens=[1], verify_ms=[1.0], streams=[1], stream_ms=[0.0], draft_ms=[0.0]),
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


def synthetic(rate: float) -> Callable[[RoundModels, Any, int, int, bool], None]:
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

    def run(models: RoundModels, state: Any, seats: int, rows: int, drafting: bool) -> None:
        kept = rounds_module.accept, rounds_module.walk
        rounds_module.accept, rounds_module.walk = accept, confident
        try:
            run_round(models, state, seats, rows, drafting)
        finally:
            rounds_module.accept, rounds_module.walk = kept

    return run


class Pace(NamedTuple):
    """How rounds went, host included."""

    tokens_per_s: float
    round_ms: float
    accepted_length: float


def pace(rounds: GraphRounds, streams: Sequence[Stream], clock: Clock, count: int) -> Pace:
    """``count`` rounds of streams that all go on, read one round late as the engine reads them."""
    count = 4 if clock.smoke else count
    for _ in range(3):
        rounds.decode_round(streams)
    clock.wait()
    begun, tokens = time.perf_counter(), 0
    for _ in range(count):
        tokens += sum(len(c.event.token_ids) for c in rounds.decode_round(streams))
    took = time.perf_counter() - begun
    return Pace(tokens / took, took / count * 1e3, tokens / count / len(streams))


# --- sections ----------------------------------------------------------------------------------------------------


def floors(report: Report, clock: Clock) -> float:
    """Copy bandwidth in GB/s (read and written counted) and what an empty graph costs."""
    size = 1 << (24 if clock.smoke else 32)
    source = torch.empty(size // 2, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    bandwidth = size / clock.ms(lambda: target.copy_(source)) / 1e6
    report.add("copy bandwidth", bandwidth, "GB/s")
    one = torch.zeros(1, device=clock.device)
    report.add("graph of one empty kernel", clock.ms(clock.captured(lambda: one.add_(1)), 200) * 1e3, "µs")
    return bandwidth


def linears(report: Report, clock: Clock, bandwidth: float) -> None:
    """A drafter's widest layer at M = 1, 4, 8: bfloat16, bitsandbytes, our own kernels; share of the copy bandwidth."""
    inputs, outputs = (128, 64) if clock.smoke else (12288, 4096)
    dtype = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    kinds: list[Quant] = ["none", "w8a16", "w4a16"] if clock.smoke else ["none", "int8", "nf4", "w8a16", "w4a16"]
    bits = {"none": 16, "int8": 8, "w8a16": 8.25, "nf4": 4.5, "w4a16": 4.5}
    for kind in kinds:
        layers = nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for _ in range(8)))  # more than L2 holds
        layers = layers.to(clock.device, dtype).requires_grad_(False)
        quantise_linears(layers, kind)
        for m in (1, 4, 8):
            x = torch.randn(m, inputs, dtype=dtype, device=clock.device)

            @torch.inference_mode()
            def run(x: torch.Tensor = x, layers: nn.Sequential = layers) -> None:
                for layer in layers:
                    layer(x)

            ms = clock.ms(clock.captured(run)) / len(layers)
            share = inputs * outputs * bits[kind] / 8 / (ms * 1e6) / bandwidth
            report.add(f"linear 12288 → 4096, {kind}, M = {m}", ms * 1e3, "µs", note=f"{share:.2f} of copy bandwidth")


def shape_section(report: Report, clock: Clock, shape: Shape, bandwidth: float, quant: Quant, strict: bool) -> None:
    """Plain and DSpark decoding of a shape, one stream and 64; floors count for the 8B shape (``strict``)."""
    many, tokens = (2, 100) if clock.smoke else (64, 1200)
    size = CONTEXT + tokens + 16
    models = random_models(shape, clock.device, many * size, quant)
    parts_floor_ms = weight_bytes(models.target) / bandwidth / 1e6
    tau, rate = 3.6, TAU[3.6]

    def rounds_for(schedule: str, seats: int) -> GraphRounds:
        models.schedule = parse_schedule(schedule)
        return GraphRounds(models, seats=seats, longest=size, replace=synthetic(rate))

    def graph_ms(rounds: GraphRounds, which: Size, mode: Mode) -> float:
        streams = seated(models, 1, mode, tokens)
        rounds.state.bind([rounds.seat_of(s) for s in streams])
        return clock.ms(lambda: rounds.ladder.run(which), 40)

    name = shape.name
    one = rounds_for("fixed:7", 1)
    plain_ms = graph_ms(one, Size(1, 1, False), "plain")
    verify_ms = graph_ms(one, Size(1, 8, False), "plain")
    whole_ms = graph_ms(one, Size(1, 8, True), "dspark")
    draft_ms = whole_ms - verify_ms
    share = parts_floor_ms / plain_ms
    report.add(f"{name}: plain step", plain_ms, "ms", note=f"weights alone {parts_floor_ms:.2f} ms")
    report.add(f"{name}: plain, share of the bandwidth floor", share, "", 0.65 if strict else None, "0.85")
    report.add(f"{name}: pass over 8 rows", verify_ms, "ms")
    report.add(f"{name}: draft ({quant}), walk included", draft_ms, "ms")
    report.add(f"{name}: draft / plain step", draft_ms / plain_ms, "", -0.20 if strict else None, "0.08")

    plain = pace(one, seated(models, 1, "plain", tokens), clock, 150)
    drafted = pace(rounds_for("fixed:7", 1), seated(models, 1, "dspark", tokens), clock, 150)
    gap = max(0.0, 1 - whole_ms / drafted.round_ms)
    ideal = drafted.accepted_length * plain_ms / (draft_ms + verify_ms)
    ratio = drafted.tokens_per_s / plain.tokens_per_s
    at_tau = ratio * tau / drafted.accepted_length  # a round takes as long whatever is accepted in it
    report.add(f"{name}: host gap between rounds", 100 * gap, "% of a round", -3.0 if strict else None, "0")
    note = f"synthetic; {ratio:.2f} x at the τ of {drafted.accepted_length:.2f} that was drawn"
    report.add(f"{name}: DSpark / plain, one stream, τ {tau}", at_tau, "x", 2.2 if strict else None, "3.0", note)
    report.add(f"{name}: of τ·T/(T_draft+T_verify)", ratio / ideal, "", 0.9 if strict else None, "0.98")
    if not strict and not clock.smoke:
        return
    crowd = rounds_for("adaptive", many)
    crowd.ladder.warm()
    busy_plain = pace(crowd, seated(models, many, "plain", tokens), clock, 60)
    busy = pace(crowd, seated(models, many, "dspark", tokens), clock, 60)
    note = f"{busy.tokens_per_s:.0f} tok/s, synthetic τ {busy.accepted_length:.2f}"
    report.add(
        f"{name}: adaptive / plain, {many} streams", busy.tokens_per_s / busy_plain.tokens_per_s, "x", 1.0, "1.3", note
    )


def draft_section(report: Report, clock: Clock, shape: Shape) -> None:
    """The same draft in every precision, and the sequential head over candidates against the whole vocabulary."""
    kinds = ["none", "w4a16"] if clock.smoke else ["none", "int8", "nf4", "w8a16", "w4a16"]
    small = shape._replace(layers=max(shape.taps) + 2, inner=shape.hidden)  # the target is only a holder of heads here
    for kind in kinds:
        models = random_models(small, clock.device, 2 * (CONTEXT + 1040), kind)
        models.schedule = parse_schedule("fixed:7")
        rounds = GraphRounds(models, seats=1, longest=CONTEXT + 1040)
        rounds.state.bind([rounds.seat_of(s) for s in seated(models, 1, "dspark", 1000)])
        parts, state = rounds.ladder.models, rounds.state
        here = torch.ones(1, dtype=torch.bool, device=clock.device)

        @torch.inference_mode()
        def draft(parts: Any = parts, state: Any = state, here: Any = here) -> None:
            rounds_module._draft(parts, state, 1, here)

        report.add(f"draft of the {shape.name}, {kind}", clock.ms(clock.captured(draft)), "ms")
        if kind != "none":
            continue
        drafter, head = models.drafter, parts.head
        assert drafter is not None
        assert head is not None
        hidden = torch.randn(1, 7, shape.hidden, dtype=models.target.dtype, device=clock.device)
        base, sampling, anchor = drafter.base_logits(hidden), state.sampling(1), state.anchor[:1]

        @torch.inference_mode()
        def pruned(b: Any = base, h: Any = hidden, w: Any = head, s: Any = sampling, a: Any = anchor) -> None:
            walk(prepare(b, h, w, 128), a, w, s)

        @torch.inference_mode()
        def full(b: Any = base, h: Any = hidden, w: Any = head, s: Any = sampling, a: Any = anchor) -> None:
            full_walk(b, h, a, w, s)

        report.add("walk over 128 candidates, selection included", clock.ms(clock.captured(pruned)) * 1e3, "µs")
        report.add("walk over the whole vocabulary (persistent)", clock.ms(clock.captured(full)) * 1e3, "µs")


def smollm2(report: Report, clock: Clock, config: Config) -> None:
    """The real model: DSpark and plain through the whole engine, against the library's own generate."""
    engine, codec = build_engine(config, SILENT if clock.smoke else Progress())
    assert codec is not None
    tokens = 16 if clock.smoke else 256
    questions = ["Write a short story about a lighthouse keeper.", "Explain how a hash table works, with an example."]
    prompts = [tuple(codec.encode_chat([{"role": "user", "content": q}])) for q in questions]
    rates: dict[Mode, list[float]] = {"plain": [], "dspark": []}
    with LocalEngine(engine) as local:
        for repeat in range(1 if clock.smoke else 3):
            for mode, measured in rates.items():
                for i, prompt in enumerate(prompts):
                    request = GenerationRequest(
                        request_id=f"{mode}{repeat}{i}",
                        prompt_ids=prompt,
                        sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
                        mode=mode,
                    )
                    times = [at for event, at in local.run([request]) if isinstance(event, TokensEvent)]
                    measured.append((tokens - 1) / max(1e-9, times[-1] - times[0]))
    peer = library_generate(config, prompts[0], tokens, clock)
    mine = {mode: median(values) for mode, values in rates.items()}
    report.add("SmolLM2-135M, transformers generate", peer, "tok/s")
    report.add("SmolLM2-135M, plain", mine["plain"], "tok/s", note=f"{mine['plain'] / peer:.1f} x generate")
    report.add("SmolLM2-135M, DSpark", mine["dspark"], "tok/s")
    best = max(mine.values()) / peer
    report.add("SmolLM2-135M, better of both / generate", best, "x", None if clock.smoke else 10, "40")


def library_generate(config: Config, prompt: Sequence[int], tokens: int, clock: Clock) -> float:
    """Tokens a second of the library's own greedy generate on the same device and file."""
    from transformers import AutoModelForCausalLM

    path = ensure_embedded_model(config.cache_dir, SILENT)
    dtype = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype).to(clock.device)
    ids = torch.tensor([list(prompt)], device=clock.device)
    rates = []
    for _ in range(1 if clock.smoke else 3):
        clock.wait()
        begun = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        clock.wait()
        rates.append(tokens / (time.perf_counter() - begun))
    return max(rates)


def profile(report: Report, clock: Clock, shape: Shape, out: Path) -> None:
    """One round of one stream by kernel, with the torch profiler, for docs/gpu.md."""
    models = random_models(shape, clock.device, 2 * (CONTEXT + 1040), "none" if clock.smoke else "nf4")
    models.schedule = parse_schedule("fixed:7")
    rounds = GraphRounds(models, seats=1, longest=CONTEXT + 1040)
    rounds.state.bind([rounds.seat_of(s) for s in seated(models, 1, "dspark", 1000)])
    size = Size(1, 8, True)
    rounds.ladder.run(size)
    clock.wait()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if clock.device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(5):
            rounds.ladder.run(size)
        clock.wait()
    sort = "self_device_time_total" if clock.device.type == "cuda" else "self_cpu_time_total"
    out.write_text(found.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=80))
    report.add("profile of five rounds by kernel", len(found.key_averages()), "kernels", note=str(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU if need be: no figure counts")
    parser.add_argument("--quant", default="w4a16", help="quantisation of the drafts of random shapes")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="some sections by name instead of all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.csv"))
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.smoke:
        sys.exit("bench/gpu.py measures a GPU, and torch sees none here; --smoke shows that it runs")
    where: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    device = torch.device(where)
    clock, report = Clock(device, args.smoke), Report()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bandwidth = floors(report, clock)
    config = Config(device=where, max_num_seqs=1, schedule="fixed:7", cpu_kernels="off")
    big, middle = (TINY, TINY) if args.smoke else (QWEN3_8B, QWEN3_4B)
    sections: list[tuple[str, Callable[[], None]]] = [
        ("8B shape", lambda: shape_section(report, clock, big, bandwidth, args.quant, not args.smoke)),
        ("SmolLM2", lambda: smollm2(report, clock, config)),
        ("profile", lambda: profile(report, clock, big, args.out.with_name("gpu-profile.txt"))),
        ("drafts", lambda: draft_section(report, clock, big)),
        ("linears", lambda: linears(report, clock, bandwidth)),
        ("4B shape", lambda: shape_section(report, clock, middle, bandwidth, args.quant, False)),
    ]
    for name, section in sections:
        if args.only and name not in args.only:
            continue
        if clock.late:
            report.failed.append(f"{name}: no time left")
            continue
        try:
            section()
        except Exception as error:  # one part that fails must not cost the figures of the others
            traceback.print_exc()
            report.failed.append(f"{name}: {error}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.show()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    about = {"commit": commit.stdout.strip(), "machine": machine, "torch": torch.__version__}
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*report.rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in report.rows)
    print(f"written to {args.out}; {time.perf_counter() - clock.began:.0f} s on {machine}")
    if args.smoke:
        print("SMOKE: tiny shapes; none of these figures means anything")
    for line in report.failed:
        print(f"FAILED {line}")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
