"""The contract of acceptance, in plain torch: greedy, rejection and coupled in one call, nothing read on the host.

It agrees with `decoding/accept.py`, which the engine runs on a CPU; here streams are columns, and the draft
distribution is spread over candidates. Symbols: R streams, γ block size, B rows, V vocabulary, C candidates a slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.noise import ROUND, race_noise, uniforms
from dspark_kernels.streams import COUPLED, GREEDY, REJECTION, Drafts, Sampling


class Accepted(NamedTuple):
    """Outcome of a round, [R] int32 each."""

    accepted: Tensor
    """x_1 … x_accepted stand; -1 for a stream without rows."""
    bonus: Tensor
    """The target's own token after them; -1 where that row has none, 0 for a stream without rows."""


def accept(
    logits: Tensor,  # [B, V]
    first: Tensor,  # [R] int32
    length: Tensor,  # [R] int32
    drafts: Drafts,
    sampling: Sampling,
) -> Accepted:
    """Judge every stream's rows ``first`` … ``first + length`` of the target's logits.

    ``length`` is ℓ, 0 ≤ ℓ ≤ γ, or -1 for a stream that has no rows. Uniforms and noise are made from the streams'
    keys and positions. Between two equal logits the lower token wins. A row whose largest logit is no finite number has
    no token: its draft does not stand.
    """
    gamma, device = drafts.tokens.shape[1], logits.device
    j = torch.arange(gamma + 1, device=device)
    inside = j <= length.unsqueeze(1)  # [R, γ+1]
    rows = torch.where(inside, first.unsqueeze(1) + j, 0).long()
    raw = logits[rows].float()  # [R, γ+1, V]
    none = ~raw.amax(-1).isfinite()
    length = torch.where(none & inside, j, length.unsqueeze(1)).amin(1)  # nothing can follow such a row
    greedy = sampling.mode == GREEDY
    scaled = raw / torch.where(greedy, 1.0, sampling.temperature)[:, None, None]
    kept = scaled >= thresholds(scaled, sampling).unsqueeze(-1)
    scaled = scaled.masked_fill(~kept, -torch.inf)

    token = torch.arange(logits.shape[1], device=device)
    at = (sampling.position[:, None] + 1 + j).unsqueeze(-1)  # output position of each row
    race = scaled + race_noise(sampling.seed[:, None, None], at, token)
    own = torch.where((sampling.mode == COUPLED).unsqueeze(1), _argmax(race), _argmax(raw)).masked_fill(none, -1)
    p = scaled.softmax(-1)
    word = torch.arange(2 * gamma + 1, device=device)
    u = uniforms(sampling.round_key.unsqueeze(1), sampling.position.unsqueeze(1), ROUND, word)  # [R, 2γ+1]

    rejection = sampling.mode == REJECTION
    share = _shares(p, drafts)
    stands = _block_stands(p, share, length, drafts, u[:, gamma + 1 :])  # [R, γ]: of x_1 … x_k
    whole = torch.where(stands, j[1:], 0).amax(1)
    alike = (own[:, :-1] == drafts.tokens) & (j[:-1] < length.unsqueeze(1))  # x_k is the target's own
    accepted = torch.where(rejection, whole, alike.int().cumprod(1).sum(1))  # [R]
    here = accepted.unsqueeze(1)
    drawn = _redraw(p, share.gather(1, here), accepted, length, drafts, u[:, 0])
    bonus = torch.where(rejection, drawn, own.gather(1, here).squeeze(1))
    nobody = length < 0
    return Accepted(accepted.masked_fill(nobody, -1).int(), bonus.masked_fill(nobody, 0).int())


def _shares(p: Tensor, drafts: Drafts) -> Tensor:
    """w_0 … w_γ of block verification, [R, γ+1] float64: how likely at least x_1 … x_k stand, given that drafts.

    p: [R, γ+1, V].
    """
    p_x = p[:, :-1].gather(2, drafts.tokens.long().unsqueeze(-1)).squeeze(-1)
    ratios = p_x.double() / drafts.q_x.double()
    shares = [torch.ones_like(ratios[:, 0])]
    for ratio in ratios.unbind(1):
        shares.append((shares[-1] * ratio).clamp_max(1.0))
    return torch.stack(shares, 1)


