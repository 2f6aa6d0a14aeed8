"""The drafter: parallel backbone, sequential head, confidence head; embedding and LM head are the target's.

The backbone's layers are the library's own for the target's family; what differs is only what they attend to: the
block sees itself and the context features of the positions before its anchor.

Symbols: R streams, γ block size, H hidden size, V target vocabulary, Vd draft vocabulary (Vd = V unless reduced).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dspark_kernels.linear import PackedLinear, pack_linears
from dspark_kernels.ragged_attention import Segment
from dspark_kernels.weight_only import GROUP, WeightOnlyLinear
from dspark_stream.errors import ModelLoadError
from dspark_stream.models.cache import Extent, KVShape
from dspark_stream.models.drafter_config import DrafterConfig
from dspark_stream.models.families import FAMILIES
from dspark_stream.models.protocols import Draw, Store
from dspark_stream.models.torch.attention import ATTENTION_NAME, Attend, StoreAttend, int_tensor
from dspark_stream.models.torch.heads import make_confidence_head, make_head
from dspark_stream.models.torch.store import KVStore
from dspark_stream.models.torch.target import Target
from dspark_stream.models.torch.walk import TorchDrafts, walk

GEMMA4 = ("gemma4_text", "gemma4_unified_text")
"""Families whose full-attention layers have a head size of their own."""
LAYER_TYPES = (*GEMMA4, "gemma3_text")
"""Families whose rotary embedding asks for the layer's type."""

TARGET_ONLY = {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": False,
    "use_sliding_window": False,
}
"""Settings of some targets that their drafters do not have."""


def backbone_config(target_config: Any, num_layers: int) -> Any:
    """A copy of the target's text config that says what the drafter is: full attention, nothing inherited by accident.

    Raises:
        ModelLoadError: a family whose layers are not known.
    """
    if target_config.model_type not in FAMILIES:
        raise ModelLoadError(
            f"no drafter layers for model type {target_config.model_type!r}; known: {', '.join(FAMILIES)}",
            param="model_type",
        )
    fields = target_config.to_dict()
    fields |= full_attention_shape(target_config)
    fields.pop("per_layer_config", None)  # the library derives it anew
    fields |= {"num_hidden_layers": num_layers, "layer_types": ["full_attention"] * num_layers}
    fields |= {name: value for name, value in TARGET_ONLY.items() if name in fields}
    config = type(target_config)(**fields)  # made anew: the library derives per-layer settings when it makes one
    config._attn_implementation = ATTENTION_NAME
    return config


def full_attention_shape(config: Any) -> dict[str, int]:
    """Head size and key heads of a family's full-attention layers, where they differ from the others (Gemma4)."""
    if config.model_type not in GEMMA4:
        return {}
    layer = config.per_layer_config[config.layer_types.index("full_attention")]
    return {"global_head_dim": layer.head_dim, "num_global_key_value_heads": layer.num_key_value_heads}


