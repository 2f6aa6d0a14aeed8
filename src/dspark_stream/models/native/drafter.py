"""A drafter on the CPU's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_kernels.cpu import (
    GROUP,
    LANES,
    LARGEST_RANK,
    RING_GRAIN,
    Context,
    Head,
    Kind,
    LayerWeights,
    Llama,
    PackedMatrix,
    Pass,
    Room,
    Rope,
    Source,
)
from dspark_stream.models.blocks import Blocks, as_floats
from dspark_stream.models.cache import Extent, KVShape
from dspark_stream.models.drafter_config import DrafterConfig
from dspark_stream.models.geometry import Geometry, UnsupportedError
from dspark_stream.models.native.distributions import NativeDrafts, drawn_by, raced_by
from dspark_stream.models.native.store import NativeStore
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.models.protocols import Drafted, Draw, Store
from dspark_stream.models.torch.heads import make_confidence_head, make_head
from dspark_stream.models.torch.walk import walk
from dspark_stream.types import SamplingParams

PAST_THE_END = 64
"""Positions past the longest text that there are: drafts may go on past its end."""
DRAFT_KIND = Kind.FOUR_M
"""Of a drafter's layers whose checkpoint is not quantised, unless `draft_quant` says otherwise (docs/decisions/014)."""
W2_KIND = Kind.EIGHT
"""Of the sequential head's W2, likewise."""
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)

Matrix = Tensor | Blocks


