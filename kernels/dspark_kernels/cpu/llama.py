"""Decoder layers: whole passes of a target, blocks of a drafter.

Arrays are numpy, C-contiguous. Symbols: T rows of all streams, H hidden size, D head size, Hq and Hk query and key
heads, N token slots.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_kernels.cpu.binding import Context, Doubles, Floats, Ints, Longs, Room, Rooms, floats, must, ptr
from dspark_kernels.cpu.head import Drafted, Head, Walked
from dspark_kernels.cpu.matrix import GROUP, PackedMatrix, Table
from dspark_kernels.cpu.store import Place, Store
from dspark_kernels.edits import Edits


class LayerWeights(NamedTuple):
    """One layer's; None, or 0, where there is none."""

    q: PackedMatrix  # [Hq·D, H]
    k: PackedMatrix  # [Hk·D, H]
    v: PackedMatrix  # [Hk·D, H]
    o: PackedMatrix  # [H, Hq·D]
    gate: PackedMatrix  # [inner, H]
    up: PackedMatrix  # [inner, H]
    down: PackedMatrix  # [H, inner]
    input_norm: npt.NDArray[Any]  # [H]
    post_norm: npt.NDArray[Any]  # [H], before the MLP
    q_norm: npt.NDArray[Any] | None = None  # [D]
    k_norm: npt.NDArray[Any] | None = None  # [D]
    bias: npt.NDArray[Any] | None = None  # [(Hq + 2·Hk)·D], of q, k and v
    after_attention: npt.NDArray[Any] | None = None  # [H], a norm of what attention adds
    after_mlp: npt.NDArray[Any] | None = None  # [H], likewise
    window: int = 0
    """Positions that a row sees at most, itself among them."""
    rope: int = 0
    """Which of the model's rotary embeddings."""


class Pass(NamedTuple):
    """Where T rows stand. Row r sees positions ``begin[r]`` … ``visible[r] - 1`` of its stream, whose first lies at
    slot ``first_slot[r]`` (a multiple of 16). ``begin`` None: 0 for all."""

    position: Ints
    slot: Ints
    first_slot: Ints
    visible: Ints
    begin: Ints | None = None


class Rope(NamedTuple):
    """A rotary embedding."""

    frequencies: Doubles  # radians a position [D/2]
    amplitude: float = 1.0
    """Of cosine and sine."""


