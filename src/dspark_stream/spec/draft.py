"""Draft: one parallel backbone pass, then the sequential walk through the block (design: one round, 1-3).

Symbols: R streams, γ block size, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dspark_stream.models.cache import Extent, KVStore
from dspark_stream.models.distributions import Distributions
from dspark_stream.models.drafter import Drafter
from dspark_stream.spec.calibration import Calibration
from dspark_stream.spec.noise import NoiseCache, RoundUniforms
from dspark_stream.spec.sampling import Dense, distributions, is_cut, race, sample
from dspark_stream.spec.survival import AcceptanceHistory, prefix_survival
from dspark_stream.types import Acceptance, SamplingParams, Verification


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
    def verification(self) -> Verification:
        """Rejection or coupled."""

    @property
    def round_key(self) -> int:
        """Keys its uniforms (rejection verification); no other stream of the batch has the same."""

    @property
    def noise(self) -> NoiseCache:
        """Its token exponentials (coupled verification)."""


GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""


def is_greedy(stream: StreamView) -> bool:
    """Temperature 0, or so small that logits would overflow: one-hot distributions, one comparison for both ways."""
    return stream.sampling.temperature < GREEDY_BELOW


def acceptance_of(stream: StreamView) -> Acceptance:
    """Greedy: one-hot distributions, one comparison. Rejection: drawn by inverse transform, accepted by ratios of
    probabilities, the block as a whole. Coupled: drawn by shared noise, accepted where it is the target's own draw.
    """
    return "greedy" if is_greedy(stream) else stream.verification


@dataclass
class Block:
    """One stream's draft block."""

    tokens: list[int] = field(default_factory=list)
    """x_1 … x_g as target ids, g ≤ γ; empty for a stream that did not draft."""
    confidence: list[float] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)
    indices: Sequence[int] = ()
    """Rejection only: x_1 … x_g as draft vocabulary indices."""
    q: Distributions | None = None
    """Rejection only: g rows over the draft vocabulary that x_k were drawn from. Valid until the next draft."""
    uniforms: RoundUniforms | None = None
    """Rejection only: the randomness of this round."""


def draft(
    drafter: Drafter,
    store: KVStore,
    streams: Sequence[StreamView],
    calibration: Calibration,
    history: AcceptanceHistory,
    slots: int | None = None,
) -> list[Block]:
    """Propose ``slots`` tokens, None: γ of them, for each of R streams, with their confidences."""
    anchors = [(s.extent, s.position, s.anchor) for s in streams]
    uniforms = _uniforms(drafter, streams)
    blocks = _at_once(drafter, store, anchors, slots or drafter.gamma, streams, uniforms, calibration, history)
    if blocks is not None:
        return blocks
    hidden = drafter.draft_hidden(anchors, store, slots)  # [R, g, H]
    return walk(drafter, hidden, streams, calibration, history, uniforms)


def _uniforms(drafter: Drafter, streams: Sequence[StreamView]) -> list[RoundUniforms | None]:
    """What this round's tokens are drawn by; None for streams that are greedy or draw by shared noise."""
    return [
        RoundUniforms(s.round_key, s.position, drafter.gamma) if acceptance_of(s) == "rejection" else None
        for s in streams
    ]


@torch.inference_mode()
def walk(
    drafter: Drafter,
    hidden: Tensor,
    streams: Sequence[StreamView],
    calibration: Calibration,
    history: AcceptanceHistory,
    uniforms: Sequence[RoundUniforms | None] | None = None,
) -> list[Block]:
    """The sequential head, left to right: hidden [R, g, H] of the first g ≤ γ slots → one block a stream.

    ``uniforms``: what the round is drawn by, where that was made already.
    """
    device = hidden.device
    slots = hidden.shape[1]
    uniforms = uniforms or _uniforms(drafter, streams)
    base = drafter.base_logits(hidden)  # [R, g, Vd]
    choose = _Chooser(drafter, streams, uniforms, slots, device)
    head, confidence_head = drafter.markov_head, drafter.confidence_head
    previous = torch.tensor([s.anchor for s in streams], device=device)
    state = head.initial_state(len(streams)) if head else None
    tokens, logits = [], []
    for k in range(slots):
        e = head.embed(previous) if head else None
        if confidence_head:
            logits.append(confidence_head(hidden[:, k], e))
        scores = base[:, k]
        if head and e is not None:
            features, state = head.step(e, hidden[:, k], state)
            scores = scores + head.bias(features)
        index = choose(k, scores)
        previous = drafter.to_target_ids(index)
        tokens.append(previous)
    rows = torch.stack(logits, 1).float().tolist() if logits else None
    blocks = _blocks(streams, torch.stack(tokens, 1).tolist(), rows, calibration, history)
    for r, block in enumerate(blocks):
        choose.fill(r, block)
    return blocks


