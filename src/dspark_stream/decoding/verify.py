"""Verify: one target pass over every stream's anchor and its first ℓ draft tokens."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_stream.decoding.draft import Block, StreamView
from dspark_stream.models.protocols import Rows, Store, Target, Verified


def verify(
    target: Target, store: Store, streams: Sequence[StreamView], blocks: Sequence[Block], lengths: Sequence[int]
) -> Verified:
    """Row j of a stream gives the target's distribution for position p + 1 + j.

    Where every stream is greedy and none is adjusted, only the rows' best tokens are asked for.
    """
    rows = [
        Rows(s.extent, s.position, [s.anchor, *block.tokens[:length]])
        for s, block, length in zip(streams, blocks, lengths, strict=True)
    ]
    greedy = all(s.acceptance == "greedy" and s.adjustment is None for s in streams)
    return target.forward(rows, store, greedy=greedy)