def _block_stands(p: Tensor, share: Tensor, length: Tensor, drafts: Drafts, u: Tensor) -> Tensor:
    """Whether x_1 … x_k would stand if no longer prefix did, [R, γ] (`decoding/accept.py`); ``u`` [R, γ] decides."""
    k = torch.arange(1, share.shape[1], device=p.device)
    p_next = p[:, :-1].gather(2, drafts.candidates.long())  # what the next slot's candidates have [R, γ, C]
    longer = torch.minimum(share[:, :-1, None].float() * p_next, drafts.q).sum(-1)
    missing = torch.nn.functional.pad((share[:, :-1] - longer)[:, 1:], (0, 1))  # of k; the last slot has no next
    last = k == length.unsqueeze(1)
    stands = torch.where(last, u < share[:, 1:], u * (missing + 1.0 - share[:, 1:]) < missing)
    return stands & (k <= length.unsqueeze(1))


def _argmax(x: Tensor) -> Tensor:
    """The first of the largest: torch's argmax does not promise which of equal ones it takes."""
    return (x == x.amax(-1, keepdim=True)).int().argmax(-1)


def _redraw(p: Tensor, share: Tensor, accepted: Tensor, length: Tensor, drafts: Drafts, u: Tensor) -> Tensor:
    """Inverse transform from max(share · p_t - p_d, 0), from the next p_t where all ℓ stand: [R]. ``share``: [R, 1]."""
    stream = torch.arange(len(p), device=p.device)
    weights = p[stream, accepted]  # [R, V]
    k = accepted.clamp_max(drafts.tokens.shape[1] - 1)
    rest = (
        (share.float() * weights)
        .scatter_add(1, drafts.candidates[stream, k].long(), -drafts.q[stream, k])
        .clamp_min(0.0)
    )
    rejected = (accepted < length).unsqueeze(1)
    # nothing is left but rounding: this had probability zero, and any draw from p is right
    weights = torch.where(rejected & (rest.sum(1, keepdim=True) > 0), rest, weights)
    cdf = weights.double().cumsum(-1)
    found = torch.searchsorted(cdf, (u * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return torch.where(cdf[:, -1] > 0, found.clamp_max(p.shape[-1] - 1), -1)


def thresholds(scaled: Tensor, sampling: Sampling) -> Tensor:
    """The least logit that top-k, then top-p, then min-p leave, [R, n] of ``scaled`` [R, n, V] (temperature applied).

    The cuts of `drawing/reference.py` as thresholds of many rows at once, nothing asked of the host. Greedy rows keep
    everything.
    """
    vocab = scaled.shape[-1]
    ordered = scaled.sort(-1, descending=True).values
    k = torch.where(sampling.top_k > 0, sampling.top_k, vocab).clamp_max(vocab).long()
    least = ordered.gather(-1, (k - 1)[:, None, None].expand(*scaled.shape[:2], 1)).squeeze(-1)
    mass = (ordered - ordered[..., :1]).exp().masked_fill(ordered < least.unsqueeze(-1), 0.0)
    total = mass.sum(-1, keepdim=True)
    # the last token of the smallest set that holds top_p of the mass: before it there was less
    before = mass.cumsum(-1) - mass
    in_nucleus = (before < sampling.top_p[:, None, None] * total) & (mass > 0)
    nucleus = ordered.masked_fill(~in_nucleus, torch.inf).amin(-1)
    least = torch.where(sampling.top_p[:, None] < 1.0, nucleus, least)
    floor = ordered[..., 0] + sampling.min_p.log()[:, None]  # log 0 = -inf is off
    least = torch.maximum(least, floor)
    return least.masked_fill((sampling.mode == GREEDY)[:, None], -torch.inf)