class NativeDrafter:
    """Backbone, context and LM head on the kernels, and the walk where its head is vanilla or none. See `Drafter`.

    Args:
        config: its backbone is a `Geometry`.
        target: whose embedding and LM head are used.
        tensors: the checkpoint's, by name, as floats or blocks; complete (models/checkpoint.py sees to that).
        draft_ids: the target ids of the draft vocabulary [Vd], ascending; None: all.
        kind: how matrices that come as floats are kept; None: `DRAFT_KIND`.

    Raises:
        UnsupportedError: sizes that the kernels cannot do.
    """

    def __init__(
        self,
        config: DrafterConfig,
        target: NativeTarget,
        tensors: Mapping[str, Matrix],
        draft_ids: Tensor | None = None,
        kind: Kind | None = None,
    ) -> None:
        assert isinstance(config.backbone, Geometry)
        self.config, self.target, self.draft_ids = config, target, draft_ids
        self.gamma, self.context_window = config.block_size, config.context_window
        g, context = config.backbone, target.llama.context
        self.kv_shapes = [KVShape(g.kv_heads, g.head_size, g.head_size)] * config.num_layers
        kind = DRAFT_KIND if kind is None else kind
        rope = Rope(g.rotary.frequencies(g.head_size), g.rotary.amplitude)
        try:
            self._llama = Llama(
                context,
                heads=g.heads,
                kv_heads=g.kv_heads,
                eps=g.eps,
                final_norm=_array(tensors["norm.weight"]) + g.family.norm_offset,
                ropes=[rope],
                positions=target.llama.positions,
                score_scale=g.score_scale,
                gelu=g.family.gelu,
                layers=[_layer(context, g, tensors, f"layers.{i}.", kind) for i in range(config.num_layers)],
            )
        except ValueError as error:
            raise UnsupportedError(str(error)) from error
        self._fc = pack(context, tensors["fc.weight"], kind)
        self._hidden_norm = _array(tensors["hidden_norm.weight"]) + np.float32(g.family.norm_offset)
        ids = None if draft_ids is None else draft_ids.numpy().astype(np.int32)
        self._draft_ids = ids
        self._head = target.head if ids is None else target.head.take(ids)
        w2 = self._packed_w2(context, tensors)
        # copies of what is kept as it came: a view would keep the whole file mapped
        w1 = None if w2 is None else as_floats(tensors["markov_head.markov_w1.weight"]).half().clone()
        self._walk = self._one_call(tensors, w1, w2, ids)
        self._heads = self._slot_by_slot(tensors, w1, w2)
        self._logit_room = Room()

    def seeing(self, window: int) -> NativeDrafter:
        """The same drafter with another context window; weights are shared."""
        other = copy(self)
        other.config, other.context_window = replace(self.config, context_window=window), window
        return other

    @property
    def has_confidence(self) -> bool:
        """See `Drafter.has_confidence`."""
        return self.config.enable_confidence_head

    @property
    def ring(self) -> int:
        """Token slots of a stream's context: what a block sees, and a whole block.

        What is handed over in one piece may be longer: its rows are written in order, and the latest stay.
        """
        if not self.context_window:
            return 0
        window = min(self.context_window, self.target.max_positions)
        return -(-(window + self.gamma + 1) // RING_GRAIN) * RING_GRAIN

    def make_store(self, slots: int) -> NativeStore:
        """See `Drafter.make_store`."""
        return NativeStore(self.kv_shapes, slots, self.ring)

    # --- heads -------------------------------------------------------------------------------------------------

    def _packed_w2(self, context: Context, tensors: Mapping[str, Matrix]) -> PackedMatrix | None:
        rank = self.config.markov_rank
        return pack(context, tensors["markov_head.markov_w2.weight"], W2_KIND) if rank and rank % GROUP == 0 else None

    def _one_call(
        self,
        tensors: Mapping[str, Matrix],
        w1: Tensor | None,
        w2: PackedMatrix | None,
        ids: npt.NDArray[np.int32] | None,
    ) -> Head | None:
        """The walk as one call; None for heads and sizes that it does not know."""
        config, rank = self.config, self.config.markov_rank
        if config.markov_head_type != "vanilla" or rank > LARGEST_RANK or self.target.hidden_size % LANES:
            return None
        if rank and w2 is None:
            return None
        confidence = bias = None
        if config.enable_confidence_head:
            confidence = _array(tensors["confidence_head.proj.weight"])[0].copy()
            bias = tensors.get("confidence_head.proj.bias")
        return Head(
            None if w1 is None else w1.numpy(),
            w2,
            confidence,
            0.0 if bias is None else float(as_floats(bias)),
            ids,
            vocabulary=self._head.outputs,
            hidden_size=self.target.hidden_size,
        )

    def _slot_by_slot(
        self, tensors: Mapping[str, Matrix], w1: Tensor | None, w2: PackedMatrix | None
    ) -> SimpleNamespace:
        """The heads as torch's modules, as `walk` wants them; W1 and W2 are those of the one call."""
        config, hidden = self.config, self.target.hidden_size
        head = make_head(config, self.target.vocab_size, self._head.outputs, hidden, self.draft_ids)
        confidence = make_confidence_head(config, hidden)
        for prefix, module in (("markov_head.", head), ("confidence_head.", confidence)):
            if module is not None:
                if module is head and w1 is not None and w2 is not None:
                    head.markov_w1, head.markov_w2 = _HalfEmbedding(w1), _PackedLinear(w2)  # type: ignore[assignment]
                names = {prefix + name for name, _ in module.named_parameters()}
                own = {n.removeprefix(prefix): as_floats(t).float() for n, t in tensors.items() if n in names}
                module.load_state_dict(own)
                module.eval().requires_grad_(False)
        return SimpleNamespace(
            markov_head=head, confidence_head=confidence, draft_ids=self.draft_ids, base_logits=self.base_logits
        )

    # --- the context -------------------------------------------------------------------------------------------

    def append_context(self, taps: Tensor, positions: list[int], slots: list[int], store: Store) -> None:
        """See `Drafter.append_context`."""
        assert isinstance(store, NativeStore)
        self._llama.append_context(self._fc, self._hidden_norm, taps.numpy(), positions, slots, store.place)

    # --- the block ---------------------------------------------------------------------------------------------

    def draft(self, anchors: list[tuple[Extent, int, int]], store: Store, slots: int, draws: Sequence[Draw]) -> Drafted:
        """See `Drafter.draft`."""
        assert isinstance(store, NativeStore)
        if self._walk is None:
            hidden = self.draft_hidden(anchors, store, slots)
            return walk(self._heads, hidden, [anchor for _, _, anchor in anchors], draws)
        where: list[int] = []
        for extent, p, _ in anchors:
            where += (self._first(extent), p, slots)
        walked = self._llama.draft(
            self.target.embedding,
            self._head,
            self._walk,
            self.config.mask_token_id,
            slots,
            where,
            [anchor for _, _, anchor in anchors],
            store.place,
            self._logit_room,
            *_drawn(draws, slots),
            self.target.embedding_scale,
            self.context_window,
            [None if d.adjustment is None else d.adjustment.draft_edits(self._draft_ids) for d in draws],
        )
        return NativeDrafts(walked, self.has_confidence, self._walk.draft_ids)

    def _first(self, extent: Extent) -> int:
        return extent.context if self.ring else extent.slot

    def draft_hidden(self, anchors: list[tuple[Extent, int, int]], store: NativeStore, slots: int) -> Tensor:
        """Hidden states of R streams' blocks, [R, g, H], after the final norm."""
        masks = [self.config.mask_token_id] * (slots - 1)
        x = self.target.embedding.rows([token for _, _, anchor in anchors for token in (anchor, *masks)])
        x *= np.float32(self.target.embedding_scale)
        each = np.arange(slots, dtype=np.int32)
        start = np.array([p for _, p, _ in anchors], dtype=np.int32)
        first = np.repeat(np.array([self._first(extent) for extent, _, _ in anchors], dtype=np.int32), slots)
        position = np.repeat(start, slots) + np.tile(each, len(anchors))
        begin = np.maximum(0, start - self.context_window) if self.context_window else np.zeros_like(start)
        where = Pass(
            position,
            first + (position % self.ring if self.ring else position),
            first,
            np.repeat(start + np.int32(slots), slots),
            np.repeat(begin, slots),
        )
        self._llama.forward(x, where, store.arrays, np.empty(0, dtype=np.int32), np.empty((len(x), 0), np.float32))
        return torch.from_numpy(x).view(len(anchors), slots, -1)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """U = LM head over hidden [..., H] → [..., Vd], before any bias."""
        flat = hidden.reshape(-1, hidden.shape[-1]).numpy()
        out = self._head.product(flat, self._logit_room.get(len(flat), self._head.outputs))
        return torch.from_numpy(out).view(*hidden.shape[:-1], -1)


def _drawn(
    draws: Sequence[Draw], slots: int
) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.float64] | None, npt.NDArray[np.int64] | None]:
    """Sampling, uniforms and noise of R streams as the kernels take them; None where nobody needs them."""
    if not any(d.uniforms or d.race for d in draws):
        return None, None, None
    sampling = drawn_by([d.sampling if d.uniforms or d.race else GREEDY for d in draws])
    uniforms = np.array([[*d.uniforms[:slots]] or [0.0] * slots for d in draws])
    return sampling, uniforms, raced_by([d.race for d in draws]) if any(d.race for d in draws) else None


