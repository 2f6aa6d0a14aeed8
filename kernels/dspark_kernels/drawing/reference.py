"""From logits to the distribution a token is really drawn from, and draws from it: for target and drafter alike.

The engine's torch runner calls these; the CPU's kernels and the batched `acceptance` are tested against them.
A row may have no token: everything is ruled out, or its logits are no numbers. It is -1 then, never one made up.
Shapes: N rows, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class DrawnBy(Protocol):
    """How a row is drawn: what is read here of `SamplingParams`."""

    @property
    def temperature(self) -> float:
        """Above 0."""

    @property
    def top_k(self) -> int:
        """0: off."""

    @property
    def top_p(self) -> float:
        """1: off."""

    @property
    def min_p(self) -> float:
        """0: off."""


def is_cut(params: DrawnBy) -> bool:
    """Whether some tokens are left out of the distribution, and not only its temperature set."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def distributions(logits: Tensor, params: Sequence[DrawnBy]) -> Tensor:
    """Temperature, then top-k, top-p and min-p: logits [N, V] → probabilities [N, V] float32.

    A row's result depends on that row alone. Every cut is a threshold on the probability, so tokens of equal
    probability are kept or dropped together and no order of equal values matters. Temperature 0 has no place
    here: greedy is an argmax, not a distribution.
    """
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=logits.device)
    probs = torch.softmax(logits.float() / temperature.unsqueeze(1), -1)
    for row, p in enumerate(params):
        if is_cut(p):
            probs[row] = truncate(probs[row], p)
    return probs


def truncate(probs: Tensor, params: DrawnBy) -> Tensor:
    """One row [V] with what top-k, top-p and min-p leave of it, summing to one again."""
    vocab = probs.shape[0]
    if 0 < params.top_k < vocab:
        probs = _keep(probs, probs.topk(params.top_k).values[-1])
    if params.top_p < 1.0:
        probs = _keep(probs, _nucleus_threshold(probs, params.top_p))
    if params.min_p > 0.0:
        probs = _keep(probs, probs.max() * params.min_p)
    return probs


def _keep(probs: Tensor, threshold: Tensor) -> Tensor:
    kept = torch.where(probs >= threshold, probs, 0.0)
    return kept / kept.sum()


def _nucleus_threshold(probs: Tensor, top_p: float) -> Tensor:
    """The probability of the last token of the smallest set that holds at least ``top_p`` of the mass."""
    count = min(128, probs.shape[0])
    while True:  # nearly always the first few tokens suffice; a full sort of the vocabulary costs milliseconds
        top = probs.topk(count).values
        reached = (top.cumsum(0) >= top_p).nonzero()
        if len(reached):
            return top[reached[0, 0]]
        if count == probs.shape[0]:
            return top[-1]
        count = min(count * 8, probs.shape[0])


def greatest(logits: Tensor) -> Tensor:
    """The likeliest token of each row [..., V]."""
    found = logits.argmax(-1, keepdim=True)  # NaN where there is one
    return torch.where(logits.gather(-1, found).isfinite(), found, -1).squeeze(-1)


def sample(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse transform: one token a row from weights [N, V] ≥ 0 (any positive sum) and uniforms [N] in [0, 1)."""
    cdf = weights.double().cumsum(-1)
    at = uniforms.to(cdf).unsqueeze(1) * cdf[:, -1:]
    # the first token whose cdf lies above: one of positive weight, since the cdf rises there
    found = torch.searchsorted(cdf, at, right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)
    return torch.where(cdf[:, -1] > 0, found, -1)


def draw(weights: Tensor, uniform: float) -> int:
    """`sample` of one row [V]."""
    return int(sample(weights.unsqueeze(0), torch.tensor([uniform], dtype=torch.float64))[0])


def race(probs: Tensor, exponentials: Tensor) -> Tensor:
    """argmin E/p: one token a row from probabilities [N, V] and exponentials [N, V]; never one of probability 0."""
    times = exponentials / probs.double()
    found = times.argmin(-1, keepdim=True)  # NaN where there is one
    return torch.where(times.gather(-1, found).isfinite(), found, -1).squeeze(-1)


def residual(p: Tensor, share: float, q: Tensor, draft_ids: Tensor | None) -> Tensor:
    """max(share · p_t - p_d, 0), unnormalised, [V]; q [Vd] is widened with zeros to the target's vocabulary."""
    rest = p * share
    if draft_ids is None:
        rest -= q
    else:
        rest[draft_ids] -= q
    rest.clamp_(min=0.0)
    # nothing is left but rounding: this had probability zero, and any draw from p is right
    return rest if bool(rest.sum() > 0) else p
