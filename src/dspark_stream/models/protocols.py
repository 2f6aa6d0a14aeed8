"""What the algorithm asks of a target, a drafter and their stores, whoever runs them.

Symbols: R streams, T rows of all of them, γ block size, V vocabulary, Vd draft vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dspark_stream.models.adjustment import Adjustment
from dspark_stream.models.cache import Extent, KVShape
from dspark_stream.models.distributions import Distributions
from dspark_stream.types import SamplingParams


class Store(Protocol):
    """Keys and values of one model over all token slots."""

    def clear(self, extent: Extent) -> None:
        """Zero an extent's slots."""


class Rows(NamedTuple):
    """One stream's part of a target pass: tokens at positions ``start``, ``start + 1``, …"""

    extent: Extent
    start: int
    token_ids: list[int]


class Noise(Protocol):
    """A stream's exponentials, by output position and token: `dspark_kernels.noise`."""

    seed: int
    """What they are made from, at every position alone."""

    def at(self, first: int, count: int) -> Tensor:
        """Those of positions ``first`` … ``first + count - 1``, [count, V]; earlier ones are not asked for again."""


class Race(NamedTuple):
    """Under whose noise a row's token is drawn (coupled verification): that of the least exponential over p."""

    noise: Noise
    position: int
    """Output position of the row; of a draft's first slot."""


class AdjustedBlock(NamedTuple):
    """Rows ``first`` … ``first + len(drafts)`` of a stream that is adjusted: each sees the drafts before it."""

    first: int
    drafts: Sequence[int]
    adjustment: Adjustment


class Verified(Protocol):
    """What a target pass says of the rows asked for; but for ``taps``, good until the next pass.

    A token is -1 where a row has none: everything is ruled out, or a score is no number or has no bound.
    """

    @property
    def taps(self) -> Tensor:
        """[T, taps·H] of all rows, float, which no later pass writes over; empty where there is no drafter."""

    def adjusted(self, blocks: Sequence[AdjustedBlock]) -> Verified:
        """The same with the logits of these rows adjusted; this one is not to be used any more. Not where the pass was
        asked for the best tokens alone.
        """

    def best(self, rows: Sequence[int]) -> list[int]:
        """The likeliest token of each row."""

    def logits(self, rows: Sequence[int]) -> Tensor:
        """[n, V]. Not where the pass was asked for the best tokens alone."""

    def distributions(self, rows: Sequence[int], sampling: Sequence[SamplingParams]) -> Distributions:
        """What each row's token is drawn from; once a row: its logits may be gone then."""

    def raced(self, rows: Sequence[int], sampling: Sequence[SamplingParams], races: Sequence[Race]) -> list[int]:
        """The token that each row's own noise draws from what `distributions` would give; once a row, as there."""


class Target(Protocol):
    """A causal language model with hidden-state taps, driven as one ragged batch."""

    family: str
    """`model_type` of its config."""
    runner: str
    """What computes it, as capacity curves are told apart by it; empty for torch."""
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    tap_layers: tuple[int, ...]
    kv_shapes: list[KVShape]

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values in a store."""

    def set_taps(self, tap_layers: tuple[int, ...]) -> None:
        """Choose the taps (once; a drafter names them): i taps the output of layer i, -1 the embedding output.

        Raises:
            ModelLoadError: a layer that this target does not have, or its last one.
        """

    def make_store(self, slots: int) -> Store:
        """Room for its keys and values of that many token slots."""

    def forward(
        self, batch: list[Rows], store: Store, logit_rows: list[int] | None = None, *, greedy: bool = False
    ) -> Verified:
        """One ragged pass. Rows' keys and values are written to their streams' slots.

        Args:
            batch: every stream's rows; each stream's earlier positions must be in ``store``.
            store: this target's.
            logit_rows: indices into the concatenated rows that something is wanted of, and by which `Verified` counts;
                None for all of them.
            greedy: nothing but the best tokens is wanted.
        """


class Draw(NamedTuple):
    """How one stream's drafts are chosen: greedily where neither is given."""

    sampling: SamplingParams
    uniforms: Sequence[float] = ()
    """[g] in [0, 1), for inverse transform (rejection)."""
    race: Race | None = None
    """For the race that the target runs under the same noise (coupled)."""
    adjustment: Adjustment | None = None
    """What is done to each slot's logits before anything is drawn by them; a slot sees the drafts before it."""


class Drafted(Protocol):
    """Blocks of R streams, g ≤ γ slots each; good until the next draft."""

    tokens: list[list[int]]
    """[R, g], target ids; -1: that slot has none, and those behind it are worth nothing."""
    logits: list[list[float]] | None
    """[R, g], of confidence; None without a confidence head."""

    def indices(self, r: int) -> list[int]:
        """A stream's drafts as draft vocabulary indices."""

    def q(self, r: int) -> Distributions:
        """What a stream that was given uniforms drew from, a row a slot, over the draft vocabulary."""


class Drafter(Protocol):
    """Parallel backbone, sequential head, confidence head; embedding and LM head are the target's."""

    gamma: int
    context_window: int
    """Context positions before the anchor that a block sees; 0: all."""
    draft_ids: Tensor | None
    """The target ids of the draft vocabulary [Vd], ascending; None: all."""

    @property
    def ring(self) -> int:
        """Token slots that its store has of a stream, the latest positions (`Extent.context_slots`); 0: all
        positions."""

    @property
    def has_confidence(self) -> bool:
        """Whether there is a confidence head."""

    @property
    def kv_shapes(self) -> list[KVShape]:
        """What one context position takes in each layer."""

    def make_store(self, slots: int) -> Store:
        """Room for the context keys and values of that many token slots."""

    def append_context(self, taps: Tensor, positions: list[int], slots: list[int], store: Store) -> None:
        """Write every layer's context keys and values of ``taps`` [T, taps·H] at ``positions`` to ``slots``."""

    def draft(self, anchors: list[tuple[Extent, int, int]], store: Store, slots: int, draws: Sequence[Draw]) -> Drafted:
        """One draft pass and the walk through its slots, for R streams.

        Args:
            anchors: each stream's extent, anchor position p and anchor token. The context of the positions before p
                that a block sees must be in ``store``; the block's own keys and values are scratch there.
            store: this drafter's.
            slots: g ≤ γ. The slots see each other, so fewer are another block, not the first slots of the whole one
                (docs/decisions/013-shorter-blocks.md).
            draws: [R].
        """
