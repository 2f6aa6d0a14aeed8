"""Accept: which draft tokens stand, and the bonus token that ends the round (design: one round, 6).

Nothing is drawn here: uniforms and noise are arguments. Symbols: R streams, ℓ_r verification lengths,
B = Σ(1+ℓ_r) rows, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from dspark_stream.models.distributions import Distributions, NativeDistributions
from dspark_stream.models.target import TargetOutput
from dspark_stream.spec.draft import Block, StreamView, acceptance_of, is_greedy
from dspark_stream.spec.noise import RoundUniforms
from dspark_stream.spec.sampling import Dense, distributions, is_cut, race
from dspark_stream.types import SamplingParams


class Outcome(NamedTuple):
    """One stream's round: x_1 … x_accepted stand, then ``bonus``."""

    accepted: int
    bonus: int


def accept(
    output: TargetOutput,  # of B rows
    streams: Sequence[StreamView],
    blocks: Sequence[Block],
    lengths: Sequence[int],
    draft_ids: Tensor | None,  # [Vd]
) -> list[Outcome]:
    """Both verifications over one ragged batch of target rows. ℓ = 0 is plain decoding: the bonus token alone."""
    first = [0, *accumulate(1 + length for length in lengths)]
    outcomes: list[Outcome | None] = [None] * len(streams)

    exact = [r for r, s in enumerate(streams) if acceptance_of(s) != "rejection"]
    if exact:
        own = output.best  # of all rows: then everybody is greedy
        if own is None:
            rows = [first[r] + j for r in exact for j in range(lengths[r] + 1)]
            own = _target_tokens(_rows(output.logits, rows), [streams[r] for r in exact], [lengths[r] for r in exact])
        tokens = iter(own)
        for r in exact:
            mine = [next(tokens) for _ in range(lengths[r] + 1)]
            outcomes[r] = match(blocks[r].tokens[: lengths[r]], mine)

    drawn = [r for r in range(len(streams)) if outcomes[r] is None]
    if drawn:
        rows = [first[r] + j for r in drawn for j in range(lengths[r] + 1)]
        params = [streams[r].sampling for r in drawn for _ in range(lengths[r] + 1)]
        p = _distributions(output, rows, params)
        row = 0
        for r in drawn:
            outcomes[r] = rejection(p, row, streams[r], blocks[r], lengths[r], draft_ids)
            row += lengths[r] + 1
    return [o for o in outcomes if o is not None]


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """Those rows; all of them, as nearly always, without a copy of the vocabulary's width."""
    return logits if len(rows) == len(logits) else logits[rows]


def _distributions(output: TargetOutput, rows: list[int], params: Sequence[SamplingParams]) -> Distributions:
    logits = _rows(output.logits, rows)
    if output.weigh is None or any(is_cut(p) for p in params):
        return Dense(distributions(logits, params))
    return output.weigh(logits, [p.temperature for p in params])


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
    p: Distributions,  # rows `first` … `first` + `length` are this stream's
    first: int,
    stream: StreamView,
    block: Block,
    length: int,
    draft_ids: Tensor | None,
) -> Outcome:
    """Block verification: the longest prefix of the drafts that stands, judged as a whole; then the bonus token.

    share[k], w_k = min(1, w_{k-1} · p_t(x_k)/p_d(x_k)) with w_0 = 1, is the probability that at least x_1 … x_k stand
    (given these drafts). So all ℓ stand with probability w_ℓ. Where no longer prefix stands, x_1 … x_k do with what
    is still missing from w_k: (w_k - s_k)/(1 - s_k), where s_k = Σ min(w_k p_t, p_d) is what longer ones give. The
    bonus token is from max(w_k p_t - p_d, 0), after ℓ from the next p_t. (Sun et al., arXiv 2403.10444, where w is p
    and Algorithm 2 is this; docs/decisions/019-blocks-judged-whole.md.)
    """
    q, uniforms = block.q, block.uniforms or RoundUniforms(stream.round_key, stream.position, 0)
    if length and isinstance(p, NativeDistributions) and isinstance(q, NativeDistributions):  # the same in one call
        drafts = block.tokens[:length]
        return Outcome(*p.judge(first, drafts, q, block.indices, uniforms.accept, uniforms.bonus))
    share = [1.0]
    for k in range(length):
        assert q is not None
        p_x, q_x = p.probability(first + k, block.tokens[k]), q.probability(k, block.indices[k])
        share.append(min(share[k] * p_x / q_x, 1.0))  # what was drawn has q_x > 0; NaN stays, and refuses
    if length == 0 or uniforms.accept[length - 1] < share[length]:
        return Outcome(length, p.draw(first + length, uniforms.bonus))
    assert q is not None
    for k in range(length - 1, 0, -1):
        if uniforms.accept[k - 1] >= share[k]:
            continue  # what is missing from w_k is at most w_k
        missing = share[k] - p.overlap(first + k, share[k], q.probabilities(k), draft_ids)  # below 0 by rounding
        if uniforms.accept[k - 1] * (missing + 1.0 - share[k]) < missing:
            return Outcome(k, p.draw_rest(first + k, uniforms.bonus, share[k], q.probabilities(k), draft_ids))
    return Outcome(0, p.draw_rest(first, uniforms.bonus, 1.0, q.probabilities(0), draft_ids))
