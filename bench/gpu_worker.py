"""One section of bench/gpu.py in a process of its own: a CUDA error there ends no other section.

    python bench/gpu_worker.py SECTION --rows FILE [--smoke] [--quant Q] [--folder runs]

Every figure is appended to ``FILE`` as one JSON line the moment it is there, so a section that is killed loses none.
"""

from __future__ import annotations

import argparse
import json
import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import gpu_models
from dspark_kernels.sequential_head import prepare, walk
from dspark_stream.config import Config
from dspark_stream.console import SILENT, Progress
from dspark_stream.decoding.schedule import parse_schedule
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.captured.graphs import Size
from dspark_stream.engine.captured.runner import CANDIDATES, CapturedRounds
from dspark_stream.engine.local import LocalEngine
from dspark_stream.engine.rounds import Models
from dspark_stream.models.fetch import model_path
from dspark_stream.models.torch.quant import Quant, quantise_linears
from dspark_stream.types import GenerationRequest, Mode, SamplingParams, TokensEvent
from gpu_models import (
    CONTEXT,
    QWEN3_4B,
    QWEN3_8B,
    TAU,
    TINY,
    Clock,
    Shape,
    draft_bytes,
    pace,
    random_models,
    seated,
    synthetic,
    weight_bytes,
)


@dataclass
class Bench:
    """What a section works with."""

    clock: Clock
    quant: Quant
    rows: Path
    folder: Path
    failed: int = 0

    @property
    def device(self) -> torch.device:
        return self.clock.device

    @property
    def smoke(self) -> bool:
        return self.clock.smoke

    def add(
        self, what: str, value: float, unit: str, floor: float | None = None, goal: str = "", note: str = ""
    ) -> None:
        """One figure; ``floor`` negative means that less is better and its size is the limit."""
        met, limit = "", ""
        if floor is not None:
            met = "yes" if (value >= floor if floor >= 0 else value <= -floor) else "NO"
            limit = f"{'≥' if floor >= 0 else '≤'} {abs(floor):g}"
        row = {"what": what, "value": f"{value:.4g}", "unit": unit, "floor": limit, "goal": goal, "met": met}
        with self.rows.open("a") as file:
            file.write(json.dumps(row | {"note": note}) + "\n")
        print(f"  {what}: {value:.4g} {unit} {limit} {met} {note}", flush=True)

    def part(self, name: str, run: Callable[[], None]) -> None:
        """One of several measurements of a section: what fails is said, and the next one goes on."""
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            self.failed += 1
            print(f"  FAILED {name}: {error}", flush=True)


