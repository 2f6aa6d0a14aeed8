"""Schedules against each other at rising loads, in turns on one engine: what ``reproduce`` and bench/pareto.py measure.

A variant is a schedule's name, or ``plain`` for streams that ask for plain decoding. A load is a number of streams
that are kept busy. Everything is measured from finished streams: tokens a second of each, and of all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Protocol

import msgspec
import numpy as np

from dspark_stream.console import SILENT
from dspark_stream.engine.boundary import Tokenizer
from dspark_stream.engine.local import LocalEngine
from dspark_stream.errors import ContextLengthError
from dspark_stream.measure.evaluate import Message, Plan, Prompt, Tally, run_prompts
from dspark_stream.measure.prompts import PROMPTS
from dspark_stream.types import SamplingParams, Verification

PLAIN = "plain"
LEAST_ANSWERS = 12


class Scheduled(Protocol):
    """An engine whose schedule can be changed."""

    def use_schedule(self, name: str) -> None:
        """See `EngineThread.use_schedule`."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One variant at one load, one run."""

    variant: str
    streams: int
    temperature: float
    repeat: int = 0
    """Runs of one repeat draw the same tokens, as far as their schedules let them."""
    tokens_per_s: float
    """Of all streams together, prefill included."""
    tokens_per_s_user: float
    """Mean over streams, from the first token on."""
    accepted_length: float
    verified: float
    """Draft tokens verified a round and stream, skipped rounds included."""
    skipped: float
    """Share of rounds of a stream in which it was not drafted for."""
    calibration_error: float | None
    """Of promised prefix survival, mean over positions, where tokens were verified."""


def shipped_prompts() -> list[Prompt]:
    """Real requests of three domains; see `prompts.PROMPTS`."""
    return [Prompt(messages=[Message(role="user", content=text)]) for _, text in PROMPTS]


def measure(
    engine: Scheduled,
    local: LocalEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    variant: str,
    streams: int,
    temperature: float,
    tokens: int,
    verification: Verification = "rejection",
    waves: int = 2,
    least: int = LEAST_ANSWERS,
    repeat: int = 0,
) -> tuple[Point, Tally]:
    """Run every prompt of ``waves`` answers for each stream, of ``tokens`` tokens less or more a half.

    The more answers, and there are never fewer than ``least``, the less the half-empty end weighs. Each ``repeat``
    draws other tokens where there is a temperature: the same ones again would only tell what the machine does, and how
    many drafts a few answers accept is as much chance as that.
    """
    if variant != PLAIN:
        engine.use_schedule(variant)
    asked = [prompts[i % len(prompts)] for i in range(max(least, waves * streams))]
    plan = Plan(
        sampling=SamplingParams(max_tokens=tokens, temperature=temperature, seed=1 + 10_000 * repeat, ignore_eos=True),
        mode="plain" if variant == PLAIN else "dspark",
        verification=verification,
        streams=streams,
        spread=0.5,
    )
    tally = run_prompts(local, tokenizer, asked, plan, SILENT, variant)
    if tally.passed_over:  # loads would not be what they are called
        raise ContextLengthError(
            f"{tally.passed_over} prompts are too long with answers of some {tokens} tokens: max_model_len is "
            f"{local.info.max_model_len}",
            param="max_model_len",
        )
    figures = tally.figures()
    rounds = len(tally.rounds)
    point = Point(
        variant=variant,
        streams=streams,
        temperature=temperature,
        repeat=repeat,
        tokens_per_s=figures.tokens_per_s_total or 0.0,
        tokens_per_s_user=figures.tokens_per_s_user or 0.0,
        accepted_length=figures.accepted_length or 0.0,
        verified=sum(r.scheduled for r in tally.rounds) / rounds,
        skipped=sum(not r.draft_tokens for r in tally.rounds) / rounds,
        calibration_error=figures.calibration_error,
    )
    return point, tally


def medians(points: Sequence[Point]) -> list[Point]:
    """One point for each variant, load and temperature: the median of every figure over its runs."""
    groups: dict[tuple[float, int, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.temperature, point.streams, point.variant), []).append(point)
    return [
        msgspec.structs.replace(
            some[0],
            repeat=0,
            tokens_per_s=median(p.tokens_per_s for p in some),
            tokens_per_s_user=median(p.tokens_per_s_user for p in some),
            accepted_length=median(p.accepted_length for p in some),
            verified=fmean(p.verified for p in some),
            skipped=fmean(p.skipped for p in some),
            calibration_error=_mean([p.calibration_error for p in some]),
        )
        for some in groups.values()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def curve(points: Sequence[Point], variant: str, temperature: float) -> list[Point]:
    """One variant's points by rising load."""
    return sorted((p for p in points if (p.variant, p.temperature) == (variant, temperature)), key=lambda p: p.streams)


def gain_at_same_load(points: Sequence[Point], variant: str, other: str, temperature: float) -> dict[int, float]:
    """Total tokens a second over another variant's, by streams: within each repeat, then the median over them."""
    base = {(p.repeat, p.streams): p.tokens_per_s for p in curve(points, other, temperature)}
    gains: dict[int, list[float]] = {}
    for p in curve(points, variant, temperature):
        if theirs := base.get((p.repeat, p.streams)):
            gains.setdefault(p.streams, []).append(p.tokens_per_s / theirs)
    return {streams: median(some) for streams, some in gains.items()}


def gain_at_matched_throughput(
    points: Sequence[Point], variant: str, other: str, temperature: float
) -> dict[int, float | None]:
    """Tokens a second of each user over what another variant gives at the same *total* throughput, by own load.

    The other's points are joined by straight lines. None: the other never reaches that throughput, or only beyond
    what was measured: no number would be honest there.
    """
    theirs = sorted((p.tokens_per_s, p.tokens_per_s_user) for p in curve(points, other, temperature))
    gains: dict[int, float | None] = {}
    for p in curve(points, variant, temperature):
        inside = bool(theirs) and theirs[0][0] <= p.tokens_per_s <= theirs[-1][0]
        user = float(np.interp(p.tokens_per_s, [t for t, _ in theirs], [u for _, u in theirs])) if inside else 0.0
        gains[p.streams] = p.tokens_per_s_user / user if user else None
    return gains
