"""The walk through a block's slots, left to right, on torch: for every kind of head and of draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dspark_kernels.drawing.reference import distributions, greatest, race, sample
from dspark_stream.models.protocols import Draw
from dspark_stream.models.torch.distributions import Dense
from dspark_stream.models.torch.edits import EditedRows


class Heads(Protocol):
    """What of a drafter a walk goes by."""

    markov_head: Any
    confidence_head: Any
    draft_ids: Tensor | None

    def base_logits(self, hidden: Tensor) -> Tensor:
        """U [..., Vd] of hidden [..., H]."""


class TorchDrafts:
    """Blocks of R streams. See `Drafted`."""

    def __init__(
        self, tokens: list[list[int]], logits: list[list[float]] | None, indices: list[list[int]], q: dict[int, Tensor]
    ) -> None:
        self.tokens, self.logits = tokens, logits
        self._indices, self._q = indices, q

    def indices(self, r: int) -> list[int]:
        """See `Drafted.indices`."""
        return self._indices[r]

    def q(self, r: int) -> Dense:
        """See `Drafted.q`."""
        return Dense(self._q[r])


@torch.inference_mode()
def walk(heads: Heads, hidden: Tensor, anchors: Sequence[int], draws: Sequence[Draw]) -> TorchDrafts:
    """The sequential head over hidden [R, g, H] from anchors [R], each stream by its own draw."""
    device, slots = hidden.device, hidden.shape[1]
    base = heads.base_logits(hidden)  # [R, g, Vd]
    choose = _Chooser(heads.draft_ids, draws, slots, device)
    head, confidence_head = heads.markov_head, heads.confidence_head
    previous = torch.tensor(anchors, device=device)
    state = head.initial_state(len(anchors)) if head else None
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
        known = index.clamp_min(0)  # what follows a slot without a token is worth nothing, but is computed
        previous = known if heads.draft_ids is None else heads.draft_ids[known]
        tokens.append(torch.where(index >= 0, previous, -1))
    return TorchDrafts(
        torch.stack(tokens, 1).tolist(),
        torch.stack(logits, 1).float().tolist() if logits else None,
        torch.stack(choose.indices, 1).tolist(),
        choose.drawn_from(),
    )


class _Chooser:
    """Draws slot k's token for every stream: greedily, by inverse transform, or by the race with shared noise."""

    def __init__(self, draft_ids: Tensor | None, draws: Sequence[Draw], slots: int, device: torch.device) -> None:
        self.sampled = [r for r, d in enumerate(draws) if d.uniforms]
        races = {r: d.race for r, d in enumerate(draws) if d.race is not None}
        self.coupled = list(races)
        self.sampling = [d.sampling for d in draws]
        ids = None if draft_ids is None else draft_ids.cpu().numpy()
        adjusted = {r: d.adjustment for r, d in enumerate(draws) if d.adjustment is not None}
        self.edited = {r: EditedRows(adjustment.draft_edits(ids)) for r, adjustment in adjusted.items()}
        self.u = torch.tensor([draws[r].uniforms for r in self.sampled], dtype=torch.float64, device=device)  # [Rs, γ]
        self.indices: list[Tensor] = []
        self._q: list[Tensor] = []
        if races:
            noise = torch.stack([own.noise.at(own.position, slots) for own in races.values()])
            if draft_ids is not None:
                noise = noise[:, :, draft_ids.cpu()]
            self.noise = noise.to(device)  # [Rc, g, Vd]

    def __call__(self, k: int, scores: Tensor) -> Tensor:
        """scores [R, Vd] → draft vocabulary indices [R]."""
        if self.edited:
            scores = scores.float()
            for r, rows in self.edited.items():
                rows.apply(scores[r])
        index = greatest(scores)
        if self.sampled:
            q = distributions(scores[self.sampled], [self.sampling[r] for r in self.sampled])
            index[self.sampled] = sample(q, self.u[:, k])
            self._q.append(q)
        if self.coupled:
            q = distributions(scores[self.coupled], [self.sampling[r] for r in self.coupled])
            index[self.coupled] = race(q, self.noise[:, k])
        for r, rows in self.edited.items():
            if (token := int(index[r])) >= 0:
                rows.add(token)
        self.indices.append(index)
        return index

    def drawn_from(self) -> dict[int, Tensor]:
        """Of every stream that drew by uniforms, its rows [g, Vd]."""
        return {r: torch.stack([q[i] for q in self._q]) for i, r in enumerate(self.sampled)}