def copy_bandwidth(clock: Clock) -> float:
    """GB/s of a large copy on the device, bytes read and written both counted."""
    size = 1 << (24 if clock.smoke else 32)
    source = torch.empty(size // 2, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return size / clock.ms(lambda: target.copy_(source)) / 1e6


def floors(bench: Bench, shape: Shape) -> None:
    """What this machine can do at best."""
    bench.add("copy bandwidth", copy_bandwidth(bench.clock), "GB/s")
    one = torch.zeros(1, device=bench.device)
    clock = bench.clock
    bench.add("graph of one empty kernel", clock.ms(clock.captured(lambda: one.add_(1)), each=50) * 1e3, "µs")


def rounds_of(models: Models, schedule: str, seats: int, longest: int, rate: float) -> CapturedRounds:
    return CapturedRounds(models, parse_schedule(schedule), seats=seats, longest=longest, replace=synthetic(rate))


def one_stream(bench: Bench, shape: Shape) -> None:
    """Plain and DSpark decoding of a shape, one stream; floors count for the 8B shape."""
    clock, strict, tokens = bench.clock, shape is QWEN3_8B, 100 if bench.smoke else 1200
    size = CONTEXT + tokens + 16
    models = random_models(shape, bench.device, size, bench.quant)
    bandwidth = copy_bandwidth(clock)
    floor_ms = weight_bytes(models.target) / bandwidth / 1e6
    tau, rate, name = 3.6, TAU[3.6], shape.name
    rounds = rounds_of(models, "fixed:7", 1, size, rate)

    def graph_ms(which: Size, mode: Mode) -> float:
        streams = seated(models, 1, mode, tokens)
        rounds.state.bind([rounds.seat_of(s) for s in streams])
        return clock.ms(lambda: rounds.ladder.run(which))

    plain_ms = graph_ms(Size(1, 1, False), "plain")
    bench.add(f"{name}: plain step", plain_ms, "ms", note=f"weights alone {floor_ms:.2f} ms")
    share = floor_ms / plain_ms
    bench.add(f"{name}: plain, share of the bandwidth floor", share, "", 0.65 if strict else None, "0.85")
    verify_ms = graph_ms(Size(1, 8, False), "plain")
    bench.add(f"{name}: pass over 8 rows", verify_ms, "ms")
    whole_ms = graph_ms(Size(1, 8, True), "dspark")
    draft_ms = whole_ms - verify_ms
    note = f"weights alone {draft_bytes(models) / bandwidth / 1e6:.2f} ms"
    bench.add(f"{name}: draft ({bench.quant}), walk included", draft_ms, "ms", note=note)
    bench.add(f"{name}: draft / plain step", draft_ms / plain_ms, "", -0.20 if strict else None, "0.08")

    plain = pace(rounds, seated(models, 1, "plain", tokens), clock, 150)
    drafted = pace(rounds, seated(models, 1, "dspark", tokens), clock, 150)
    gap = max(0.0, 1 - whole_ms / drafted.round_ms)
    ideal = drafted.accepted_length * plain_ms / (draft_ms + verify_ms)
    ratio = drafted.tokens_per_s / plain.tokens_per_s
    at_tau = ratio * tau / drafted.accepted_length  # a round takes as long whatever is accepted in it
    bench.add(f"{name}: plain, one stream", plain.tokens_per_s, "tok/s")
    bench.add(f"{name}: host gap between rounds", 100 * gap, "% of a round", -3.0 if strict else None, "0")
    note = f"synthetic; {ratio:.2f} x at the τ of {drafted.accepted_length:.2f} that was drawn"
    bench.add(f"{name}: DSpark / plain, one stream, τ {tau}", at_tau, "x", 2.2 if strict else None, "3.0", note)
    bench.add(f"{name}: of τ·T/(T_draft+T_verify)", ratio / ideal, "", 0.9 if strict else None, "0.98")


def crowd(bench: Bench, shape: Shape) -> None:
    """64 streams at once: adaptive against plain, and where drafts are so bad that skipping them is all that helps."""
    many, tokens = (2, 100) if bench.smoke else (64, 700)
    size = CONTEXT + tokens + 16
    models = random_models(shape, bench.device, many * size, bench.quant)
    for tau, rate, strict in ((3.6, TAU[3.6], True), (1.1, 0.1, False)):
        rounds = rounds_of(models, "adaptive", many, size, rate)
        rounds.ladder.warm(seats=many)
        plain = pace(rounds, seated(models, many, "plain", tokens), bench.clock, 60)
        drafted = pace(rounds, seated(models, many, "dspark", tokens), bench.clock, 60)
        note = f"{drafted.tokens_per_s:.0f} tok/s, synthetic τ {drafted.accepted_length:.2f}"
        bench.add(
            f"{shape.name}: adaptive / plain, {many} streams, τ {tau} a round of whole blocks",
            drafted.tokens_per_s / plain.tokens_per_s,
            "x",
            1.0 if strict and not bench.smoke else None,
            "1.3" if strict else "",
            note,
        )


def linears(bench: Bench, shape: Shape) -> None:
    """A drafter's widest layer at M = 1, 4, 8: bfloat16, our own kernels, bitsandbytes; share of the copy bandwidth."""
    inputs, outputs = (128, 64) if bench.smoke else (12288, 4096)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    kinds: list[Quant] = ["none", "w8a16", "w4a16"] if bench.smoke else ["none", "w8a16", "w4a16", "nf4", "int8"]
    bits = {"none": 16, "int8": 8, "w8a16": 8.25, "nf4": 4.5, "w4a16": 4.5}
    bandwidth = copy_bandwidth(bench.clock)

    @torch.inference_mode()
    def measure(kind: Quant) -> None:
        layers = nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for _ in range(8)))  # more than L2 holds
        layers = layers.to(bench.device, dtype).requires_grad_(False)
        quantise_linears(layers, kind)
        for m in (1, 4, 8):
            x = torch.randn(m, inputs, dtype=dtype, device=bench.device)

            @torch.inference_mode()
            def run(x: torch.Tensor = x, layers: nn.Sequential = layers) -> None:
                for layer in layers:
                    layer(x)

            ms = bench.clock.ms(bench.clock.captured(run)) / len(layers)
            share = inputs * outputs * bits[kind] / 8 / (ms * 1e6) / bandwidth
            name = f"linear {inputs} → {outputs}, {kind}, M = {m}"
            bench.add(name, ms * 1e3, "µs", note=f"{share:.2f} of copy bandwidth")

    for kind in kinds:
        bench.part(f"linear, {kind}", lambda kind=kind: measure(kind))


