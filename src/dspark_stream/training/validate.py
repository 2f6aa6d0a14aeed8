"""Held-out accepted length: the figure that matters. (Teacher-forced loss is elsewhere.)

At temperature 0 a draft token is accepted exactly if it equals the target's. So walking along an answer that the
target wrote greedily, with the drafter's own tokens, gives the accepted length that the engine will see, without
running the target at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_stream.models.torch.drafter import Drafter
from dspark_stream.training.answers import Answer
from dspark_stream.training.features import Features


@dataclass
class Walked:
    """Rounds of one or more answers, and how many drafts each accepted."""

    accepted: list[int] = field(default_factory=list)

    @property
    def accepted_length(self) -> float:
        """τ = 1 + accepted a round; 0 where there was no round."""
        return 1 + sum(self.accepted) / len(self.accepted) if self.accepted else 0.0

    def by_position(self, gamma: int) -> list[float]:
        """Acceptance of draft k given that 1 … k-1 were accepted, for k = 1 … γ."""
        reached = [sum(a >= k for a in self.accepted) for k in range(gamma + 1)]
        return [reached[k] / reached[k - 1] if reached[k - 1] else 0.0 for k in range(1, gamma + 1)]


class WalkAttend:
    """Each stream's γ rows attend to the context rows before p of its sequence, its window's, and to themselves."""

    def __init__(self, context: list[list[tuple[Tensor, Tensor]]], gamma: int, window: int) -> None:
        self.context, self.gamma, self.window = context, gamma, window
        self.streams: list[tuple[int, int]] = []
        """Sequence and anchor position of each block in the pass."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See `models.attention.Attend`."""
        group = query.shape[1] // key.shape[1]
        out: list[Tensor] = []
        for i, (sequence, p) in enumerate(self.streams):
            rows = slice(i * self.gamma, (i + 1) * self.gamma)
            past_k, past_v = (x[max(0, p - (self.window or p)) : p] for x in self.context[sequence][layer])
            q = query[rows].to(value.dtype).unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)  # [Hk, G·γ, D]
            k = torch.cat((past_k.to(value.dtype), key[rows].to(value.dtype))).transpose(0, 1)
            v = torch.cat((past_v.to(value.dtype), value[rows])).transpose(0, 1)
            o = F.scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), scale=scale)
            out.append(o.view(len(q), group, self.gamma, -1).permute(2, 0, 1, 3).flatten(1, 2))
        return torch.cat(out)


@torch.no_grad()
def walk(drafter: Drafter, answers: Sequence[Answer], features: Sequence[Features]) -> dict[str, Walked]:
    """Run every answer's rounds, all answers side by side. Rounds by domain.

    Rounds whose γ drafts would reach past the answer's end are left out: nothing is known about them.
    """
    gamma = drafter.gamma
    attend = WalkAttend([_context(drafter, f) for f in features], gamma, drafter.context_window)
    at = [len(a.prompt_ids) for a in answers]  # the first token comes out of the prompt's own pass, undrafted
    out: dict[str, Walked] = {}
    tokens = [a.ids for a in answers]
    while True:
        live = [i for i, p in enumerate(at) if p + gamma < len(tokens[i])]
        if not live:
            return out
        attend.streams = [(i, at[i]) for i in live]
        drafts = _draft(drafter, attend, [tokens[i][at[i]] for i in live])
        for i, draft in zip(live, drafts.tolist(), strict=True):
            truth = tokens[i][at[i] + 1 : at[i] + 1 + gamma]
            accepted = next((k for k in range(gamma) if draft[k] != truth[k]), gamma)
            out.setdefault(answers[i].domain, Walked()).accepted.append(accepted)
            at[i] += accepted + 1


def _context(drafter: Drafter, features: Features) -> list[tuple[Tensor, Tensor]]:
    """Each layer's context keys and values of one sequence."""
    taps = features.taps
    projected = drafter.context_features(taps)
    rope = drafter.rope(torch.arange(len(taps), device=taps.device))
    return [drafter.context_kv(layer, projected, *rope) for layer in range(len(drafter.layers))]


def _draft(drafter: Drafter, attend: WalkAttend, anchors: list[int]) -> Tensor:
    """Greedy drafts of one round, target ids [R, γ]."""
    gamma, device = drafter.gamma, drafter.target.device
    ids = torch.full((len(anchors), gamma), drafter.config.mask_token_id, device=device)
    ids[:, 0] = token = torch.tensor(anchors, device=device)
    positions = torch.cat([torch.arange(p, p + gamma, device=device) for _, p in attend.streams])
    hidden = drafter.block_hidden(ids.flatten(), positions, attend).view(len(anchors), gamma, -1)
    base = drafter.base_logits(hidden.to(drafter.target.dtype)).float()
    head, drafts = drafter.markov_head, []
    state = None if head is None else head.initial_state(len(anchors))
    for k in range(gamma):
        logits = base[:, k]
        if head is not None:
            out, state = head.step(head.embed(token), hidden[:, k], state)
            logits = logits + head.bias(out)
        token = drafter.to_target_ids(logits.argmax(-1))
        drafts.append(token)
    return torch.stack(drafts, 1)
