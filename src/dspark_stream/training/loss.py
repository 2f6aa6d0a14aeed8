"""The training loss of the design, fused with the LM head so that logits exist for a few rows at a time.

Per slot: 0.1·cross-entropy + 0.9·‖p_d - p_t‖₁ + 1.0·BCE(c_k, 1 - ½‖p_d - p_t‖₁), weighted by exp(-(k-1)/decay).
1 - ½‖p_d - p_t‖₁ is exactly the probability that rejection accepts a single draft from p_d. So the second term trains
acceptance itself, and the third trains the confidence head to predict it. (In a block that is judged as a whole this is
right for the first slot; later ones are accepted more often, docs/decisions/019.)

Symbols: N slots of all blocks, H hidden size, r rank, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CE_WEIGHT, L1_WEIGHT, CONFIDENCE_WEIGHT = 0.1, 0.9, 1.0
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Logits that exist at one time: enough rows for a good product, few enough for any memory."""
CACHED_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
"""Of these, how many are worked on at one time: a dozen passes over them should stay in a core's own cache."""


def slot_weights(gamma: int, decay: float | None = None) -> Tensor:
    """exp(-(k-1)/decay) for k = 1 … γ, [γ]. The decay is 4.0 for γ = 7 and grows with the block."""
    decay = decay or 4.0 * gamma / 7
    return torch.exp(-torch.arange(gamma) / decay)


class Head(NamedTuple):
    """What turns hidden states into draft logits: frozen LM head, and the family's soft cap."""

    weight: Tensor  # [Vd, H], frozen
    softcap: float | None


class Slots(NamedTuple):
    """What the drafter's distributions are held against."""

    target_final: Tensor  # [N, H]
    target_lse: Tensor  # [N], over the whole vocabulary
    labels: Tensor  # [N], draft vocabulary indices; negative: not in it, no cross-entropy
    weights: Tensor  # [N], 0 for slots that do not count


