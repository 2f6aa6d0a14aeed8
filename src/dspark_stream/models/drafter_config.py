"""What a drafter's `config.json` says, in the form that both runners take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

HeadType = Literal["vanilla", "gated", "rnn"]


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """What a DeepSpec `config.json` says about the drafter, and ours beside it."""

    backbone: Any
    """What the layers are built from: the `transformers` config (torch/drafter.py), or, for the CPU's kernels, a
    `Geometry`. The drafter's own family, which need not be the target's.
    """
    num_layers: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int = 256
    """0: no sequential head (DFlash)."""
    markov_head_type: HeadType = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    confidence_bias: bool = True
    num_anchors: int = 512
    draft_vocab_size: int | None = None
    """Ours: the LM head and W2 are limited to this many of the target's tokens; None for all of them."""
    w1_of_drafts: bool = False
    """Ours: W1 has rows for the draft vocabulary alone; any other token's is zero."""
    context_window: int = 0
    """Ours: context positions before the anchor that a block sees; 0: all."""

    @property
    def family(self) -> str:
        """The config's `model_type`."""
        return str(self.backbone.model_type)
