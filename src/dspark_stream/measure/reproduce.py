"""``dspark-stream reproduce``: how much of the paper's 60 to 85 % is real on this machine, with a report page."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from html import escape
from statistics import median
from typing import NamedTuple

from dspark_kernels.cpu import cpu_name
from dspark_stream import __version__
from dspark_stream.console import Progress
from dspark_stream.engine.boundary import Tokenizer
from dspark_stream.engine.local import LocalEngine
from dspark_stream.engine.worker import EngineThread
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.measure.evaluate import Prompt
from dspark_stream.measure.plot import Series, line_chart
from dspark_stream.measure.profile import plot as capacity_plot
from dspark_stream.measure.sweep import (
    PLAIN,
    Point,
    curve,
    gain_at_matched_throughput,
    gain_at_same_load,
    measure,
    medians,
)
from dspark_stream.types import GenerationRequest, ModelInfo, SamplingParams, TokensEvent

ADAPTIVE, ONE = "adaptive", "fixed:1"
NOISE = 0.02
"""Of a total throughput: less is no difference."""


class Plan(NamedTuple):
    """What is measured."""

    streams: tuple[int, ...]
    temperatures: tuple[float, ...]
    tokens: int
    minutes: float
    """Repeats go on until so long has passed; the first is always finished."""
    most_repeats: int = 5


FULL = Plan((1, 2, 4, 8, 16, 32, 64), (0.0, 1.0), 48, 9.0)
QUICK = Plan((1, 4), (0.0,), 12, 0.2, 1)


class Findings(NamedTuple):
    """Everything that the report tells."""

    info: ModelInfo
    plan: Plan
    repeats: int
    points: list[Point]
    """Medians over repeats."""
    swings: dict[tuple[float, int], float]
    """By how much two runs of plain decoding in one turn were apart at most, by temperature and streams: noise."""
    texts_compared: int
    texts_that_differ: int
    capacity: CapacityCurve
    machine: str
    took_s: float


def run(
    engine: EngineThread,
    local: LocalEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    plan: Plan,
    progress: Progress,
) -> Findings:
    """Measure all variants in turns, load by load, over and over until the time is used; then compare texts.

    A turn begins and ends with plain decoding: how far these two are apart is what the machine does by itself.

    Raises:
        DsparkError: the engine failed.
    """
    variants = [PLAIN, ONE, f"fixed:{engine.info.gamma}", ADAPTIVE, PLAIN]
    points: list[Point] = []
    begun_s = time.monotonic()
    repeats = 0
    while repeats < plan.most_repeats:
        pass_begun_s = time.monotonic()
        runs = [(t, s, v) for t in plan.temperatures for s in plan.streams for v in variants]
        with progress.bar(f"loads, repeat {repeats + 1}", len(runs), "run") as bar:
            for temperature, streams, variant in runs:
                point, _ = measure(
                    engine, local, tokenizer, prompts, variant=variant, streams=streams, temperature=temperature,
                    tokens=plan.tokens, waves=2 if streams < 16 else 1, repeat=repeats,
                )  # fmt: skip
                points.append(point)
                bar.advance(note=f"{streams} x {variant} {point.tokens_per_s:.0f} tokens/s")
        repeats += 1
        took_s = time.monotonic() - pass_begun_s
        if time.monotonic() - begun_s + took_s > 60 * plan.minutes:
            break
    with progress.stage("comparing texts"):
        compared, differ = _compare_texts(engine, local, tokenizer, prompts, plan)
    return Findings(
        info=engine.info,
        plan=plan,
        repeats=repeats,
        points=medians(points),
        swings=swings(points),
        texts_compared=compared,
        texts_that_differ=differ,
        capacity=engine.capacity,
        machine=machine(engine.info),
        took_s=time.monotonic() - begun_s,
    )


def _compare_texts(
    engine: EngineThread, local: LocalEngine, tokenizer: Tokenizer, prompts: Sequence[Prompt], plan: Plan
) -> tuple[int, int]:
    """Greedy and coupled texts, plain against every schedule, alone against in company: they must be the same."""

    def texts(mode: str, streams: int, schedule: str | None = None) -> dict[str, list[int]]:
        if schedule:
            engine.use_schedule(schedule)
        requests = [
            GenerationRequest(
                request_id=f"{i}-{temperature:g}",
                prompt_ids=tuple(tokenizer.encode_chat([(m.role, m.content) for m in prompt.messages])),
                sampling=SamplingParams(max_tokens=plan.tokens, temperature=temperature, seed=i, ignore_eos=True),
                mode="plain" if mode == PLAIN else "dspark",
                verification="coupled",
            )
            for i, prompt in enumerate(prompts[:6])
            for temperature in plan.temperatures
        ]
        ids: dict[str, list[int]] = {r.request_id: [] for r in requests}
        for event, _ in local.run(requests, streams):
            if isinstance(event, TokensEvent):
                ids[event.request_id] += event.token_ids
        return ids

    plain = texts(PLAIN, 1)
    compared = differ = 0
    for streams, schedule in ((1, f"fixed:{engine.info.gamma}"), (6, ADAPTIVE), (6, "lagged")):
        for name, ids in texts("dspark", streams, schedule).items():
            compared += 1
            differ += ids != plain[name]
    return compared, differ


def machine(info: ModelInfo) -> str:
    """What all of this ran on."""
    return f"{cpu_name()}, {os.cpu_count()} cores, {info.device} {info.dtype}"


def swings(points: Sequence[Point]) -> dict[tuple[float, int], float]:
    """See `Findings.swings`."""
    turns: dict[tuple[float, int, int], list[float]] = {}
    for p in points:
        if p.variant == PLAIN:
            turns.setdefault((p.temperature, p.streams, p.repeat), []).append(p.tokens_per_s)
    apart: dict[tuple[float, int], float] = {}
    for (temperature, streams, _), rates in turns.items():
        apart[temperature, streams] = max(apart.get((temperature, streams), 0.0), 1 - min(rates) / max(rates))
    return apart


# --- the verdict -------------------------------------------------------------------------------------------


def verdict(findings: Findings) -> list[str]:
    """What it comes to, in plain words."""
    points, lines = findings.points, []
    for t in findings.plan.temperatures:
        at = f"temperature {t:g}"
        over_plain = gain_at_same_load(points, ADAPTIVE, PLAIN, t)
        noise = {s: max(NOISE, findings.swings.get((t, s), 0.0)) for s in over_plain}
        worst = min(over_plain, key=lambda s: over_plain[s] + noise[s])  # that the least of it is noise
        swing = findings.swings.get((t, worst), 0.0)
        kept = over_plain[worst] >= 1 - noise[worst]
        moved = f" (two runs of plain decoding were {swing:.0%} apart)" if swing > NOISE else ""
        lines.append(
            f"{at}: at its worst load ({_streams(worst)}) the adaptive schedule makes {over_plain[worst]:.2f} times "
            f"the tokens of plain decoding: {'never a tax, within noise' if kept else 'there it is a tax'}{moved}."
        )
        alone = curve(points, ADAPTIVE, t)[0]
        base = curve(points, PLAIN, t)[0]
        lines.append(
            f"{at}: {_streams(alone.streams)} alone gets {alone.tokens_per_s_user / base.tokens_per_s_user:.2f} times "
            f"the speed of plain decoding, at an accepted length of {alone.accepted_length:.2f}."
        )
        fixed = gain_at_same_load(points, ADAPTIVE, f"fixed:{findings.info.gamma}", t)
        ones = gain_at_same_load(points, ADAPTIVE, ONE, t)
        best = min(min(fixed[s], ones[s]) for s in fixed)
        lines.append(
            f"{at}: against the better fixed length the adaptive schedule makes {best:.2f} times the tokens at its "
            f"worst load, and {max(fixed.values()):.1f} times those of whole blocks at the best."
        )
        matched = [g for g in gain_at_matched_throughput(points, ADAPTIVE, ONE, t).values() if g is not None]
        if matched:
            lines.append(
                f"{at}: at the same total throughput each user gets {min(matched):.2f} to {max(matched):.2f} times the "
                f"speed of one-token drafts (median {median(matched):.2f}; the paper, on its own hardware, model and "
                f"drafter: 1.60 to 1.85)."
            )
        else:
            lines.append(
                f"{at}: one-token drafts never reach the totals of the adaptive schedule, so speeds cannot be "
                f"compared at the same total throughput."
            )
    apart = sorted(findings.swings.values())
    if apart and apart[-1] > NOISE:
        lines.append(
            f"Noise: two runs of plain decoding in one turn were {median(apart):.0%} apart in the median and "
            f"{apart[-1]:.0%} at most. Of all the figures above, differences within that are the machine's."
        )
    same = findings.texts_compared - findings.texts_that_differ
    parted = "; the others part somewhere, on torch at near ties" if findings.texts_that_differ else ""
    lines.append(
        f"Losslessness: {same} of {findings.texts_compared} greedy and coupled texts are, token for token, those of "
        f"plain decoding{parted}."
    )
    if findings.plan == QUICK:
        lines.append("This was the quick run: too short for its figures to mean anything.")
    return lines


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


# --- the page ----------------------------------------------------------------------------------------------


def report(findings: Findings) -> str:
    """A page that stands alone: no script, no file beside it."""
    points, info = findings.points, findings.info
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>dspark-stream: reproduction report</title>",
        "<style>body{font:15px/1.5 sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;margin:1em 0}td,th{padding:3px 10px;border-bottom:1px solid #ddd;"
        "text-align:right}th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto}</style>",
        "<h1>How much of DSpark's claim is real here</h1>",
        f"<p>{escape(info.model)} with {escape(info.drafter or 'no drafter')} (γ = {info.gamma}), dspark-stream "
        f"{__version__}, on {escape(findings.machine)}. {findings.repeats} repeats in turns, answers of "
        f"{findings.plan.tokens} tokens, medians; {findings.took_s / 60:.1f} minutes.</p>",
        "<ul>",
        *(f"<li>{escape(line)}</li>" for line in verdict(findings)),
        "</ul>",
    ]
    for t in findings.plan.temperatures:
        variants = list(dict.fromkeys(p.variant for p in points))
        lines = {v: curve(points, v, t) for v in variants}
        parts += [
            f"<h2>Temperature {t:g}</h2>",
            line_chart(
                f"Total throughput against speed of each user, temperature {t:g}",
                "tokens/s of each user",
                "tokens/s in all",
                [Series(v, [(p.tokens_per_s_user, p.tokens_per_s) for p in line]) for v, line in lines.items()],
            ),
            line_chart(
                f"Draft tokens verified a round, temperature {t:g}",
                "streams",
                "verification length ℓ",
                [Series(v, [(p.streams, p.verified) for p in line]) for v, line in lines.items()],
                log_x=True,
            ),
            _table([p for line in lines.values() for p in line], points, t),
        ]
    parts += ["<h2>What rounds cost here</h2>", capacity_plot(findings.capacity).svg(), "</html>"]
    return "\n".join(parts)


def _table(rows: Sequence[Point], points: Sequence[Point], temperature: float) -> str:
    heads = (
        "variant",
        "streams",
        "tokens/s in all",
        "each user",
        "× plain in all",
        "τ",
        "ℓ",
        "skipped",
        "calibration error",
    )
    out = ["<table><tr>", *(f"<th>{h}</th>" for h in heads), "</tr>"]
    for p in sorted(rows, key=lambda p: (p.streams, p.variant != PLAIN)):
        over = gain_at_same_load(points, p.variant, PLAIN, temperature).get(p.streams, 0.0)
        error = "" if p.calibration_error is None else f"{p.calibration_error:.1%}"
        cells = (
            p.variant, p.streams, f"{p.tokens_per_s:.0f}", f"{p.tokens_per_s_user:.1f}", f"{over:.2f}",
            f"{p.accepted_length:.2f}", f"{p.verified:.2f}", f"{p.skipped:.0%}", error,
        )  # fmt: skip
        out += ["<tr>", *(f"<td>{cell}</td>" for cell in cells), "</tr>"]
    return "".join([*out, "</table>"])