class _HalfEmbedding(torch.nn.Module):
    """Rows of W1 as the kernels read them, without a second copy."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens].float()


class _PackedLinear(torch.nn.Module):
    """A product with a packed matrix, for heads that torch walks through."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).numpy()
        return torch.from_numpy(self.matrix.product(flat)).view(*x.shape[:-1], -1)


def _array(tensor: Any) -> npt.NDArray[np.float32]:
    out: npt.NDArray[np.float32] = as_floats(tensor).detach().float().numpy()
    return out


def pack(context: Context, matrix: Matrix, kind: Kind) -> PackedMatrix:
    """A matrix [n, inputs]: blocks as they are, floats rounded to ``kind``.

    Raises:
        UnsupportedError: sizes that the kernels cannot do.
    """
    outputs, inputs = matrix.shape
    try:
        if isinstance(matrix, Blocks):
            own = matrix.source.kind
            out = PackedMatrix(context, outputs, inputs, kind if own is None else own)
            return out.pack(matrix.data.numpy(), matrix.source)
        return PackedMatrix(context, outputs, inputs, kind).pack(_array(matrix), Source.F32)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error


def _layer(context: Context, g: Geometry, tensors: Mapping[str, Matrix], name: str, kind: Kind) -> LayerWeights:
    offset = np.float32(g.family.norm_offset)
    attention, mlp = name + "self_attn.", name + "mlp."

    def matrix(which: str) -> PackedMatrix:
        return pack(context, tensors[f"{which}_proj.weight"], kind)

    def norm(which: str) -> npt.NDArray[np.float32] | None:
        tensor = tensors.get(f"{which}.weight")
        return None if tensor is None else _array(tensor) + offset

    biases = [tensors.get(f"{attention}{part}_proj.bias") for part in "qkv"]
    before_mlp = "pre_feedforward_layernorm" if g.family.sandwich else "post_attention_layernorm"
    input_norm, post_norm = norm(name + "input_layernorm"), norm(name + before_mlp)
    assert input_norm is not None
    assert post_norm is not None
    return LayerWeights(
        q=matrix(f"{attention}q"),
        k=matrix(f"{attention}k"),
        v=matrix(f"{attention}v"),
        o=matrix(f"{attention}o"),
        gate=matrix(f"{mlp}gate"),
        up=matrix(f"{mlp}up"),
        down=matrix(f"{mlp}down"),
        input_norm=input_norm,
        post_norm=post_norm,
        q_norm=norm(attention + "q_norm"),
        k_norm=norm(attention + "k_norm"),
        bias=None if biases[0] is None else np.concatenate([_array(b) for b in biases]),
        after_attention=norm(name + "post_attention_layernorm") if g.family.sandwich else None,
        after_mlp=norm(name + "post_feedforward_layernorm") if g.family.sandwich else None,
    )


