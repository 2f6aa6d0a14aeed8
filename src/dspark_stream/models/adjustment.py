"""What a stream's logits are changed by, given its prefix: penalties, biases, and stop tokens that may not come yet.

The target's rows and the drafter's walk have the same adjustment, so that acceptance compares the distributions that
tokens are really drawn from. Its order is that of `dspark_kernels.edits`. Temperature, top-k, top-p and min-p come
after it, and greedy takes the best token of what is left.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from dspark_kernels.edits import EDIT, Edits
from dspark_stream.types import SamplingParams


class Adjustment:
    """A stream's own, kept up as tokens are committed: what a round costs does not grow with the answer's length, but
    with the different tokens that penalties are for.

    Args:
        sampling: what was asked for.
        stops: tokens that may not come before ``min_tokens``.
        prompt_ids: what a repetition penalty counts beside the answer.
        vocab: V; ids outside are nothing that could be ruled out.
    """

    def __init__(self, sampling: SamplingParams, stops: Collection[int], prompt_ids: Sequence[int], vocab: int) -> None:
        s = self._sampling = sampling
        self._penalises = s.frequency_penalty != 0.0 or s.presence_penalty != 0.0 or s.repetition_penalty != 1.0
        self._min_tokens, self._generated = s.min_tokens, 0
        self._stops = np.array(sorted(t for t in stops if 0 <= t < vocab), dtype=np.int32)
        self._draft_stops: npt.NDArray[np.int32] | None = None
        bias = dict(s.logit_bias)
        in_prompt = dict.fromkeys(prompt_ids, 0) if s.repetition_penalty != 1.0 else {}
        tokens = [*bias, *(t for t in in_prompt if t not in bias)]
        self._at = {token: i for i, token in enumerate(tokens)}
        self._entries = np.empty(max(64, 2 * len(tokens)), dtype=EDIT)
        self._entries["token"][: len(tokens)] = tokens
        self._entries["bias"][: len(tokens)] = [bias.get(t, 0.0) for t in tokens]
        self._entries["times"][: len(tokens)] = [in_prompt.get(t, -1) for t in tokens]
        self._drafts = np.empty(0, dtype=np.int32)  # the entries' tokens as draft vocabulary indices, -1: not among it

    @property
    def active(self) -> bool:
        """Whether it changes anything from here on."""
        return self._penalises or bool(self._sampling.logit_bias) or self._masked > 0

    @property
    def _masked(self) -> int:
        return max(0, self._min_tokens - self._generated) if len(self._stops) else 0

    def generated(self, tokens: Sequence[int]) -> None:
        """Tokens were committed."""
        self._generated += len(tokens)
        if not self._penalises:
            return
        for token in tokens:
            at = self._at.get(token)
            if at is None:
                at = self._append(token)
            self._entries["times"][at] = max(0, self._entries["times"][at]) + 1

    def _append(self, token: int) -> int:
        at = self._at[token] = len(self._at)
        if at == len(self._entries):
            self._entries = np.concatenate((self._entries, np.empty_like(self._entries)))
        self._entries[at] = token, 0.0, -1
        return at

    def edits(self) -> Edits:
        """Of the next row, over the target's vocabulary. Good until tokens are committed."""
        return self._of(self._entries[: len(self._at)], self._stops)

    def draft_edits(self, draft_ids: npt.NDArray[np.integer] | None) -> Edits:
        """The same over the draft vocabulary, whose target ids ``draft_ids`` [Vd] are, ascending and the same at every
        call; None: it is the target's.
        """
        if draft_ids is None:
            return self.edits()
        if self._draft_stops is None:
            among = _among(draft_ids, self._stops)
            self._draft_stops = among[among >= 0]
        entries = self._entries[: len(self._at)]
        if len(fresh := entries["token"][len(self._drafts) :]):
            self._drafts = np.append(self._drafts, _among(draft_ids, fresh))
        known = self._drafts >= 0
        entries = entries[known]
        entries["token"] = self._drafts[known]
        return self._of(entries, self._draft_stops)

    def _of(self, entries: npt.NDArray[np.void], stops: npt.NDArray[np.int32]) -> Edits:
        s = self._sampling
        return Edits(entries, stops, self._masked, s.frequency_penalty, s.presence_penalty, s.repetition_penalty)


def _among(draft_ids: npt.NDArray[np.integer], tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Where tokens stand in the draft vocabulary; -1: nowhere."""
    at = np.searchsorted(draft_ids, tokens).clip(max=len(draft_ids) - 1)
    return np.where(draft_ids[at] == tokens, at, -1).astype(np.int32)
