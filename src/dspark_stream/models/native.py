"""Targets and drafters on the integer kernels (kernels/dspark_kernels/cpu): Llama-like models on a CPU.

native_loading.py packs targets. Greedy text is the same, token for token, alone and in company, plain and speculated: a
row's result does not depend on the other rows of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_kernels.cpu import Context, Head, Llama, PackedMatrix, Pass, Room, Source, Weights
from dspark_kernels.cpu.library import GROUP, LANES, LARGEST_RANK, LayerWeights, Store
from dspark_stream.errors import ModelLoadError
from dspark_stream.models.cache import Extent, KVShape, KVStore
from dspark_stream.models.distributions import NativeDistributions, Walk
from dspark_stream.models.drafter import Drafter, DrafterConfig
from dspark_stream.models.geometry import Geometry, UnsupportedError
from dspark_stream.models.target import Rows, Target, TargetOutput

PAST_THE_END = 64
"""Positions past the longest text for which rotary tables are made: drafts may go on past its end."""
DRAFT_BITS = 4
"""Of a drafter's layers, unless `draft_quant` says otherwise (docs/decisions/014)."""
W2_BITS = 8
"""Of the sequential head's W2: the kernels take no others."""


class NativeStore(KVStore):
    """Keys and values of two bytes in the kernels' layout."""

    def __init__(self, shapes: Sequence[KVShape], slots: int) -> None:
        self.arrays = Store.zeros(len(shapes), slots, shapes[0].heads, shapes[0].key_dim)
        self.place = self.arrays.place

    def clear(self, extent: Extent) -> None:
        """See `KVStore.clear`."""
        self.arrays.clear(extent.slot, extent.size)


class NativeTarget(Target):
    """A Llama-like target. Logits and taps are float32 and valid until the next pass.

    Args:
        llama: its layers.
        embedding: [V, H].
        lm_head: [V, H]; the embedding where they are tied.
    """

    def __init__(
        self,
        llama: Llama,
        embedding: PackedMatrix,
        lm_head: PackedMatrix,
        *,
        family: str,
        max_positions: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.llama, self.embedding, self.head = llama, embedding, lm_head
        self.config = SimpleNamespace(model_type=family)
        self.eos_token_ids = eos_token_ids
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.vocab_size, self.hidden_size, self.num_layers = embedding.outputs, llama.hidden, llama.num_layers
        self.max_positions, self.softcap = max_positions, None
        self.tap_layers: tuple[int, ...] = ()
        self.kv_shapes = [KVShape(llama.kv_heads, llama.head_size, llama.head_size)] * llama.num_layers
        self._tap_room, self._logit_room = Room(), Room()
        self._own_layers = np.empty(0, dtype=np.int32)
        self._no_logits = torch.empty(0, self.vocab_size)

    def set_taps(self, tap_layers: tuple[int, ...]) -> None:
        """See `Target.set_taps`."""
        for layer in tap_layers:
            if not -1 <= layer < self.num_layers - 1:
                raise ModelLoadError(
                    f"target_layer_ids names layer {layer}; this target allows -1 … {self.num_layers - 2}",
                    param="target_layer_ids",
                )
        self.tap_layers, self._own_layers = tap_layers, np.array(tap_layers, dtype=np.int32)

    @property
    def kv_dtype(self) -> torch.dtype:
        """See `Target.kv_dtype`."""
        return torch.bfloat16 if self.llama.context.kv_bfloat else torch.float16

    def make_store(self, slots: int) -> KVStore:
        """See `Target.make_store`."""
        return NativeStore(self.kv_shapes, slots)

    def head_rows(self, ids: Tensor) -> Tensor:
        """See `Target.head_rows`."""
        return torch.from_numpy(self.head.rows(ids.cpu().numpy().astype(np.int32)))

    def pack(self, bits: int | None = None) -> None:
        """Nothing is left to do."""

    def forward(
        self, batch: list[Rows], store: KVStore, logit_rows: list[int] | None = None, *, greedy: bool = False
    ) -> TargetOutput:
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
            self._tap_room,
            logit_rows,
            None if greedy else self._logit_room,
        )
        if greedy:
            return TargetOutput(self._no_logits, torch.from_numpy(taps), out.tolist())
        return TargetOutput(torch.from_numpy(out), torch.from_numpy(taps), weigh=self._weigh)

    def _weigh(self, logits: Tensor, temperatures: Sequence[float]) -> NativeDistributions:
        return NativeDistributions(Weights.of(self.llama.context, logits.numpy(), temperatures))


class _PackedLinear(torch.nn.Module):
    """A product with a packed matrix, for torch's side of a drafter."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).numpy()
        return torch.from_numpy(self.matrix.product(flat)).view(*x.shape[:-1], -1)


class _HalfEmbedding(torch.nn.Module):
    """Rows of a half-precision table, in full precision."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()