def _at_once(
    drafter: Drafter,
    store: KVStore,
    anchors: list[tuple[Extent, int, int]],
    slots: int,
    streams: Sequence[StreamView],
    uniforms: Sequence[RoundUniforms | None],
    calibration: Calibration,
    history: AcceptanceHistory,
) -> list[Block] | None:
    """`draft` in one call, where the runner has one and nobody asks for more than a temperature."""
    if any(not is_greedy(s) and (u is None or is_cut(s.sampling)) for s, u in zip(streams, uniforms, strict=True)):
        return None
    walked = drafter.draft_at_once(
        anchors,
        store,
        slots,
        [0.0 if u is None else s.sampling.temperature for s, u in zip(streams, uniforms, strict=True)],
        [[0.0] * slots if u is None else u.draft[:slots] for u in uniforms],
    )
    if walked is None:
        return None
    blocks = _blocks(streams, walked.tokens, walked.logits, calibration, history)
    for r, (block, own) in enumerate(zip(blocks, uniforms, strict=True)):
        if own is not None:
            block.uniforms, block.indices, block.q = own, walked.indices(r), walked.q(r)
    return blocks


def _blocks(
    streams: Sequence[StreamView],
    tokens: list[list[int]],
    logits: list[list[float]] | None,
    calibration: Calibration,
    history: AcceptanceHistory,
) -> list[Block]:
    """Drafts [R, g] with the survival that confidence logits [R, g] promise; the past's where there are none."""
    blocks = []
    for r, stream in enumerate(streams):
        if logits:
            confidence = calibration.confidence(logits[r], acceptance_of(stream))
        else:
            confidence = history.confidence()[: len(tokens[r])]
        blocks.append(Block(tokens=tokens[r], confidence=confidence, survival=prefix_survival(confidence)))
    return blocks


class _Chooser:
    """Draws slot k's token for every stream: greedy, by inverse transform, or by the race with shared noise."""

    def __init__(
        self,
        drafter: Drafter,
        streams: Sequence[StreamView],
        uniforms: Sequence[RoundUniforms | None],
        slots: int,
        device: torch.device,
    ) -> None:
        self.sampled = [r for r, u in enumerate(uniforms) if u is not None]
        self.coupled = [r for r, s in enumerate(streams) if acceptance_of(s) == "coupled"]
        self.params = [s.sampling for s in streams]
        self.uniforms = [u for u in uniforms if u is not None]
        self.u = torch.tensor([u.draft for u in self.uniforms], dtype=torch.float64, device=device)  # [Rs, γ]
        self.q: list[Tensor] = []
        self.indices: list[Tensor] = []
        if self.coupled:
            noise = torch.stack([streams[r].noise.at(streams[r].position + 1, slots) for r in self.coupled])
            if drafter.draft_ids is not None:
                noise = noise[:, :, drafter.draft_ids.cpu()]
            self.noise = noise.to(device)  # [Rc, g, Vd]

    def __call__(self, k: int, scores: Tensor) -> Tensor:
        """scores [R, Vd] → draft vocabulary indices [R]."""
        index = scores.argmax(-1)
        if self.sampled:
            q = distributions(scores[self.sampled], [self.params[r] for r in self.sampled])
            index[self.sampled] = sample(q, self.u[:, k])
            self.q.append(q)
        if self.coupled:
            q = distributions(scores[self.coupled], [self.params[r] for r in self.coupled])
            index[self.coupled] = race(q, self.noise[:, k])
        self.indices.append(index)
        return index

    def fill(self, r: int, block: Block) -> None:
        """Hand stream r what its verification will ask for."""
        if r in self.sampled:
            i = self.sampled.index(r)
            block.q = Dense(torch.stack([q[i] for q in self.q]))
            block.indices = [int(index[r]) for index in self.indices]
            block.uniforms = self.uniforms[i]
