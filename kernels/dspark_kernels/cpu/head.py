"""A drafter's sequential and confidence head, and the walk through a block's slots."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_kernels.cpu.binding import Context, Doubles, Floats, Halves, Ints, Longs, must, ptr
from dspark_kernels.cpu.matrix import GROUP, PackedMatrix
from dspark_kernels.cpu.sampling import EditList, Weights, check_noise, check_sampling
from dspark_kernels.cpu.store import LANES
from dspark_kernels.edits import Edits

LARGEST_RANK = 4096
"""Of a sequential head."""


class Walked(NamedTuple):
    """What a walk through R blocks of γ slots drafted."""

    tokens: Ints  # [R, γ], target ids; -1: that slot has none, and those behind it are worth nothing
    indices: Ints  # [R, γ], draft vocabulary
    logits: Floats  # [R, γ], of confidence; 0 without a confidence head
    weights: Weights | None
    """Where anybody sampled: R·γ rows that sampled tokens were drawn from; others' rows hold scores."""


class _Heads(ctypes.Structure):
    """`Heads` of csrc/api.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w2", "w1", "confidence", "draft_ids")),
        *((name, ctypes.c_int32) for name in ("rank", "vocabulary", "hidden_size", "with_markov", "w1_of_drafts")),
        ("confidence_bias", ctypes.c_float),
    )


class Head:
    """A drafter's sequential and confidence head: rank r, hidden size H, draft vocabulary Vd.

    Args:
        w1: [V, r], or [Vd, r]: then other tokens' rows are zeros; None without a sequential head.
        w2: [Vd, r].
        confidence: [H] or [H + r]; None without a confidence head.
        draft_ids: [Vd], ascending; None: all of the target's.

    Raises:
        ValueError: sizes that the kernels cannot do, or that do not fit each other.
    """

    def __init__(
        self,
        w1: Halves | None,
        w2: PackedMatrix | None,
        confidence: Floats | None,
        confidence_bias: float,
        draft_ids: Ints | None,
        *,
        vocabulary: int,
        hidden_size: int,
    ) -> None:
        rank = 0 if w1 is None else w1.shape[1]
        must(hidden_size % LANES == 0 and rank % GROUP == 0 and rank <= LARGEST_RANK, f"sizes {hidden_size}, {rank}")
        must(draft_ids is None or len(draft_ids) == vocabulary, f"not {vocabulary} draft ids")
        if w2 is not None:
            must((w2.outputs, w2.inputs) == (vocabulary, rank), "W2 of another size")
        with_markov = confidence is not None and len(confidence) > hidden_size
        if confidence is not None:
            must(len(confidence) == hidden_size + rank * with_markov, "confidence weights of another size")
        for name, array, dtype in (
            ("W1", w1, np.float16),
            ("confidence weights", confidence, np.float32),
            ("draft ids", draft_ids, np.int32),
        ):
            must(array is None or (array.dtype == dtype and array.flags.c_contiguous), f"{name} of another type")
        self.w1_of_drafts = w1 is not None and draft_ids is not None and len(w1) == vocabulary
        largest = vocabulary - 1 if draft_ids is None or self.w1_of_drafts else int(draft_ids[-1])
        must(w1 is None or largest < len(w1), "W1 of a smaller vocabulary")
        self.w1, self.w2, self.confidence, self.draft_ids = w1, w2, confidence, draft_ids
        self.vocabulary, self.hidden_size = vocabulary, hidden_size
        self._struct = _Heads(
            None if w2 is None else w2.handle,
            *map(ptr, (w1, confidence, draft_ids)),
            *(rank, vocabulary, hidden_size, with_markov, self.w1_of_drafts),
            confidence_bias,
        )
        self.address = ctypes.addressof(self._struct)

    def walk(
        self,
        context: Context,
        base: Floats,
        hidden: Floats,
        anchors: Ints,
        sampling: Floats | None = None,
        uniforms: Doubles | None = None,
        noise: Longs | None = None,
        edits: Sequence[Edits | None] | None = None,
    ) -> Walked:
        """Drafts of R streams, slot after slot.

        Args:
            base: logits before any bias [R, γ, Vd]; written over where a stream samples or is edited.
            hidden: [R, γ, H].
            anchors: [R].
            sampling: `sampling_rows` [R, 4], temperature 0 for greedy drafts; None: all are.
            uniforms: [R, γ] in [0, 1), for those that sample.
            noise: `noise_rows` [R, 2] at the first slot's position: who has one races instead, under the noise of the
                target's tokens. None: nobody.
            edits: [R], over the draft vocabulary, None for streams without; None: nobody has any.
        """
        streams, gamma, vocabulary = base.shape
        must(vocabulary == self.vocabulary, "another draft vocabulary")
        must(hidden.shape == (streams, gamma, self.hidden_size), "hidden states of other streams")
        must(base.dtype == hidden.dtype == np.float32, "base logits or hidden states that are not float32")
        must(base.flags.c_contiguous and hidden.flags.c_contiguous, "arrays that are not contiguous")
        must(anchors.shape == (streams,), "anchors of other streams")
        if self.w1 is not None and len(anchors) and not self.w1_of_drafts:
            must(0 <= int(anchors.min()) <= int(anchors.max()) < len(self.w1), "anchors outside the vocabulary")
        out = Drafted(context, self, anchors, gamma, sampling, uniforms, noise, edits)
        library = context.library
        done = library.walk(
            context.handle, self.address, ptr(base), ptr(hidden), streams, gamma, out.anchors, *out.drawn, *out.places
        )
        context.check(done)
        return out.walked(base)


class Drafted:
    """Where R streams' drafts are to be written, and what they are drawn by."""

    def __init__(
        self,
        context: Context,
        head: Head,
        anchors: Ints,
        gamma: int,
        sampling: Floats | None,
        uniforms: Doubles | None,
        noise: Longs | None,
        edits: Sequence[Edits | None] | None,
    ) -> None:
        streams = len(anchors)
        must(
            anchors.dtype == np.int32 and anchors.flags.c_contiguous and anchors.ndim == 1,
            "anchors that are not int32 in a row",
        )
        self._context = context
        self._keep: list[npt.NDArray[Any]] = [anchors]
        self.anchors = ptr(anchors)
        must(edits is None or len(edits) == streams, "edits of other streams")
        self._edits = EditList(edits, head.vocabulary) if edits is not None and any(edits) else None
        at_edits = None if self._edits is None else self._edits.address
        self.drawn: tuple[int | None, ...] = (None, None, None, at_edits)
        """Addresses of sampling, uniforms, noise and edits."""
        self._totals: Doubles | None = None
        if sampling is not None and (sampling[:, 0] > 0).any():
            check_sampling(sampling, streams)
            must(uniforms is not None and uniforms.shape == (streams, gamma), "uniforms of other streams")
            must(uniforms is not None and uniforms.dtype == np.float64 and uniforms.flags.c_contiguous, "uniforms")
            assert uniforms is not None
            self._keep += [sampling, uniforms]
            if noise is not None:
                check_noise(noise, streams)
                self._keep.append(noise)
            self.drawn = ptr(sampling), ptr(uniforms), ptr(noise), at_edits
            self._totals = np.ones(streams * gamma)
        # tokens, indices and confidence logits of four bytes each lie together: one address to ask for
        self._out = np.zeros((3, streams, gamma), dtype=np.int32)
        size, first = self._out.nbytes // 3, self._out.ctypes.data
        self.places = (
            first,
            first + size,
            ptr(self._totals),
            first + 2 * size if head.confidence is not None else None,
        )
        """Addresses of tokens, indices, totals and logits."""

    def walked(self, base: Floats) -> Walked:
        """What has come of it; ``base`` [R, γ, Vd]."""
        weights = None
        if self._totals is not None:
            weights = Weights(self._context, base.reshape(len(self._totals), -1), self._totals)
        tokens, indices, logits = self._out
        return Walked(tokens, indices, logits.view(np.float32), weights)
