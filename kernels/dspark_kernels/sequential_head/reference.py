"""The contract of the sequential head's walk over candidates, in plain torch, nothing read on the host.

The bias of slot k depends on x_{k-1}, so γ steps follow one another; over the whole vocabulary each would read all of
W2. Instead each slot keeps the C draft tokens of the largest base logits, and only their rows of W2 are read.

- **Sampling is exact**: x_k is drawn from q, the softmax over the candidates, and q is what acceptance gets. Tokens
  outside have q = 0, and the target can still put them in: the text's distribution does not change, only acceptance.
- **Greedy** drafts are those of the full walk wherever `Walk.proved` says so: no other token has a base logit above
  ``floor``, and by Cauchy-Schwarz no bias is above ‖f‖ times the longest row of W2. Elsewhere a draft may differ from
  the full walk's; verification makes that a matter of acceptance too.

Symbols: R streams, γ block size, H hidden size, r rank, V target and Vd draft vocabulary, C candidates.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dspark_kernels.acceptance.reference import thresholds
from dspark_kernels.noise import ROUND, race_noise, uniforms
from dspark_kernels.streams import COUPLED, GREEDY, REJECTION, Drafts, Sampling

HeadKind = Literal["none", "vanilla", "gated", "rnn"]


class HeadWeights(NamedTuple):
    """A sequential head's tensors and the part of the confidence head that looks at them."""

    kind: HeadKind
    w1: Tensor | None
    """[V, r]"""
    w2: Tensor | None
    """[Vd, r]"""
    inner: Tensor | None
    """What multiplies e, or [s; e]: gated [r, r], rnn [3r, 2r]."""
    inner_hidden: Tensor | None
    """What multiplies h_k: gated [r, H], rnn [3r, H]."""
    inner_bias: Tensor | None
    """gated [r], rnn [3r]."""
    confidence_hidden: Tensor | None
    """[H]; None without a confidence head."""
    confidence_e: Tensor | None
    """[r]; None where confidence looks at h_k alone."""
    confidence_bias: Tensor | None
    """[1]"""
    longest_row: Tensor
    """max over v of ‖W2[v]‖, scalar float32."""
    draft_ids: Tensor | None
    """Target ids of the draft vocabulary [Vd], ascending; None for all."""


class Prepared(NamedTuple):
    """What all slots can know at once."""

    rows: Tensor
    """The candidates as draft vocabulary indices, ascending, [R, γ, C] int32."""
    ids: Tensor
    """The same as target ids, [R, γ, C] int32."""
    base: Tensor
    """Their base logits, [R, γ, C] float32."""
    floor: Tensor
    """No token outside has a greater base logit, [R, γ] float32; -inf where none is outside."""
    inner: Tensor | None
    """The share of h_k in the gate or the recurrence, bias included: [R, γ, r or 3r] float32."""
    confidence: Tensor | None
    """The share of h_k in the confidence logit, bias included: [R, γ] float32."""


class Walk(NamedTuple):
    """A walked block."""

    drafts: Drafts
    confidence: Tensor | None
    """Confidence logits, [R, γ] float32."""
    proved: Tensor
    """Whether the largest score among the candidates is proved to be the largest of all, [R, γ] bool."""


def prepare(base: Tensor, hidden: Tensor, weights: HeadWeights, candidates: int) -> Prepared:
    """From base logits [R, γ, Vd] and hidden states [R, γ, H]: the C best of each slot, and what h_k contributes."""
    vocab = base.shape[-1]
    top = base.topk(min(candidates, vocab), -1)
    values = top.values.float()
    index, order = top.indices.sort(-1)
    ids = index if weights.draft_ids is None else weights.draft_ids[index]
    floor = values[..., -1] if candidates < vocab else torch.full_like(values[..., -1], -torch.inf)
    inner = confidence = None
    if weights.inner_hidden is not None:
        assert weights.inner_bias is not None
        inner = (hidden @ weights.inner_hidden.T + weights.inner_bias).float()
    if weights.confidence_hidden is not None:
        confidence = (hidden @ weights.confidence_hidden).float()
        if weights.confidence_bias is not None:
            confidence = confidence + weights.confidence_bias.float()
    return Prepared(index.int(), ids.int(), values.gather(-1, order), floor, inner, confidence)


