"""A target on the CPU's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark_kernels.cpu import (
    Context,
    EditedBlock,
    Llama,
    PackedMatrix,
    Room,
    Rooms,
    Table,
    best_tokens,
    edit_rows,
    race,
)
from dspark_kernels.cpu.build import library_path
from dspark_stream.models.cache import KVShape
from dspark_stream.models.native.distributions import NativeDistributions, drawn_by, raced_by
from dspark_stream.models.native.store import NativeStore
from dspark_stream.models.protocols import AdjustedBlock, Race, Rows, Store
from dspark_stream.models.taps import checked_taps
from dspark_stream.types import SamplingParams


class NativeOutput(NamedTuple):
    """See `Verified`."""

    context: Context
    rows: Tensor | None  # logits [n, V]
    tokens: list[int]  # best [n], where only these were asked for
    taps: Tensor

    def adjusted(self, blocks: Sequence[AdjustedBlock]) -> NativeOutput:
        """See `Verified.adjusted`; where they stand."""
        assert self.rows is not None
        edit_rows(
            self.context,
            self.rows.numpy(),
            [EditedBlock(first, drafts, adjustment.edits()) for first, drafts, adjustment in blocks],
        )
        return self

    def best(self, rows: Sequence[int]) -> list[int]:
        """See `Verified.best`."""
        if self.rows is None:
            return [self.tokens[row] for row in rows]
        return best_tokens(self.context, self.rows.numpy(), rows)

    def logits(self, rows: Sequence[int]) -> Tensor:
        """See `Verified.logits`."""
        return self._of(rows)

    def distributions(self, rows: Sequence[int], sampling: Sequence[SamplingParams]) -> NativeDistributions:
        """See `Verified.distributions`."""
        return NativeDistributions.of(self.context, self._of(rows), sampling)

    def raced(self, rows: Sequence[int], sampling: Sequence[SamplingParams], races: Sequence[Race]) -> list[int]:
        """See `Verified.raced`; in one call, where the rows are."""
        assert self.rows is not None
        return race(self.context, self.rows.numpy(), drawn_by(sampling), raced_by(races), rows)

    def _of(self, rows: Sequence[int]) -> Tensor:
        """Those rows; all of them, as nearly always, without a copy of the vocabulary's width."""
        assert self.rows is not None
        return self.rows if len(rows) == len(self.rows) else self.rows[list(rows)]


class NativeTarget:
    """A Llama-like target. Logits and taps are float32, logits valid until the next pass. See `Target`.

    Args:
        llama: its layers.
        embedding: [V, H].
        lm_head: [V, H]; the embedding's matrix where they are tied.
    """

    def __init__(
        self,
        llama: Llama,
        embedding: Table,
        lm_head: PackedMatrix,
        *,
        family: str,
        max_positions: int,
        eos_token_ids: tuple[int, ...],
        embedding_scale: float = 1.0,
    ) -> None:
        self.llama, self.embedding, self.head = llama, embedding, lm_head
        self.family, self.embedding_scale = family, embedding_scale
        self.runner = f"{library_path(llama.context.isa).name} x{llama.context.threads}"
        self.eos_token_ids = eos_token_ids
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.vocab_size, self.hidden_size, self.num_layers = embedding.outputs, llama.hidden, llama.num_layers
        self.max_positions = max_positions
        self.tap_layers: tuple[int, ...] = ()
        self.kv_shapes = [KVShape(llama.kv_heads, llama.head_size, llama.head_size)] * llama.num_layers
        self._logit_room, self._tap_rooms = Room(), Rooms()  # taps are kept
        self._own_layers = np.empty(0, dtype=np.int32)

    def set_taps(self, tap_layers: tuple[int, ...]) -> None:
        """See `Target.set_taps`."""
        self.tap_layers = checked_taps(tap_layers, self.num_layers)
        self._own_layers = np.array(tap_layers, dtype=np.int32)

    @property
    def kv_dtype(self) -> torch.dtype:
        """See `Target.kv_dtype`."""
        return torch.bfloat16 if self.llama.context.kv_bfloat else torch.float16

    @property
    def pass_bytes(self) -> int:
        """Weights that a pass reads: every layer's matrices and the LM head; of the embedding it takes single rows."""
        return self.llama.nbytes + self.head.nbytes

    def make_store(self, slots: int) -> NativeStore:
        """See `Target.make_store`."""
        return NativeStore(self.kv_shapes, slots)

    def forward(
        self, batch: list[Rows], store: Store, logit_rows: list[int] | None = None, *, greedy: bool = False
    ) -> NativeOutput:
        """See `Target.forward`."""
        assert isinstance(store, NativeStore)
        where: list[int] = []
        ids: list[int] = []
        for extent, start, tokens in batch:
            where += (extent.slot, start, len(tokens))
            ids += tokens
        taps, out = self.llama.run(
            self.embedding,
            self.head,
            where,
            ids,
            store.place,
            self._own_layers,
            self._tap_rooms,
            logit_rows,
            None if greedy else self._logit_room,
            self.embedding_scale,
        )
        context = self.llama.context
        if greedy:
            return NativeOutput(context, None, out.tolist(), torch.from_numpy(taps))
        return NativeOutput(context, torch.from_numpy(out), [], torch.from_numpy(taps))