def small(shape: Shape) -> Shape:
    """The target as a holder of embedding and head alone: drafts are the same."""
    return shape._replace(layers=max(shape.taps) + 2, inner=shape.hidden)


def drafts(bench: Bench, shape: Shape) -> None:
    """The same draft in every precision, and what the walk over candidates takes of it."""
    bandwidth = copy_bandwidth(bench.clock)

    def measure(kind: Quant) -> None:
        models = random_models(small(shape), bench.device, CONTEXT + 1040, kind)
        rounds = CapturedRounds(models, parse_schedule("fixed:7"), seats=1, longest=CONTEXT + 1040)
        rounds.state.bind([rounds.seat_of(s) for s in seated(models, 1, "dspark", 1000)])
        parts, state = rounds.ladder.models, rounds.state
        here = torch.ones(1, dtype=torch.bool, device=bench.device)

        @torch.inference_mode()
        def draft() -> None:
            gpu_models.rounds_module._draft(parts, state, 1, here)

        ms = bench.clock.ms(bench.clock.captured(draft))
        floor_ms = draft_bytes(models) / bandwidth / 1e6
        bench.add(f"draft of the {shape.name}, {kind}", ms, "ms", note=f"weights alone {floor_ms:.2f} ms")
        if kind == "none":
            walks(bench, models, rounds)

    kinds: list[Quant] = ["none", "w4a16"] if bench.smoke else ["none", "w4a16", "w8a16", "nf4", "int8"]
    for kind in kinds:
        bench.part(f"draft, {kind}", lambda kind=kind: measure(kind))


def walks(bench: Bench, models: Models, rounds: CapturedRounds) -> None:
    """The sequential head over candidates."""
    drafter, head, state = models.drafter, rounds.ladder.models.head, rounds.state
    assert drafter is not None
    assert head is not None
    hidden = torch.randn(1, 7, models.target.hidden_size, dtype=models.target.dtype, device=bench.device)
    with torch.inference_mode():
        base = drafter.base_logits(hidden)
    sampling, anchor = state.sampling(1), state.anchor[:1]

    @torch.inference_mode()
    def run() -> Any:
        return walk(prepare(base, hidden, head, CANDIDATES), anchor, head, sampling)

    name = f"walk over {CANDIDATES} candidates, selection included"
    bench.add(name, bench.clock.ms(bench.clock.captured(run)) * 1e3, "µs")


