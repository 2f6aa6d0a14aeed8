"""Accept: which draft tokens are accepted ("stand"), and the bonus token that ends the round.

Nothing is drawn here: uniforms and noise are arguments. Symbols: R streams, ℓ_r verification lengths,
B = Σ(1+ℓ_r) rows, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dspark_stream.decoding.draft import Block, StreamView
from dspark_stream.decoding.noise import RoundUniforms
from dspark_stream.models.distributions import Distributions, Judged
from dspark_stream.models.protocols import AdjustedBlock, Race, Verified
from dspark_stream.types import Acceptance

WIDE = 64
"""Looked-up drafts are judged by the uniforms of a round with so many slots; no drafter's block is wider."""
Outcome = Judged
"""One stream's round: x_1 … x_accepted stand, then ``bonus``."""


def accept(
    output: Verified,  # of B rows
    streams: Sequence[StreamView],
    blocks: Sequence[Block],
    lengths: Sequence[int],
    draft_ids: Tensor | None,  # [Vd]
) -> list[Outcome]:
    """Greedy, coupled and rejection verification over one ragged batch of target rows.

    ℓ = 0 is plain decoding: the bonus token alone.
    """
    first = [0, *accumulate(1 + length for length in lengths)]
    ways = [stream.acceptance for stream in streams]
    outcomes: list[Outcome | None] = [None] * len(streams)
    adjusted = [
        AdjustedBlock(row, blocks[r].tokens[: lengths[r]], adjustment)
        for r, (row, stream) in enumerate(zip(first, streams, strict=False))
        if (adjustment := stream.adjustment) is not None
    ]
    if adjusted:
        output = output.adjusted(adjusted)

    def rows_of(way: Acceptance) -> list[tuple[int, int]]:
        """Stream and place in its block of every row of that way's streams."""
        return [(r, j) for r, own in enumerate(ways) if own == way for j in range(lengths[r] + 1)]

    for r, way in enumerate(ways):  # before any row of logits becomes a distribution
        if way == "greedy":
            outcomes[r] = matched(blocks[r].tokens[: lengths[r]], output.best(range(first[r], first[r + 1])))
    if coupled := rows_of("coupled"):
        tokens = iter(
            output.raced(
                [first[r] + j for r, j in coupled],
                [streams[r].sampling for r, _ in coupled],
                [Race(streams[r].noise, streams[r].position + 1 + j) for r, j in coupled],
            )
        )
        for r in dict.fromkeys(r for r, _ in coupled):
            outcomes[r] = matched(blocks[r].tokens[: lengths[r]], [next(tokens) for _ in range(lengths[r] + 1)])
    if drawn := rows_of("rejection"):
        p = output.distributions([first[r] + j for r, j in drawn], [streams[r].sampling for r, _ in drawn])
        for row, (r, j) in enumerate(drawn):
            if j == 0:
                outcomes[r] = rejection(p, row, streams[r], blocks[r], lengths[r], draft_ids)
    return [o for o in outcomes if o is not None]


def matched(draft_tokens: Sequence[int], target_tokens: Sequence[int]) -> Outcome:
    """Greedy and coupled verification: x_k stands iff it is the target's own token at its position.

    ``target_tokens`` has one more entry than ``draft_tokens``; the first that differs, or the last, is the bonus.
    """
    accepted = 0
    while accepted < len(draft_tokens) and draft_tokens[accepted] == target_tokens[accepted]:
        accepted += 1
    return Outcome(accepted, target_tokens[accepted])


def rejection(
    p: Distributions,  # rows `first` … `first` + `length` are this stream's
    first: int,
    stream: StreamView,
    block: Block,
    length: int,
    draft_ids: Tensor | None,
) -> Outcome:
    """Block verification by this round's uniforms. How it works is at `Distributions.judge`."""
    uniforms = block.uniforms or RoundUniforms(stream.round_key, stream.position, WIDE)
    if not length or block.q is None:
        return certain(p, first, block.tokens[:length], uniforms)
    return p.judge(
        first, block.tokens[:length], block.q, block.indices[:length], draft_ids, uniforms.accept, uniforms.bonus
    )


_ONE = torch.ones(1)


def certain(p: Distributions, first: int, tokens: Sequence[int], uniforms: RoundUniforms) -> Outcome:
    """Rejection of drafts that were not drawn but known beforehand, q = 1: x_k stands with probability p_t(x_k).

    ``uniforms`` are of a round of `WIDE` slots, so that no drafter draws by the same ones. A stream of the same key may
    be drafted for in this round, and what its drafts promise may decide about this block.

    The bonus token is drawn from p_t without the refused x_k, or after the last draft from the next p_t. Judged as a
    whole, such a block is accepted exactly as often: every share w_k is the product of these probabilities.
    """
    for k, token in enumerate(tokens):
        if not uniforms.accept[k] < p.probability(first + k, token):  # NaN refuses
            return Outcome(k, p.draw_rest(first + k, uniforms.bonus, 1.0, _ONE, torch.tensor([token])))
    return Outcome(len(tokens), p.draw(first + len(tokens), uniforms.bonus))