def walk(prepared: Prepared, anchor: Tensor, weights: HeadWeights, sampling: Sampling) -> Walk:
    """γ steps from the anchor tokens [R]: bias, choice, next embedding."""
    gamma = prepared.ids.shape[1]
    greedy = (sampling.mode == GREEDY).unsqueeze(1)
    rejection = (sampling.mode == REJECTION).unsqueeze(1)
    temperature = torch.where(greedy, 1.0, sampling.temperature.unsqueeze(1))
    word = torch.arange(1, gamma + 1, device=anchor.device)
    u = uniforms(sampling.round_key.unsqueeze(1), sampling.position.unsqueeze(1), ROUND, word)  # [R, γ]
    previous = anchor.long()
    state = None
    tokens, qs, q_xs, logits, proved = [], [], [], [], []
    for k in range(gamma):
        score, ids = prepared.base[:, k], prepared.ids[:, k].long()
        reach = prepared.floor[:, k]
        e = weights.w1[previous].float() if weights.w1 is not None else None  # [R, r]
        if prepared.confidence is not None:
            logit = prepared.confidence[:, k]
            if e is not None and weights.confidence_e is not None:
                logit = logit + e @ weights.confidence_e.float()
            logits.append(logit)
        if e is not None and weights.w2 is not None:
            inner = None if prepared.inner is None else prepared.inner[:, k]
            features, state = _features(weights, e, inner, state)
            rows = weights.w2[prepared.rows[:, k].long()].float()  # [R, C, r]
            score = score + torch.einsum("rcd,rd->rc", rows, features)
            reach = reach + weights.longest_row * features.norm(dim=-1)
        proved.append(score.amax(-1) > reach)

        scaled = score / temperature
        scaled = scaled.masked_fill(scaled < thresholds(scaled.unsqueeze(1), sampling), -torch.inf)
        q = scaled.softmax(-1)
        cdf = q.double().cumsum(-1)
        drawn = torch.searchsorted(cdf, u[:, k : k + 1] * cdf[:, -1:], right=True).clamp_max(ids.shape[1] - 1)
        position = (sampling.position + 1 + k).unsqueeze(1)
        raced = (scaled + race_noise(sampling.seed.unsqueeze(1), position, ids)).argmax(-1, keepdim=True)
        coupled = (sampling.mode == COUPLED).unsqueeze(1)
        at = torch.where(rejection, drawn, torch.where(coupled, raced, score.argmax(-1, keepdim=True)))
        previous = ids.gather(1, at).squeeze(1)
        tokens.append(previous)
        qs.append(q)
        q_xs.append(q.gather(1, at).squeeze(1))
    drafts = Drafts(torch.stack(tokens, 1).int(), prepared.ids, torch.stack(qs, 1), torch.stack(q_xs, 1))
    return Walk(drafts, torch.stack(logits, 1) if logits else None, torch.stack(proved, 1))


def _features(
    weights: HeadWeights, e: Tensor, hidden: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What W2 multiplies, [R, r], and the recurrence's next state (`models/torch/heads.py`)."""
    if weights.inner is None or hidden is None:
        return e, None
    inner = weights.inner.float()
    if weights.kind == "gated":
        return torch.sigmoid(e @ inner.T + hidden) * e, None
    state = torch.zeros_like(e) if state is None else state
    gate, candidate, output = (torch.cat((state, e), -1) @ inner.T + hidden).chunk(3, -1)
    keep = torch.sigmoid(gate)
    return torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)