def smollm2(bench: Bench, shape: Shape) -> None:
    """The real model: DSpark and plain through the whole engine, against the library's own generate."""
    where: Any = bench.device.type
    config = Config(model="smollm2-135m", device=where, max_num_seqs=1, schedule="fixed:7", cpu_kernels="off")
    engine, codec = build_engine(config, SILENT if bench.smoke else Progress())
    assert codec is not None
    tokens = 16 if bench.smoke else 256
    questions = ["Write a short story about a lighthouse keeper.", "Explain how a hash table works, with an example."]
    prompts = [tuple(codec.encode_chat([("user", q)])) for q in questions]
    rates: dict[Mode, list[float]] = {"plain": [], "dspark": []}
    lengths = []
    with LocalEngine(engine) as local:
        for repeat in range(1 if bench.smoke else 3):
            for mode, measured in rates.items():
                for i, prompt in enumerate(prompts):
                    request = GenerationRequest(
                        request_id=f"{mode}{repeat}{i}",
                        prompt_ids=prompt,
                        sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
                        mode=mode,
                    )
                    events = [*local.run([request])]
                    times = [at for event, at in events if isinstance(event, TokensEvent)]
                    measured.append((tokens - 1) / max(1e-9, times[-1] - times[0]))
                    if mode == "dspark":
                        lengths.append((tokens - 1) / max(1, len(times) - 1))
    mine = {mode: median(values) for mode, values in rates.items()}
    bench.add("SmolLM2-135M, plain", mine["plain"], "tok/s")
    bench.add("SmolLM2-135M, DSpark", mine["dspark"], "tok/s", note=f"accepted length {median(lengths):.2f}")
    peer = library_generate(bench, config, prompts[0], tokens)
    bench.add("SmolLM2-135M, transformers generate", peer, "tok/s")
    best = max(mine.values()) / peer
    bench.add("SmolLM2-135M, better of both / generate", best, "x", None if bench.smoke else 10, "40")


def library_generate(bench: Bench, config: Config, prompt: Sequence[int], tokens: int) -> float:
    """Tokens a second of the library's own greedy generate on the same device and file: the best of three."""
    import time

    from transformers import AutoModelForCausalLM

    path = Path(model_path(config.model, config.cache_dir, SILENT))
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype).to(bench.device)
    ids = torch.tensor([list(prompt)], device=bench.device)
    rates = []
    for _ in range(1 if bench.smoke else 3):
        bench.clock.wait()
        begun = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        bench.clock.wait()
        rates.append(tokens / (time.perf_counter() - begun))
    return max(rates)


def profile(bench: Bench, shape: Shape) -> None:
    """One round of one stream by kernel, with the torch profiler, as a table for docs/gpu.md."""
    models = random_models(shape, bench.device, CONTEXT + 1040, bench.quant)
    rounds = CapturedRounds(models, parse_schedule("fixed:7"), seats=1, longest=CONTEXT + 1040)
    rounds.state.bind([rounds.seat_of(s) for s in seated(models, 1, "dspark", 1000)])
    size, count = Size(1, 8, True), 5
    rounds.ladder.run(size)
    bench.clock.wait()
    on_gpu = bench.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if on_gpu else kind.CPU]) as found:
        for _ in range(count):
            rounds.ladder.run(size)
        bench.clock.wait()

    def us(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / count

    events = sorted(found.key_averages(), key=us, reverse=True)
    total = sum(map(us, events))
    lines = [f"One round of the {shape.name}, {bench.quant} draft, 8 rows: {total / 1e3:.2f} ms in kernels", ""]
    lines += ["| kernel | launches | µs | share |", "| --- | --- | --- | --- |"]
    for event in events[:25]:
        name = event.key.replace("|", "/")[:70]
        lines.append(f"| `{name}` | {event.count / count:g} | {us(event):.0f} | {us(event) / total:.1%} |")
    out = bench.folder / "gpu-profile.md"
    out.write_text("\n".join(lines) + "\n")
    launches = sum(event.count for event in events) / count
    bench.add(f"{shape.name}: launches in a round", launches, "", note=f"{total / 1e3:.2f} ms in kernels; {out}")


SECTIONS: dict[str, tuple[Callable[[Bench, Shape], None], Shape]] = {
    "floors": (floors, QWEN3_8B),
    "8b": (one_stream, QWEN3_8B),
    "smollm2": (smollm2, QWEN3_8B),
    "crowd": (crowd, QWEN3_8B),
    "profile": (profile, QWEN3_8B),
    "drafts": (drafts, QWEN3_8B),
    "linears": (linears, QWEN3_8B),
    "4b": (one_stream, QWEN3_4B),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--quant", default="w4a16")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    device = torch.device("cpu" if args.smoke or not torch.cuda.is_available() else "cuda")
    bench = Bench(Clock(device, args.smoke), args.quant, args.rows, args.folder)
    run, shape = SECTIONS[args.section]
    run(bench, TINY if args.smoke else shape)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