class _Weight(torch.nn.Module):
    """A norm's weight, to be loaded and packed."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size))


class _Attention(torch.nn.Module):
    """A layer's attention weights under their names in a checkpoint."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        queries, keys = g.heads * g.head_size, g.kv_heads * g.head_size
        self.q_proj = torch.nn.Linear(g.hidden_size, queries, bias=False)
        self.k_proj, self.v_proj = (torch.nn.Linear(g.hidden_size, keys, bias=False) for _ in range(2))
        self.o_proj = torch.nn.Linear(queries, g.hidden_size, bias=False)
        if g.model_type == "qwen3":
            self.q_norm, self.k_norm = _Weight(g.head_size), _Weight(g.head_size)


class _Mlp(torch.nn.Module):
    """A layer's MLP weights, likewise."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(g.hidden_size, g.inner, bias=False) for _ in range(2))
        self.down_proj = torch.nn.Linear(g.inner, g.hidden_size, bias=False)


class _Layer(torch.nn.Module):
    """A layer's weights, likewise."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(g), _Mlp(g)
        self.input_layernorm, self.post_attention_layernorm = _Weight(g.hidden_size), _Weight(g.hidden_size)


class NativeDrafter(Drafter):
    """A drafter whose backbone, context and LM head run on the kernels; gated and RNN heads stay with torch."""

    def __init__(self, config: DrafterConfig, target: Target, draft_ids: Tensor | None = None) -> None:
        assert isinstance(target, NativeTarget)
        super().__init__(config, target, draft_ids)
        self._native: tuple[Llama, PackedMatrix, PackedMatrix] | None = None
        self._walk: Head | None = None
        self._hidden_norm = np.empty(0, dtype=np.float32)
        self._logit_room = Room()

    def _make_backbone(self, hidden_size: int) -> None:
        g = self._geometry
        self.hidden_norm, self.norm = _Weight(hidden_size), _Weight(hidden_size)
        self.layers = torch.nn.ModuleList(_Layer(g) for _ in range(self.config.num_layers))
        self._shapes = [KVShape(g.kv_heads, g.head_size, g.head_size)] * self.config.num_layers

    @property
    def _geometry(self) -> Geometry:
        assert isinstance(self.config.backbone, Geometry)
        return self.config.backbone

    @property
    def kv_shapes(self) -> list[KVShape]:
        """See `Drafter.kv_shapes`."""
        return self._shapes

    def make_store(self, slots: int) -> KVStore:
        """See `Drafter.make_store`."""
        return NativeStore(self.kv_shapes, slots)

    def pack(self, bits: int | None = None) -> None:
        """Quantise the backbone and let go of its full precision; ``bits`` of its weights, `DRAFT_BITS` unless given.

        Raises:
            UnsupportedError: sizes that the kernels cannot do.
        """
        target = self.target
        assert isinstance(target, NativeTarget)
        context, g = target.llama.context, self._geometry
        cosine, sine = rotary_tables(target.llama.positions, g.head_size, g.rope_base)
        try:
            llama = Llama(
                context,
                heads=g.heads,
                kv_heads=g.kv_heads,
                eps=g.eps,
                final_norm=_array(self.norm.weight),
                cosine=cosine,
                sine=sine,
                layers=[self._layer(context, layer, bits or DRAFT_BITS) for layer in self.layers],
            )
        except ValueError as error:
            raise UnsupportedError(str(error)) from error
        head = target.head if self.draft_ids is None else target.head.take(self.draft_ids.numpy().astype(np.int32))
        self._native = (llama, _pack(context, [self.fc.weight], bits or DRAFT_BITS), head)
        self._walk = self._pack_heads(context, head.outputs)
        self._hidden_norm = _array(self.hidden_norm.weight)
        self.layers, self._head = torch.nn.ModuleList(), ()
        del self.fc

    def _pack_heads(self, context: Context, vocabulary: int) -> Head | None:
        """The walk in one call, for the heads that it knows; of the others only W2 is packed."""
        markov, confidence = self.markov_head, self.confidence_head
        rank = self.config.markov_rank
        if rank % GROUP or rank > LARGEST_RANK or self.target.hidden_size % LANES:
            return None
        w1 = w2 = None
        if markov is not None:
            w2 = _pack(context, [markov.markov_w2.weight], W2_BITS)
            w1 = markov.markov_w1.weight.detach().half()
            markov.markov_w1, markov.markov_w2 = _HalfEmbedding(w1), _PackedLinear(w2)  # type: ignore[assignment]
        if self.config.markov_head_type != "vanilla":
            return None
        ids = self.draft_ids
        return Head(
            None if w1 is None else w1.numpy(),
            w2,
            None if confidence is None else np.ascontiguousarray(_array(confidence.proj.weight)[0]),
            0.0 if confidence is None or confidence.proj.bias is None else float(confidence.proj.bias),
            None if ids is None else ids.numpy().astype(np.int32),
            vocabulary=vocabulary,
            hidden_size=self.target.hidden_size,
        )

    def draft_at_once(
        self,
        anchors: list[tuple[Extent, int, int]],
        store: KVStore,
        slots: int,
        temperatures: Sequence[float],
        uniforms: Sequence[Sequence[float]],
    ) -> Walk | None:
        """See `Drafter.draft_at_once`."""
        if self._walk is None:
            return None
        assert isinstance(store, NativeStore)
        assert isinstance(self.target, NativeTarget)
        assert self._native is not None
        llama, _, head = self._native
        where: list[int] = []
        for extent, p, _ in anchors:
            where += (extent.slot, p, slots)
        walked = llama.draft(
            self.target.embedding,
            head,
            self._walk,
            self.config.mask_token_id,
            slots,
            where,
            [token for _, _, token in anchors],
            store.place,
            self._logit_room,
            temperatures,
            np.array(uniforms, dtype=np.float64) if any(temperatures) else None,
        )
        return Walk(
            walked.tokens.tolist(),
            walked.logits.tolist() if self.confidence_head else None,
            walked,
            self._walk.draft_ids,
        )

    def _layer(self, context: Context, layer: Any, bits: int) -> LayerWeights:
        a, mlp = layer.self_attn, layer.mlp
        return LayerWeights(
            qkv=_pack(context, [a.q_proj.weight, a.k_proj.weight, a.v_proj.weight], bits),
            o=_pack(context, [a.o_proj.weight], bits),
            gate=_pack(context, [mlp.gate_proj.weight], bits),
            up=_pack(context, [mlp.up_proj.weight], bits),
            down=_pack(context, [mlp.down_proj.weight], bits),
            input_norm=_array(layer.input_layernorm.weight),
            post_norm=_array(layer.post_attention_layernorm.weight),
            q_norm=_array(a.q_norm.weight) if hasattr(a, "q_norm") else None,
            k_norm=_array(a.k_norm.weight) if hasattr(a, "k_norm") else None,
        )

    def append_context(self, taps: Tensor, positions: list[int], slots: list[int], store: KVStore) -> None:
        """See `Drafter.append_context`."""
        assert isinstance(store, NativeStore)
        assert self._native is not None
        llama, fc, _ = self._native
        llama.append_context(fc, self._hidden_norm, taps.numpy(), positions, slots, store.place)

    def draft_hidden(self, anchors: list[tuple[Extent, int, int]], store: KVStore, slots: int | None = None) -> Tensor:
        """See `Drafter.draft_hidden`."""
        assert isinstance(store, NativeStore)
        assert self._native is not None
        assert isinstance(self.target, NativeTarget)
        gamma = slots or self.gamma
        masks = [self.config.mask_token_id] * (gamma - 1)
        x = self.target.embedding.rows([token for _, _, anchor in anchors for token in (anchor, *masks)])
        start = np.repeat(np.array([p for _, p, _ in anchors], dtype=np.int32), gamma)
        first_slot = np.repeat(np.array([extent.slot for extent, _, _ in anchors], dtype=np.int32), gamma)
        position = start + np.tile(np.arange(gamma, dtype=np.int32), len(anchors))
        where = Pass(position, first_slot + position, first_slot, start + gamma)
        self._native[0].forward(x, where, store.arrays, np.empty(0, dtype=np.int32), np.empty((len(x), 0), np.float32))
        return torch.from_numpy(x).view(len(anchors), gamma, -1)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """See `Drafter.base_logits`."""
        assert self._native is not None
        head = self._native[2]
        flat = hidden.reshape(-1, hidden.shape[-1]).numpy()
        out = head.product(flat, self._logit_room.get(len(flat), head.outputs))
        return torch.from_numpy(out).view(*hidden.shape[:-1], -1)


def _array(tensor: Any) -> npt.NDArray[np.float32]:
    out: npt.NDArray[np.float32] = tensor.detach().float().numpy()
    return out


def _pack(context: Context, weights: Sequence[Any], bits: int) -> PackedMatrix:
    """Rows of several weights [n, inputs], one after the other."""
    arrays = [_array(w) for w in weights]
    out = PackedMatrix(context, sum(map(len, arrays)), arrays[0].shape[1], bits)
    first = 0
    for array in arrays:
        out.pack(first, len(array), array, Source.F32)
        first += len(array)
    return out


def rotary_tables(positions: int, head_size: int, base: float) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """cos and sin [positions, D/2] of unscaled rotary positions."""
    frequencies = 1.0 / base ** (np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    angles = np.arange(positions, dtype=np.float64)[:, None] * frequencies[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
