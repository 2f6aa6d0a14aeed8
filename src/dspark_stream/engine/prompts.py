"""Prompts are read in chunks between rounds, whichever way those are run."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_stream.decoding.accept import accept
from dspark_stream.decoding.draft import Block
from dspark_stream.engine.context import Context, Part
from dspark_stream.engine.rounds import Committed, Models, commit
from dspark_stream.engine.stream import Stream
from dspark_stream.models.protocols import Rows


def prefill(
    models: Models, context: Context, shares: Sequence[tuple[Stream, int]], company: Sequence[Stream]
) -> list[Committed]:
    """Prompt tokens of these streams, so many of each, as one ragged pass; who completes gets its first token.

    ``company``: all streams that have slots, these among them.

    That token is an ordinary acceptance with ℓ = 0 whose anchor is the last prompt token.
    """
    batch: list[Rows] = []
    completed: list[tuple[Stream, int]] = []
    kept: list[Part] = []
    row = 0
    for stream, count in shares:
        ids = stream.request.prompt_ids[stream.prefilled : stream.prefilled + count]
        batch.append(Rows(stream.extent, stream.prefilled, list(ids)))
        if stream.drafts:
            kept.append(Part(stream, row, len(ids), stream.prefilled, soon=True))
        row += len(ids)
        if stream.prefilled + len(ids) == len(stream.request.prompt_ids):
            completed.append((stream, row - 1))
    output = models.target.forward(batch, models.target_kv, [last for _, last in completed])
    context.keep(output.taps, kept, company)
    for (stream, _), rows in zip(shares, batch, strict=True):
        stream.read(len(rows.token_ids))
    if not completed:
        return []
    started = [stream for stream, _ in completed]
    outcomes = accept(output, started, [Block()] * len(started), [0] * len(started), None)
    committed = []
    for stream, outcome in zip(started, outcomes, strict=True):
        stream.started()
        committed.append(commit(stream, [outcome.bonus], 0, None))
    return committed