class DistributionLoss(torch.autograd.Function):
    """Σ weight·(0.1·CE + 0.9·L1), its gradients computed in the forward pass, a chunk of rows at a time.

    Returns the sum, and without gradient each slot's L1 and CE [N]. With z the draft logits, p = softmax(z),
    s = sign(p - p_t): ∂CE/∂z = p - onehot, ∂L1/∂z = p⊙(s - s·p). Target mass outside the draft vocabulary adds a
    constant to L1. Doing it by hand saves storing the logits, the probabilities and their signs for every slot.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        hidden: Tensor,  # [N, H]
        features: Tensor | None,  # [N, r]; None without a sequential head
        w2: Tensor | None,  # [Vd, r]
        head: Head,
        slots: Slots,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = head.weight.dtype
        d_hidden = torch.empty_like(hidden)
        d_features = None if features is None else torch.empty_like(features)
        d_w2 = None if w2 is None else torch.zeros_like(w2, dtype=torch.float32)
        w2_low = None if w2 is None else w2.to(dtype)
        l1 = torch.empty(len(hidden), device=hidden.device)
        ce = torch.empty_like(l1)
        rows = max(16, CHUNK_ELEMENTS[hidden.device.type] // len(head.weight))
        few = max(1, CACHED_ELEMENTS[hidden.device.type] // len(head.weight))
        room = hidden.new_empty((3, min(rows, len(hidden)), len(head.weight)), dtype=dtype)
        for at in range(0, len(hidden), rows):
            part = slice(at, min(at + rows, len(hidden)))
            n = part.stop - at
            f = None if features is None else features[part].to(dtype)
            base = torch.mm(hidden[part].to(dtype), head.weight.T, out=room[0, :n])
            target = torch.mm(slots.target_final[part].to(dtype), head.weight.T, out=room[1, :n])
            bias = None if f is None or w2_low is None else torch.mm(f, w2_low.T, out=room[2, :n])
            if bias is not None and head.softcap is None:
                base += bias
            for first in range(at, part.stop, few):
                some = slice(first, min(first + few, part.stop))
                own = slice(some.start - at, some.stop - at)
                z, slope = base[own].float(), None
                if head.softcap is not None:  # the cap is on the base logits, before the bias
                    z = z.div_(head.softcap).tanh_()
                    slope = 1 - z * z
                    z = z * head.softcap if bias is None else z * head.softcap + bias[own]
                g, l1[some], ce[some] = _distances(z, target[own].float(), slots, some, head)
                target[own] = g  # its place is free now
                base[own] = g if slope is None else g * slope
            if f is not None and d_features is not None and d_w2 is not None and w2_low is not None:
                d_features[part] = (target @ w2_low).to(d_features.dtype)
                d_w2 += target.T @ f
            d_hidden[part] = (base @ head.weight).to(hidden.dtype)
        ctx.save_for_backward(d_hidden, d_features, None if d_w2 is None or w2 is None else d_w2.to(w2.dtype))
        ctx.mark_non_differentiable(l1, ce)
        total = (slots.weights * (CE_WEIGHT * ce + L1_WEIGHT * l1)).sum()
        return total, l1, ce

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        d_hidden, d_features, d_w2 = ctx.saved_tensors
        scaled = [None if d is None else d * grad for d in (d_hidden, d_features, d_w2)]
        return (*scaled, None, None)


def _distances(z: Tensor, t: Tensor, slots: Slots, part: slice, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """∂(weighted loss)/∂z [n, Vd], L1 [n], CE [n] of draft logits z [n, Vd] against the target's, t [n, Vd]."""
    if head.softcap is not None:
        t = torch.tanh(t / head.softcap) * head.softcap
    p_t = t.sub_(slots.target_lse[part].unsqueeze(1)).exp_()
    outside = (1 - p_t.sum(-1)).clamp(min=0)
    labels, weights = slots.labels[part], slots.weights[part].unsqueeze(1)
    known = labels >= 0
    column = labels.clamp(min=0).unsqueeze(1)
    lse = torch.logsumexp(z, -1, keepdim=True)
    ce = torch.where(known, (lse - z.gather(1, column)).squeeze(1), 0.0)
    p = z.sub_(lse).exp_()
    s = (p - p_t).sign_()
    p_t.sub_(p)  # no longer needed as it was
    l1 = torch.linalg.vector_norm(p_t, 1, -1) + outside
    mean_sign = (s * p).sum(-1, keepdim=True)
    scale_ce = CE_WEIGHT * known.unsqueeze(1) * weights
    g = s.sub_(mean_sign).mul_(L1_WEIGHT * weights).add_(scale_ce).mul_(p)
    g.scatter_add_(1, column, -scale_ce)
    return g, l1, ce


class LossParts(NamedTuple):
    """One step's loss and its parts, each a weighted mean over slots."""

    total: Tensor
    ce: float
    l1: float
    confidence: float


def block_loss(
    hidden: Tensor,  # [N, H]
    features: Tensor | None,
    w2: Tensor | None,
    confidence: Callable[[], Tensor] | None,
    head: Head,
    slots: Slots,
) -> LossParts:
    """All three terms. ``slots.weights`` must sum to 1; ``confidence`` gives the logits of c_k [N]."""
    fused: Callable[..., tuple[Tensor, Tensor, Tensor]] = DistributionLoss.apply  # torch leaves it untyped
    total, l1, ce = fused(hidden, features, w2, head, slots)
    w = slots.weights
    bce = torch.zeros((), device=hidden.device)
    if confidence is not None:
        accept = (1 - l1 / 2).clamp(0, 1)
        bce = (w * F.binary_cross_entropy_with_logits(confidence().float(), accept, reduction="none")).sum()
    return LossParts(total + CONFIDENCE_WEIGHT * bce, float((w * ce).sum()), float((w * l1).sum()), float(bce.detach()))
