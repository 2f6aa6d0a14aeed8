"""What operations read of the streams of a round: columns of tensors, one entry a stream.

Symbols: R streams (rows of nobody included), γ block size, V target vocabulary, C candidates a slot.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

GREEDY, REJECTION, COUPLED = 0, 1, 2
"""How a stream's drafts are accepted (`types.Acceptance`)."""


class Sampling(NamedTuple):
    """How each stream's tokens are chosen, and what its noise is keyed by. All [R]."""

    mode: Tensor
    """int32: GREEDY, REJECTION or COUPLED."""
    temperature: Tensor
    """float32, above 0; greedy streams ignore it."""
    top_k: Tensor
    """int32, 0 is off."""
    top_p: Tensor
    """float32 in (0, 1], 1 is off."""
    min_p: Tensor
    """float32 in [0, 1], 0 is off."""
    seed: Tensor
    """int64: keys the noise of coupled verification."""
    round_key: Tensor
    """int64: keys the uniforms of rejection verification."""
    position: Tensor
    """int64: p, the anchor's position."""


class Drafts(NamedTuple):
    """What was proposed, and the distributions that it was drawn from."""

    tokens: Tensor
    """x_1 … x_γ as target ids, [R, γ] int32."""
    candidates: Tensor
    """Target ids that q is spread over, ascending, [R, γ, C] int32. The rest of the vocabulary has q = 0."""
    q: Tensor
    """The probabilities that x_k was drawn with, [R, γ, C] float32; read where verification is by rejection."""
    q_x: Tensor
    """q of x_k itself, [R, γ] float32."""