def native_shapes(config: DrafterConfig, vocab: int, draft_vocab: int) -> dict[str, tuple[int, ...]]:
    """Tensors that a checkpoint of this config has, and their shapes."""
    g: Geometry = config.backbone
    family, h, heads, kv_heads, size, inner = g.family, g.hidden_size, g.heads, g.kv_heads, g.head_size, g.inner
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if family.sandwich else []
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (h, len(config.target_layer_ids) * h),
        "hidden_norm.weight": (h,),
        "norm.weight": (h,),
    }
    for i in range(config.num_layers):
        at = f"layers.{i}."
        shapes |= {f"{at}{name}.weight": (h,) for name in norms}
        rows = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
        shapes |= {f"{at}self_attn.{part}_proj.weight": (n, h) for part, n in rows.items()}
        if family.qkv_bias:
            shapes |= {f"{at}self_attn.{part}_proj.bias": (n,) for part, n in rows.items()}
        if family.qk_norm:
            shapes |= {f"{at}self_attn.{part}_norm.weight": (size,) for part in "qk"}
        shapes[f"{at}self_attn.o_proj.weight"] = (h, heads * size)
        shapes |= {f"{at}mlp.{part}_proj.weight": (inner, h) for part in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (h, inner)
    return shapes | _head_shapes(config, vocab, draft_vocab)


def _head_shapes(config: DrafterConfig, vocab: int, draft_vocab: int) -> dict[str, tuple[int, ...]]:
    """Those of the sequential and the confidence head."""
    h, r = config.backbone.hidden_size, config.markov_rank
    shapes: dict[str, tuple[int, ...]] = {}
    if r:
        shapes["markov_head.markov_w1.weight"] = (draft_vocab if config.w1_of_drafts else vocab, r)
        shapes["markov_head.markov_w2.weight"] = (draft_vocab, r)
    if config.markov_head_type == "gated":
        shapes |= {"markov_head.gate_proj.weight": (r, h + r), "markov_head.gate_proj.bias": (r,)}
    if config.markov_head_type == "rnn":
        shapes |= {"markov_head.joint_proj.weight": (3 * r, 2 * r + h), "markov_head.joint_proj.bias": (3 * r,)}
    if config.enable_confidence_head:
        shapes["confidence_head.proj.weight"] = (1, h + (r if config.confidence_head_with_markov else 0))
        if config.confidence_bias:
            shapes["confidence_head.proj.bias"] = (1,)
    return shapes
