"""Logits edited on torch; what is done to them and in which order: `dspark_kernels.edits`. Symbols: V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark_kernels.edits import EDIT, Edits


class EditedRows:
    """The rows of one stream's block, one after the other; each sees the tokens that were added before it."""

    def __init__(self, edits: Edits) -> None:
        self._edits, self._entries, self._row = edits, edits.entries, 0

    def apply(self, logits: Tensor) -> None:
        """Edit the next row's logits [V], float32, in place."""
        e, device = self._edits, logits.device
        if len(self._entries):
            tokens, bias, times = (
                torch.from_numpy(self._entries[name].copy()).to(device) for name in EDIT.fields or ()
            )
            scores = logits[tokens.long()] + bias
            repeated = torch.where(scores > 0, scores / e.repetition, scores * e.repetition)
            scores = torch.where(times >= 0, repeated, scores)
            logits[tokens.long()] = scores - torch.where(times > 0, e.frequency * times.float() + e.presence, 0.0)
        if self._row < e.masked:
            logits[torch.from_numpy(e.stops).to(device).long()] = -torch.inf
        self._row += 1

    def add(self, token: int) -> None:
        """The token after it, which the rows from here on see."""
        at = np.flatnonzero(self._entries["token"] == token)
        if len(at):
            self._entries = self._entries.copy()
            self._entries["times"][at] = np.maximum(self._entries["times"][at], 0) + 1
        else:
            self._entries = np.append(self._entries, np.array([(token, 0.0, 1)], dtype=EDIT))


def edit_block(rows: Tensor, drafts: Sequence[int], edits: Edits) -> None:
    """Edit the logits [ℓ + 1, V], float32, of one stream's block in place: row j sees the first j of ``drafts`` [ℓ]."""
    block = EditedRows(edits)
    block.apply(rows[0])
    for row, token in zip(rows[1:], drafts, strict=True):
        block.add(token)
        block.apply(row)
