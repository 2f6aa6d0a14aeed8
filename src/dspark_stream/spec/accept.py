"""Accept: which draft tokens stand, and the bonus token that ends the round (design: one round, 6).

Nothing is drawn here: uniforms and noise are arguments. Symbols: R streams, ℓ_r verification lengths,
B = Σ(1+ℓ_r) rows, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_stream.models.target import TargetOutput
from dspark_stream.spec.draft import Block, StreamView, acceptance_of, is_greedy
from dspark_stream.spec.noise import RoundUniforms
from dspark_stream.spec.sampling import distributions, race, sample


class Outcome(NamedTuple):
    """One stream's round: x_1 … x_accepted stand, then ``bonus``."""

    accepted: int
    bonus: int


@torch.inference_mode()
def accept(
    output: TargetOutput,  # of B rows
    streams: Sequence[StreamView],
    blocks: Sequence[Block],
    lengths: Sequence[int],
    draft_ids: Tensor | None,  # [Vd]
) -> list[Outcome]:
    """Both verifications over one ragged batch of target rows. ℓ = 0 is plain decoding: the bonus token alone."""
    logits = output.logits
    first = [0, *accumulate(1 + length for length in lengths)]
    outcomes: list[Outcome | None] = [None] * len(streams)

    exact = [r for r, s in enumerate(streams) if acceptance_of(s) != "rejection"]
    if exact:
        rows = [first[r] + j for r in exact for j in range(lengths[r] + 1)]
        if output.best is None:
            own = _target_tokens(_rows(logits, rows), [streams[r] for r in exact], [lengths[r] for r in exact])
        else:
            own = output.best.tolist()
        tokens = iter(own)
        for r in exact:
            mine = [next(tokens) for _ in range(lengths[r] + 1)]
            outcomes[r] = match(blocks[r].tokens[: lengths[r]], mine)

    drawn = [r for r in range(len(streams)) if outcomes[r] is None]
    if drawn:
        rows = [first[r] + j for r in drawn for j in range(lengths[r] + 1)]
        params = [streams[r].sampling for r in drawn for _ in range(lengths[r] + 1)]
        p = distributions(_rows(logits, rows), params)
        parts = p.split([lengths[r] + 1 for r in drawn])
        for r, outcome in zip(drawn, rejection(parts, streams, blocks, lengths, drawn, draft_ids), strict=True):
            outcomes[r] = outcome
    return [o for o in outcomes if o is not None]


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """Those rows; all of them, as nearly always, without a copy of the vocabulary's width."""
    return logits if len(rows) == len(logits) else logits[rows]


def match(draft_tokens: Sequence[int], target_tokens: Sequence[int]) -> Outcome:
    """Greedy and coupled verification: x_k stands iff it is the target's own token at its position.

    ``target_tokens`` has one more entry than ``draft_tokens``; the first that differs, or the last, is the bonus.
    """
    accepted = 0
    while accepted < len(draft_tokens) and draft_tokens[accepted] == target_tokens[accepted]:
        accepted += 1
    return Outcome(accepted, target_tokens[accepted])


def _target_tokens(logits: Tensor, streams: Sequence[StreamView], lengths: Sequence[int]) -> list[int]:
    """The target's own token at every row: argmax, or the race with the stream's noise at that position."""
    tokens = logits.argmax(-1)
    row = 0
    for stream, length in zip(streams, lengths, strict=True):
        n = length + 1
        if not is_greedy(stream):
            p = distributions(logits[row : row + n], [stream.sampling] * n)
            noise = stream.noise.at(stream.position + 1, n)
            tokens[row : row + n] = race(p, noise.to(p.device))
        row += n
    ids: list[int] = tokens.tolist()
    return ids


def rejection(
    p: Sequence[Tensor],  # a part [1 + ℓ_r, V] for each of `chosen`
    streams: Sequence[StreamView],
    blocks: Sequence[Block],
    lengths: Sequence[int],
    chosen: Sequence[int],
    draft_ids: Tensor | None,
) -> list[Outcome]:
    """Accept x_k with probability min(1, p_t(x_k)/p_d(x_k)); then draw from max(p_t - p_d, 0), or from the next p_t."""
    outcomes = []
    for part, r in zip(p, chosen, strict=True):
        block, length = blocks[r], lengths[r]
        uniforms = block.uniforms or RoundUniforms(streams[r].round_key, streams[r].position, 0)
        accepted = 0
        if length:
            assert block.q is not None
            assert block.indices is not None
            index = block.indices[:length].unsqueeze(1)
            at_x = torch.tensor(block.tokens[:length], device=part.device).unsqueeze(1)
            p_x = part[:length].gather(1, at_x).squeeze(1).tolist()
            q_x = block.q[:length].gather(1, index).squeeze(1).tolist()
            while accepted < length and uniforms.accept[accepted] * q_x[accepted] < p_x[accepted]:
                accepted += 1
        weights = part[accepted]
        if accepted < length:
            assert block.q is not None
            weights = residual(weights, block.q[accepted], draft_ids)
        u = torch.tensor([uniforms.bonus], dtype=torch.float64)
        outcomes.append(Outcome(accepted, int(sample(weights.unsqueeze(0), u)[0])))
    return outcomes


def residual(p: Tensor, q: Tensor, draft_ids: Tensor | None) -> Tensor:
    """max(p_t - p_d, 0), unnormalised, [V]; q [Vd] is widened with zeros to the target's vocabulary."""
    rest = p.clone()
    if draft_ids is None:
        rest -= q
    else:
        rest[draft_ids] -= q
    rest.clamp_(min=0.0)
    # p = q up to rounding: a rejection had probability zero, and any draw from p is right
    return rest if bool(rest.sum() > 0) else p