class Drafter(nn.Module):
    """Backbone and heads. Inference goes through `draft_hidden` and `append_context`; see decoding/draft.py.

    Args:
        config: what the checkpoint says.
        target: whose embedding and LM head are aliased, not copied.
        draft_ids: the target ids of the draft vocabulary [Vd], ascending; None for all.
    """

    def __init__(self, config: DrafterConfig, target: Target, draft_ids: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.gamma, self.context_window = config.block_size, config.context_window
        self._target = (target,)  # a tuple: an alias, not a child module
        h = target.hidden_size
        vocab = target.vocab_size
        self.vocab_size = vocab
        self.draft_vocab_size = vocab if draft_ids is None else len(draft_ids)
        self.fc = nn.Linear(len(config.target_layer_ids) * h, h, bias=False)
        self._make_backbone(h)
        self.markov_head = make_head(config, vocab, self.draft_vocab_size, h, draft_ids)
        self.confidence_head = make_confidence_head(config, h)
        self.register_buffer("draft_ids", draft_ids, persistent=False)
        self.draft_ids: Tensor | None
        self._head: tuple[Any, ...] = ()
        if draft_ids is not None:  # the LM head's rows that count, gathered once; frozen like the rest of it
            weight = nn.Parameter(target.head_rows(draft_ids), requires_grad=False)
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            head.weight = weight
            self._head = (head,)

    def _make_backbone(self, hidden_size: int) -> None:
        from dspark_stream.models.torch.layers import layers_of

        config, backbone = self.config, self.config.backbone
        layer_class, norm_class, rotary_class = layers_of(config.family)
        self.hidden_norm: nn.Module = norm_class(hidden_size, eps=backbone.rms_norm_eps)
        self.layers = nn.ModuleList(layer_class(backbone, i) for i in range(config.num_layers))
        self.norm: nn.Module = norm_class(hidden_size, eps=backbone.rms_norm_eps)
        # outside the module tree like the target: a cast to bfloat16 would ruin its frequencies, and with them
        # acceptance at long context
        self._rotary = (rotary_class(backbone).to(self.target.device),)
        self._rope_of_layer_type = ("full_attention",) if config.family in LAYER_TYPES else ()

    @property
    def target(self) -> Target:
        """The target that this drafter drafts for."""
        return self._target[0]

    @property
    def head_weight(self) -> Tensor:
        """The LM head's rows of the draft vocabulary [Vd, H], frozen. Not after `pack`."""
        weight: Tensor = (self._head[0] if self._head else self.target.lm_head).weight
        return weight.detach()

    @property
    def _dtype(self) -> torch.dtype:
        weight = self.hidden_norm.weight
        assert isinstance(weight, Tensor)
        return weight.dtype

    def _attention(self, layer: int) -> Any:
        return self.layers[layer].self_attn

    @property
    def kv_shapes(self) -> list[KVShape]:
        """What one context position takes in each layer."""
        return [
            KVShape(a.k_proj.out_features // a.head_dim, a.head_dim, a.head_dim)
            for a in (self._attention(i) for i in range(len(self.layers)))
        ]

    ring = 0
    """See `Drafter.ring`: all positions are kept here, and a block looks at its window of them."""

    @property
    def has_confidence(self) -> bool:
        """See `Drafter.has_confidence` in protocols.py."""
        return self.confidence_head is not None

    def make_store(self, slots: int) -> KVStore:
        """Room for the context keys and values of that many token slots."""
        return KVStore(self.kv_shapes, slots, self.target.kv_dtype, self.target.device)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, D] of positions [T], by the library's own rotary embedding of the family."""
        like = torch.empty(0, dtype=self._dtype, device=positions.device)
        cos, sin = self._rotary[0](like, positions.unsqueeze(0), *self._rope_of_layer_type)
        return cos, sin

    # --- context features --------------------------------------------------------------------------------

    def context_features(self, taps: Tensor) -> Tensor:
        """Target taps [T, taps·H] → context features [T, H]."""
        features: Tensor = self.hidden_norm(self.fc(taps))
        return features

    def context_kv(self, layer: int, features: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's keys [T, Hk, D] and values [T, Hk, D] of context features [T, H].

        The layer's own projections, without its query half: families differ only in which norms they have, and
        in whether keys double as values (Gemma4).
        """
        from dspark_stream.models.torch.layers import apply_rotary_pos_emb

        a = self._attention(layer)
        raw = a.k_proj(features).unflatten(-1, (-1, a.head_dim))
        v_proj = getattr(a, "v_proj", None)
        value = raw if v_proj is None else v_proj(features).unflatten(-1, (-1, a.head_dim))
        key = a.k_norm(raw) if hasattr(a, "k_norm") else raw
        value = a.v_norm(value) if hasattr(a, "v_norm") else value
        _, key = apply_rotary_pos_emb(key.unsqueeze(0), key.unsqueeze(0), cos, sin, unsqueeze_dim=2)
        return key.squeeze(0), value

    @torch.inference_mode()
    def append_context(self, taps: Tensor, positions: list[int], slots: list[int], store: Store) -> None:
        """Write every layer's context keys and values of ``taps`` [T, taps·H] at ``positions`` to ``slots``."""
        assert isinstance(store, KVStore)
        self.write_context(taps, int_tensor(positions, taps.device), int_tensor(slots, taps.device), store)

    @torch.inference_mode()
    def write_context(self, taps: Tensor, positions: Tensor, slots: Tensor, store: KVStore) -> None:
        """`append_context` with positions [T] and slots [T] that are on the device already."""
        features = self.context_features(taps)
        cos, sin = self.rope(positions)
        for layer in range(len(self.layers)):
            store.write(layer, slots, *self.context_kv(layer, features, cos, sin))

    # --- the block -----------------------------------------------------------------------------------------

    def block_hidden(self, block_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Backbone over block tokens [T] at positions [T] → hidden [T, H], after the final norm."""
        hidden: Tensor = self.target.embed_tokens(block_ids).unsqueeze(0).to(self._dtype)
        rope = self.rope(positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rope, attention_mask=None, attend=attend)
        normed: Tensor = self.norm(hidden).squeeze(0)
        return normed

    @torch.inference_mode()
    def draft_hidden(self, anchors: list[tuple[Extent, int, int]], store: KVStore, slots: int | None = None) -> Tensor:
        """Hidden states of R streams' blocks, [R, g, H].

        Args:
            anchors: each stream's extent, anchor position p and anchor token. The context keys and values of
                positions 0 … p-1 must be in ``store``; the block's own are scratch at p … p+g-1.
            store: this drafter's context keys and values.
            slots: g ≤ γ; None: γ. The slots see each other, so fewer are another block, not the first slots of the
                whole one (docs/decisions/013-shorter-blocks.md).
        """
        gamma, device = slots or self.gamma, self.target.device
        ids: list[int] = []
        positions: list[int] = []
        where: list[int] = []
        segments: list[Segment] = []
        for extent, p, token in anchors:
            seen = min(p, self.context_window or p)
            segments.append(Segment(len(ids), gamma, extent.slot + p - seen, seen))
            ids += [token] + [self.config.mask_token_id] * (gamma - 1)
            positions += range(p, p + gamma)
            where += range(extent.slot + p, extent.slot + p + gamma)
        attend = StoreAttend(store, int_tensor(where, device), segments, causal=False)
        hidden = self.block_hidden(int_tensor(ids, device), int_tensor(positions, device), attend)
        return hidden.view(len(anchors), gamma, -1)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """U = LM head over hidden [..., H] → [..., Vd], soft cap included, before any bias."""
        if not self._head:
            return self.target.logits(hidden)
        return self.target.capped(self._head[0](hidden))

    def quantise_head(self) -> None:
        """Give drafts an LM head of 8 bits (on our GPU kernel); the target's own stays. Inference only, once.

        It is half of what a draft with 4-bit layers reads. What it changes is q, and q is what acceptance gets.
        """
        own = self._head[0] if self._head else self.target.lm_head
        if type(own) is nn.Linear and own.in_features % GROUP == 0:
            self._head = (WeightOnlyLinear(own, 8),)

    def draft(
        self, anchors: list[tuple[Extent, int, int]], store: Store, slots: int, draws: Sequence[Draw]
    ) -> TorchDrafts:
        """See `Drafter.draft` in protocols.py."""
        assert isinstance(store, KVStore)
        return walk(self, self.draft_hidden(anchors, store, slots), [token for _, _, token in anchors], draws)

    def pack(self) -> None:
        """Lay the weights out for this machine's matrix units. Inference only, once."""
        pack_linears(self)
        self._head = tuple(PackedLinear(h) for h in self._head)

    def to_target_ids(self, draft_tokens: Tensor) -> Tensor:
        """Draft vocabulary indices → target token ids."""
        return draft_tokens if self.draft_ids is None else self.draft_ids[draft_tokens]
