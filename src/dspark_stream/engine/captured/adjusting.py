"""Adjusted logits in rounds that are run operation by operation: the host reads what was admitted, and edits rows.

Symbols: R seats, γ block size, Vd draft vocabulary, B rows of the target pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark_kernels.admission import Admitted
from dspark_stream.models.adjustment import Adjustment
from dspark_stream.models.torch.edits import EditedRows, edit_block


def adjusted_rows(
    logits: Tensor, admitted: Admitted, tokens: Tensor, adjustments: Sequence[Adjustment | None]
) -> Tensor:
    """Logits [B, V] in single precision, each row adjusted by its prefix and the drafts before it (tokens [R, γ])."""
    logits = logits.float()
    rows = zip(admitted.first.tolist(), admitted.length.tolist(), tokens.tolist(), adjustments, strict=False)
    for first, length, drafts, adjustment in rows:
        if adjustment is not None and length >= 0:
            edit_block(logits[first : first + length + 1], drafts[:length], adjustment.edits())
    return logits


def adjusted_drafts(base: Tensor, draft_ids: Tensor | None, adjustments: Sequence[Adjustment | None]) -> Tensor:
    """Base logits [R, γ, Vd] in single precision, every slot adjusted by what was committed.

    The walk is one kernel, so a slot does not see the drafts before it here. That costs acceptance, not exactness: what
    a draft was really drawn from is what it is judged by.
    """
    base = base.float()
    ids = None if draft_ids is None else draft_ids.cpu().numpy()
    for slots, adjustment in zip(base, adjustments, strict=False):
        if adjustment is not None:
            rows = EditedRows(adjustment.draft_edits(ids))
            for slot in slots:
                rows.apply(slot)
    return base
