"""``dspark-stream calibrate``: fit a drafter's confidence to what its rounds really accept.

The engine runs prompts with every draft verified and every confidence as the head gives it; to these rounds
`decoding.platt` fits a temperature and a bias for each position. It works for any drafter with a confidence head,
trained here or not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import get_args

import msgspec
import numpy as np

from dspark_stream.config import MAX_FIXED, Config
from dspark_stream.console import Progress
from dspark_stream.decoding.calibration import (
    Calibration,
    expected_calibration_error,
    logit,
)
from dspark_stream.decoding.platt import Observed, fit_scaling
from dspark_stream.decoding.survival import prefix_survival
from dspark_stream.engine.local import LocalEngine
from dspark_stream.errors import InternalError
from dspark_stream.types import (
    MAX_SEED,
    Acceptance,
    FinishedEvent,
    GenerationRequest,
    RoundRecord,
    SamplingParams,
    TokensEvent,
)

LEAST_ROUNDS = 200
FLOOR_DRAWS = 8


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """One way to accept: what was observed, and how far promises were off before and after."""

    rounds: int
    accepted_length: float
    before: list[float]
    """Expected calibration error of prefix survival at k = 1 … γ, with T = 1 and b = 0."""
    after: list[float]
    """With the calibration, on the rounds that it was fitted to."""
    floor: list[float]
    """What a calibration that is right would show on as many rounds: chance alone puts bins beside the diagonal."""


def calibration_config(config: Config) -> Config:
    """The settings to observe rounds with: all drafts verified, confidence as it comes."""
    return msgspec.structs.replace(config, calibration="none", schedule=f"fixed:{MAX_FIXED}")


def calibrate(
    engine: LocalEngine,
    prompts: Sequence[Sequence[int]],
    *,
    gamma: int,
    max_model_len: int,
    max_tokens: int,
    streams: int,
    seed: int,
    progress: Progress,
) -> tuple[Calibration, dict[Acceptance, Fit]]:
    """A calibration for all three ways to accept, from rounds over prompts (token ids).

    Args:
        engine: with `calibration_config`.

    A way with too few rounds to say anything (`LEAST_ROUNDS`) stays as it comes. Prompts that leave no room are passed
    over.

    Raises:
        DsparkError: the engine failed.
    """
    fit = [p for p in prompts if len(p) + 2 <= max_model_len]
    if len(fit) < len(prompts):
        progress.say(f"{len(prompts) - len(fit)} prompts are too long for the model and passed over")
    prompts = fit
    fitted: dict[str, list[float]] = {}
    fits: dict[Acceptance, Fit] = {}
    for way in get_args(Acceptance):
        rounds = _observe(engine, prompts, way, max_model_len, max_tokens, streams, seed, progress)
        seen = [Observed([logit(c) for c in r.confidence], r.accepted) for r in rounds if r.scheduled == gamma]
        if len(seen) < LEAST_ROUNDS:
            progress.say(f"{way}: {len(seen)} rounds are too few to calibrate with; its confidences stay as they come")
            continue
        fitted[way], fitted[f"{way}_bias"] = fit_scaling(seen, gamma)
        calibration = Calibration(**fitted)
        fits[way] = Fit(
            rounds=len(seen),
            accepted_length=1 + statistics.fmean(one.accepted for one in seen),
            before=errors(seen, Calibration(), way),
            after=errors(seen, calibration, way),
            floor=error_floor(seen, calibration, way),
        )
    return Calibration(**fitted), fits


def errors(rounds: Sequence[Observed], calibration: Calibration, way: Acceptance) -> list[float]:
    """Expected calibration error of prefix survival at k = 1 … γ."""
    survival = [prefix_survival(calibration.confidence(r.logits, way)) for r in rounds]
    return [
        expected_calibration_error([s[k] for s in survival], [r.accepted > k for r in rounds])
        for k in range(len(rounds[0].logits))
    ]


def error_floor(rounds: Sequence[Observed], calibration: Calibration, way: Acceptance) -> list[float]:
    """Mean expected calibration error at k = 1 … γ if every promise were kept exactly as often as it says.

    Outcomes are drawn from the promises themselves, `FLOOR_DRAWS` times.
    """
    confidence = np.array([calibration.confidence(r.logits, way) for r in rounds])  # [rounds, γ]
    promised = np.cumprod(confidence, 1).T.tolist()
    rng = np.random.default_rng(0)
    drawn = [np.cumprod(rng.random(confidence.shape) < confidence, 1).T.astype(bool) for _ in range(FLOOR_DRAWS)]
    return [
        statistics.fmean(expected_calibration_error(p, held[k].tolist()) for held in drawn)
        for k, p in enumerate(promised)
    ]


def _observe(
    engine: LocalEngine,
    prompts: Sequence[Sequence[int]],
    way: Acceptance,
    max_model_len: int,
    max_tokens: int,
    streams: int,
    seed: int,
    progress: Progress,
) -> list[RoundRecord]:
    def requests() -> Iterator[GenerationRequest]:
        for number, ids in enumerate(prompts):
            yield GenerationRequest(
                request_id=f"{way}#{number}",
                prompt_ids=tuple(ids),
                sampling=SamplingParams(
                    max_tokens=min(max_tokens, max_model_len - len(ids)),
                    temperature=0.0 if way == "greedy" else 1.0,
                    seed=(seed + number) % (MAX_SEED + 1),
                ),
                verification="coupled" if way == "coupled" else "rejection",
                record_rounds=True,
            )

    rounds: list[RoundRecord] = []
    with progress.bar(f"rounds, {way}", len(prompts), "prompt") as bar:
        for event, _ in engine.run(requests(), streams):
            if isinstance(event, TokensEvent) and event.round is not None:
                rounds.append(event.round)
            elif isinstance(event, FinishedEvent):
                if event.reason not in ("stop", "length"):
                    raise InternalError(f"{event.request_id}: {event.error.message if event.error else event.reason}")
                bar.advance(note=f"{len(rounds)} rounds")
    return rounds


def table(calibration: Calibration, fits: dict[Acceptance, Fit]) -> str:
    """For people: temperatures and biases, and errors before and after, at each position."""
    lines: list[str] = []
    for way, fit in fits.items():
        temperatures, biases = calibration.scaling(way, len(fit.before))
        lines += [
            f"{way}: {fit.rounds} rounds, accepted length {fit.accepted_length:.2f}",
            "  temperature   " + "  ".join(f"{t:6.2f}" for t in temperatures),
            "  bias          " + "  ".join(f"{b:6.2f}" for b in biases),
            "  error before  " + "  ".join(f"{100 * e:5.1f}%" for e in fit.before),
            "  after (fitted) " + "  ".join(f"{100 * e:5.1f}%" for e in fit.after),
            "  by chance alone" + "  ".join(f"{100 * e:5.1f}%" for e in fit.floor),
        ]
    return "\n".join(lines)
