"""Draft: one parallel backbone pass, then the sequential walk through the block.

Symbols: R streams, γ block size, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Protocol

from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.noise import RoundUniforms
from dspark_stream.decoding.survival import AcceptanceHistory, prefix_survival
from dspark_stream.models.adjustment import Adjustment
from dspark_stream.models.cache import Extent
from dspark_stream.models.distributions import Distributions
from dspark_stream.models.protocols import Drafted, Drafter, Draw, Noise, Race, Store
from dspark_stream.types import Acceptance, SamplingParams, Source, Verification


class StreamView(Protocol):
    """What the algorithm reads of a stream."""

    @property
    def extent(self) -> Extent:
        """Its token slots."""

    @property
    def position(self) -> int:
        """p, the anchor's position."""

    @property
    def anchor(self) -> int:
        """The last committed token."""

    @property
    def sampling(self) -> SamplingParams:
        """How its tokens are chosen."""

    @property
    def adjustment(self) -> Adjustment | None:
        """What its logits are changed by first; None: nothing."""

    @property
    def acceptance(self) -> Acceptance:
        """What that means for its drafts: `acceptance_of`, asked once."""

    @property
    def round_key(self) -> int:
        """Keys its uniforms (rejection verification); no other stream of the batch has the same."""

    @property
    def noise(self) -> Noise:
        """Its token exponentials (coupled verification)."""


GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM: logits over less would overflow."""


def acceptance_of(sampling: SamplingParams, verification: Verification) -> Acceptance:
    """How a stream's drafts are accepted.

    - Greedy: a draft is accepted if it is the target's best token.
    - Rejection: drafts are drawn by inverse transform. The block is accepted as a whole, by ratios of probabilities.
    - Coupled: drafts are drawn by the stream's noise. One is accepted if the target draws the same token by it.
    """
    return "greedy" if sampling.temperature < GREEDY_BELOW else verification


@dataclass
class Block:
    """One stream's draft block."""

    tokens: list[int] = field(default_factory=list)
    """x_1 … x_g as target ids; empty for a stream that did not draft."""
    confidence: list[float] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)
    indices: Sequence[int] = ()
    """Rejection only: x_1 … x_g as draft vocabulary indices."""
    q: Distributions | None = None
    """Rejection only: g rows over the draft vocabulary that x_k were drawn from. Valid until the next draft."""
    uniforms: RoundUniforms | None = None
    """Rejection only: the randomness of this round."""
    source: Source = "model"
    """Where the tokens come from. Looked-up tokens were not drawn, so they have no q."""


def draft(
    drafter: Drafter,
    store: Store,
    streams: Sequence[StreamView],
    calibration: Calibration,
    history: AcceptanceHistory,
    slots: int | None = None,
) -> list[Block]:
    """Propose ``slots`` tokens, None: γ of them, for each of R streams, with their confidences."""
    slots = slots or drafter.gamma
    uniforms = _uniforms(drafter.gamma, streams)
    draws = [_draw(stream, own, slots) for stream, own in zip(streams, uniforms, strict=True)]
    drafted = drafter.draft([(s.extent, s.position, s.anchor) for s in streams], store, slots, draws)
    return blocks_of(drafted, streams, uniforms, calibration, history)


def _uniforms(gamma: int, streams: Sequence[StreamView]) -> list[RoundUniforms | None]:
    """What this round's tokens are drawn by; None for streams that are greedy or draw by shared noise."""
    return [RoundUniforms(s.round_key, s.position, gamma) if s.acceptance == "rejection" else None for s in streams]


def _draw(stream: StreamView, uniforms: RoundUniforms | None, slots: int) -> Draw:
    if uniforms is not None:
        return Draw(stream.sampling, uniforms.draft[:slots], adjustment=stream.adjustment)
    if stream.acceptance == "coupled":
        race = Race(stream.noise, stream.position + 1)
        return Draw(stream.sampling, race=race, adjustment=stream.adjustment)
    return Draw(stream.sampling, adjustment=stream.adjustment)


def blocks_of(
    drafted: Drafted,
    streams: Sequence[StreamView],
    uniforms: Sequence[RoundUniforms | None],
    calibration: Calibration,
    history: AcceptanceHistory,
) -> list[Block]:
    """Drafts of R streams with the survival that confidence promises; the past's where there is no such head.

    A block ends where its drafter has no token, or no number for how sure it is: nothing comes of that but fewer
    drafts. It goes by the drafts before alone, so what is verified keeps the target's distribution.
    """
    blocks = []
    for r, (stream, own) in enumerate(zip(streams, uniforms, strict=True)):
        tokens = drafted.tokens[r]
        logits: Sequence[float] = drafted.logits[r] if drafted.logits else ()
        if min(tokens) < 0 or any(map(isnan, logits)):
            tokens = tokens[: _whole(tokens, logits)]
            logits = logits[: len(tokens)]
        if drafted.logits:
            confidence = calibration.confidence(logits, stream.acceptance)
        else:
            confidence = history.confidence()[: len(tokens)]
        block = Block(tokens=tokens, confidence=confidence, survival=prefix_survival(confidence))
        if own is not None:
            block.uniforms, block.indices, block.q = own, drafted.indices(r), drafted.q(r)
        blocks.append(block)
    return blocks


def _whole(tokens: Sequence[int], logits: Sequence[float]) -> int:
    """How many slots there are before the first that lacks something."""
    lacking = (k for k, token in enumerate(tokens) if token < 0 or (logits and isnan(logits[k])))
    return next(lacking, len(tokens))
