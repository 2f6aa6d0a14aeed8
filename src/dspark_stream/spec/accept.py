"""Accept: which draft tokens stand, and the bonus token that ends the round (design: one round, 6).

Nothing is drawn here: uniforms and noise are arguments. Symbols: R streams, ℓ_r verification lengths,
B = Σ(1+ℓ_r) rows, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from dspark_stream.models.distributions import Distributions, Judged
from dspark_stream.models.protocols import AdjustedBlock, Verified
from dspark_stream.models.torch.distributions import distributions, race
from dspark_stream.spec.draft import Block, StreamView, acceptance_of
from dspark_stream.spec.noise import RoundUniforms

Outcome = Judged
"""One stream's round: x_1 … x_accepted stand, then ``bonus``."""


def accept(
    output: Verified,  # of B rows
    streams: Sequence[StreamView],
    blocks: Sequence[Block],
    lengths: Sequence[int],
    draft_ids: Tensor | None,  # [Vd]
) -> list[Outcome]:
    """Both verifications over one ragged batch of target rows. ℓ = 0 is plain decoding: the bonus token alone."""
    first = [0, *accumulate(1 + length for length in lengths)]
    outcomes: list[Outcome | None] = [None] * len(streams)
    adjusted = [
        AdjustedBlock(row, blocks[r].tokens[: lengths[r]], adjustment)
        for r, (row, stream) in enumerate(zip(first, streams, strict=False))
        if (adjustment := stream.adjustment) is not None
    ]
    if adjusted:
        output = output.adjusted(adjusted)

    for r, stream in enumerate(streams):  # before any row of logits becomes a distribution
        rows = range(first[r], first[r + 1])
        match acceptance_of(stream):
            case "greedy":
                outcomes[r] = matched(blocks[r].tokens[: lengths[r]], output.best(rows))
            case "coupled":
                outcomes[r] = matched(blocks[r].tokens[: lengths[r]], _raced(output.logits(rows), stream))
            case "rejection":
                pass

    drawn = [r for r in range(len(streams)) if outcomes[r] is None]
    if drawn:
        rows_drawn = [first[r] + j for r in drawn for j in range(lengths[r] + 1)]
        p = output.distributions(rows_drawn, [streams[r].sampling for r in drawn for _ in range(lengths[r] + 1)])
        row = 0
        for r in drawn:
            outcomes[r] = rejection(p, row, streams[r], blocks[r], lengths[r], draft_ids)
            row += lengths[r] + 1
    return [o for o in outcomes if o is not None]


def _raced(logits: Tensor, stream: StreamView) -> list[int]:
    """The target's own token at each of a stream's rows: the race with the stream's noise at that position."""
    p = distributions(logits, [stream.sampling] * len(logits))
    tokens: list[int] = race(p, stream.noise.at(stream.position + 1, len(logits)).to(p.device)).tolist()
    return tokens


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
    """Block verification by this round's uniforms; what it does and why: `Distributions.judge`."""
    uniforms = block.uniforms or RoundUniforms(stream.round_key, stream.position, 0)
    if not length or block.q is None:
        return Outcome(0, p.draw(first, uniforms.bonus))
    return p.judge(
        first, block.tokens[:length], block.q, block.indices[:length], draft_ids, uniforms.accept, uniforms.bonus
    )