class Llama:
    """Decoder layers and final norm.

    Args:
        ropes: rotary embeddings; layers say which is theirs.
        positions: how many there are.
        score_scale: of query · key; None: 1/√D.
        gelu: the gate's activation is GELU by tanh, else SiLU.

    Raises:
        ValueError: sizes that the kernels cannot do (they work in groups of 32 and lanes of 16), or weights that do
            not fit them.
    """

    def __init__(
        self,
        context: Context,
        *,
        heads: int,
        kv_heads: int,
        eps: float,
        final_norm: npt.NDArray[Any],
        ropes: Sequence[Rope],
        positions: int,
        layers: Sequence[LayerWeights],
        score_scale: float | None = None,
        gelu: bool = False,
    ) -> None:
        if not layers or not ropes:
            raise ValueError("no layers, or no rotary embedding")
        first = layers[0]
        self.context, self.hidden, self.num_layers = context, first.q.inputs, len(layers)
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, first.q.outputs // heads
        self.inner, self.positions = first.gate.outputs, positions
        d, h = self.head_size, self.hidden
        if d % 32 or d > 256 or h % GROUP or self.inner % GROUP or heads % kv_heads:
            raise ValueError(f"heads of {d}, hidden size {h}, inner size {self.inner} are not for these kernels")
        final = floats(final_norm, h)
        if any(rope.frequencies.shape != (d // 2,) for rope in ropes):
            raise ValueError(f"rotary frequencies of {[rope.frequencies.shape for rope in ropes]} for heads of {d}")
        frequencies = np.ascontiguousarray([rope.frequencies for rope in ropes], dtype=np.float64)
        amplitudes = np.array([rope.amplitude for rope in ropes], dtype=np.float32)
        library = context.library
        self.handle = library.llama(
            *(h, heads, kv_heads, d, self.inner, self.positions, eps, score_scale or d**-0.5, gelu),
            *(ptr(final), ptr(frequencies), ptr(amplitudes), len(ropes)),
        )
        context.own(self, "llama", self.handle)
        self.nbytes = 0
        """Memory that the layers' matrices take."""
        for layer in layers:
            if not 0 <= layer.rope < len(ropes) or layer.window < 0:
                raise ValueError(f"rotary embedding {layer.rope} or window {layer.window}")
            self._add(layer)

    def _add(self, layer: LayerWeights) -> None:
        h, q, kv, d = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size, self.head_size
        shapes = {
            "q": (q, h),
            "k": (kv, h),
            "v": (kv, h),
            "o": (h, q),
            "gate": (self.inner, h),
            "up": (self.inner, h),
            "down": (h, self.inner),
        }
        for name, shape in shapes.items():
            matrix: PackedMatrix = getattr(layer, name)
            if (matrix.outputs, matrix.inputs) != shape:
                raise ValueError(f"{name} is {matrix.outputs} x {matrix.inputs}, expected {shape[0]} x {shape[1]}")
        sizes = {"q_norm": d, "k_norm": d, "bias": q + 2 * kv, "after_attention": h, "after_mlp": h}
        vectors: list[Floats | None] = [floats(layer.input_norm, h), floats(layer.post_norm, h)]
        for name, size in sizes.items():
            vector = getattr(layer, name)
            vectors.append(None if vector is None else floats(vector, size))
        self.nbytes += sum(getattr(layer, name).nbytes for name in shapes)
        matrices = (ctypes.c_void_p * len(shapes))(*(getattr(layer, name).give() for name in shapes))
        places = (ctypes.c_void_p * len(vectors))(*map(ptr, vectors))
        self.context.check(self.context.library.add_layer(self.handle, matrices, places, layer.window, layer.rope))

    def forward(self, x: Floats, where: Pass, store: Store, tap_layers: Ints, taps: Floats) -> None:
        """x [T, H] becomes the final hidden states, in place; taps [T, taps·H] those of ``tap_layers``, ascending."""
        self._check(x, where, store)
        must(taps.shape == (len(x), len(tap_layers) * self.hidden) and tap_layers.dtype == np.int32, "taps")
        must(taps.dtype == np.float32 and taps.flags.c_contiguous, "taps of another type")
        done = self.context.library.forward(
            self.context.handle,
            self.handle,
            len(x),
            ptr(x),
            *map(ptr, where),
            *store.place.addresses,
            ptr(tap_layers),
            len(tap_layers),
            ptr(taps),
        )
        self.context.check(done)

    def run(
        self,
        embedding: Table,
        lm_head: PackedMatrix,
        where: Sequence[int],
        ids: Sequence[int],
        place: Place,
        tap_layers: Ints,
        taps: Room | Rooms,
        wanted: Sequence[int] | None = None,
        logits: Room | None = None,
        embedding_scale: float = 1.0,
    ) -> tuple[Floats, Floats | Ints]:
        """A whole pass in one call, in which every row sees what comes before it in its stream, and itself.

        Args:
            where: of R streams, one after the other: first slot, position of its first row, its rows.
            ids: tokens of all rows [T].
            place: `Store.place`.
            tap_layers: -1 is the embedding.
            taps: where tapped states go.
            wanted: rows whose logits are wanted [n]; None: all.
            logits: where they go; None: only the best token of each wanted row is.

        Returns:
            Taps [T, taps·H], and logits [n, V] or best tokens [n].

        Raises:
            ValueError: tokens, positions or slots that are not there.
        """
        rows, streams = len(ids), len(where) // 3
        self._check_sizes(place, embedding.inputs, lm_head.inputs)
        must(tap_layers.dtype == np.int32 and tap_layers.flags.c_contiguous, "tap layers that are not int32")
        count = rows if wanted is None else len(wanted)
        words = np.array([*where, *ids, *(wanted or ()), *[0] * count], dtype=np.int32)  # the last: for the best
        must(sum(where[2::3]) == rows, "ids of other rows")
        at = words.ctypes.data
        at_ids = at + 12 * streams
        at_wanted = at_ids + 4 * rows
        tapped = taps.get(rows, len(tap_layers) * self.hidden)
        scores = None if logits is None else logits.get(count, lm_head.outputs)
        done = self.context.library.run(
            self.context.handle,
            self.handle,
            embedding.handle,
            embedding_scale,
            lm_head.handle,
            streams,
            at,
            at_ids,
            *place.addresses,
            tap_layers.ctypes.data if len(tap_layers) else None,
            len(tap_layers),
            taps.address,
            None if wanted is None else at_wanted,
            count,
            None if logits is None else logits.address,
            at_wanted + (0 if wanted is None else 4 * count) if logits is None else None,
        )
        self.context.check(done)
        best: Ints = words[len(words) - count :]
        return tapped, best if scores is None else scores

    def draft(
        self,
        embedding: Table,
        lm_head: PackedMatrix,
        head: Head,
        mask: int,
        gamma: int,
        where: Sequence[int],
        anchors: Sequence[int],
        place: Place,
        base: Room,
        sampling: Floats | None = None,
        uniforms: Doubles | None = None,
        noise: Longs | None = None,
        embedding_scale: float = 1.0,
        window: int = 0,
        edits: Sequence[Edits | None] | None = None,
    ) -> Walked:
        """Blocks of γ drafts for R streams in one call: anchor and masks through layers, LM head and `Head.walk`.

        Args:
            mask: the token of all slots but the first.
            where: of R streams, one after the other: first slot, the anchor's position, γ.
            anchors: [R].
            place: `Store.place`.
            base: where base logits go; `Walked.weights` are a view of it, good until it is next written to.
            sampling: see `Head.walk`; ``uniforms``, ``noise`` and ``edits`` likewise.
            window: positions before the anchor that a block sees; 0: all.

        Raises:
            ValueError: tokens, positions or slots that are not there.
        """
        self._check_sizes(place, embedding.inputs, lm_head.inputs)
        must(gamma > 0, "blocks without slots")
        must(len(where) == 3 * len(anchors) and all(rows == gamma for rows in where[2::3]), "blocks of other streams")
        must(head.w1 is None or head.w1_of_drafts or len(head.w1) >= embedding.outputs, "W1 of a smaller vocabulary")
        must(lm_head.outputs == head.vocabulary and head.hidden_size == self.hidden, "heads of another drafter")
        streams = len(anchors)
        words = np.array([*anchors, *where], dtype=np.int32)
        out = Drafted(self.context, head, words[:streams], gamma, sampling, uniforms, noise, edits)
        scores = base.get(streams, gamma, lm_head.outputs)
        done = self.context.library.draft(
            self.context.handle,
            self.handle,
            embedding.handle,
            embedding_scale,
            lm_head.handle,
            head.address,
            mask,
            streams,
            gamma,
            (out.anchors or 0) + 4 * streams,
            window,
            out.anchors,
            *place.addresses,
            base.address,
            *out.drawn,
            *out.places,
        )
        self.context.check(done)
        return out.walked(scores)

    def append_context(
        self,
        fc: PackedMatrix,
        norm: Floats,
        taps: Floats,
        positions: Sequence[int],
        slots: Sequence[int],
        place: Place,
    ) -> None:
        """Keys and values of context features, every layer, at ``slots`` [T], from taps [T, fc.inputs].

        Args:
            place: `Store.place`.

        Raises:
            ValueError: positions or slots that are not there.
        """
        taps = floats(taps, len(taps), fc.inputs)
        self._check_sizes(place, fc.outputs)
        must(len(positions) == len(slots) == len(taps), "positions or slots of other rows")
        must(norm.dtype == np.float32 and norm.shape == (self.hidden,), "norm")
        words = np.array([*positions, *slots], dtype=np.int32)
        at = words.ctypes.data
        done = self.context.library.append_context(
            self.context.handle,
            self.handle,
            fc.handle,
            ptr(norm),
            len(taps),
            ptr(taps),
            at,
            at + 4 * len(taps),
            *place.addresses,
        )
        self.context.check(done)

    def _check(self, x: Floats, where: Pass, store: Store) -> None:
        must(x.dtype == np.float32 and x.shape[1:] == (self.hidden,) and x.flags.c_contiguous, "rows")
        for name, array in where._asdict().items():
            if array is None and name == "begin":
                continue
            must(array.dtype == np.int32 and array.shape == (len(x),) and array.flags.c_contiguous, name)
        self._check_sizes(store.place)

    def _check_sizes(self, place: Place, *widths: int) -> None:
        """A store of this model, and matrices of its width."""
        must(place.shape == (self.num_layers, self.kv_heads, self.head_size), "a store of another model")
        must(all(width == self.hidden for width in widths), f"matrices that are not of width {self.hidden}")
