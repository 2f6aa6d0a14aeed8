"""What the drafter learns from: the target's hidden states, computed once and kept on disk.

For each sequence of n tokens with a answer tokens: the taps of every position, and for the a rows that predict answer
tokens (positions n-a-1 … n-2) the final hidden state, whose product with the LM head is the target's logits, and the
log-sum-exp of the logits over the whole vocabulary. So p_t over any part of the vocabulary is one small product away,
and the target itself is not needed again. H hidden size, V target vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.ragged_attention import Segment, ragged_attention
from dspark_stream.errors import ConfigError
from dspark_stream.models.attention import int_tensor
from dspark_stream.models.target import Target
from dspark_stream.progress import SILENT, Progress
from dspark_stream.training.answers import Answer

PASS_TOKENS = 4096
"""Tokens of one target pass: large enough that products are bound by arithmetic, small enough for any memory."""
LSE_ROWS = 512
"""Rows whose full-vocabulary logits exist at one time."""


class Features(NamedTuple):
    """One sequence's."""

    taps: Tensor  # [n, taps·H]
    final: Tensor  # [a, H]; row j predicts answer token j
    lse: Tensor  # [a], float32


class SelfAttend:
    """Causal attention of whole sequences to themselves, nothing kept."""

    def __init__(self, lengths: Sequence[int]) -> None:
        starts = [0, *accumulate(lengths)]
        self.segments = [Segment(row, n, row, 0) for row, n in zip(starts, lengths, strict=False)]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See `models.attention.Attend`."""
        return ragged_attention(query, key, value, self.segments, scale=scale, causal=True, window=window)


def compute_features(target: Target, batch: Sequence[Answer]) -> list[Features]:
    """Features of several sequences in one target pass."""
    lengths = [len(a) for a in batch]
    ids = int_tensor([t for a in batch for t in a.ids], target.device)
    positions = torch.cat([torch.arange(n, device=target.device) for n in lengths])
    final, taps = target.forward_with(ids, positions, SelfAttend(lengths))
    out: list[Features] = []
    row = 0
    for answer, n in zip(batch, lengths, strict=True):
        rows = final[row + len(answer.prompt_ids) - 1 : row + n - 1]
        # clones: tensors of inference mode cannot be saved for a backward pass
        out.append(Features(taps[row : row + n].clone(), rows.clone(), logsumexp(target, rows)))
        row += n
    return out


@torch.inference_mode()
def logsumexp(target: Target, final: Tensor) -> Tensor:
    """Log-sum-exp of the target's logits [a] from final hidden states [a, H]; never holds [a, V] at once."""
    parts = [torch.logsumexp(target.logits(rows).float(), -1) for rows in final.split(LSE_ROWS)]
    return torch.cat(parts) if parts else final.new_empty(0, dtype=torch.float32)


class FeatureSource:
    """Features of a fixed list of answers: from disk for the first ones, within a budget, the rest computed anew.

    Args:
        folder: where the files lie; made if missing. A folder left by a killed run is taken up where it stopped.
        target: the frozen target with its taps set.
        answers: the sequences, in an order that never changes.
        budget: bytes that may be used on disk; 0 for none.
        fingerprint: of the target's weights.
    """

    def __init__(
        self, folder: Path, target: Target, answers: Sequence[Answer], *, budget: int, fingerprint: str
    ) -> None:
        self.folder, self.target, self.answers = folder, target, answers
        self._row = [0, *accumulate(len(a) for a in answers)]
        self._answer_row = [0, *accumulate(len(a.answer_ids) for a in answers)]
        self._tap_width = len(target.tap_layers) * target.hidden_size
        h = target.hidden_size
        sizes = [2 * (t * self._tap_width + a * h) + 4 * a for t, a in zip(self._row, self._answer_row, strict=True)]
        self.cached = sum(size <= budget for size in sizes[1:])
        """How many sequences, from the first, are kept on disk."""
        self.nbytes = sizes[self.cached]
        self._done = 0
        self._key = self._digest(fingerprint)
        self._maps: tuple[Tensor, Tensor, Tensor] | None = None

    def _digest(self, fingerprint: str) -> str:
        digest = hashlib.sha256(json.dumps([fingerprint, self.target.tap_layers, self.cached]).encode())
        for answer in self.answers[: self.cached]:
            digest.update(repr((answer.prompt_ids, answer.answer_ids)).encode())
        return digest.hexdigest()

    def _open(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three files, mapped: taps [N, taps·H], final [M, H], lse [M].

        Raises:
            ConfigError: the disk has no room for them.
        """
        rows, answer_rows, h = self._row[self.cached], self._answer_row[self.cached], self.target.hidden_size
        maps: list[Tensor] = []
        for name, count, dtype in (
            ("taps", rows * self._tap_width, torch.bfloat16),
            ("final", answer_rows * h, torch.bfloat16),
            ("lse", answer_rows, torch.float32),
        ):
            path = self.folder / f"{name}.bin"
            size = count * dtype.itemsize
            try:
                with path.open("r+b" if path.exists() else "w+b") as file:
                    if os.fstat(file.fileno()).st_size != size:
                        file.truncate(size)
                    # now, not in the middle of a mapped write, where a full disk kills the process without a word
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                free = shutil.disk_usage(self.folder).free
                raise ConfigError(
                    f"no room for {size / 2**30:.1f} GiB of features at {path} ({free / 2**30:.1f} GiB free): "
                    f"{error}; give a smaller --feature-budget (0 computes them on the fly)",
                    param="feature_budget",
                ) from error
            maps.append(torch.from_file(str(path), shared=True, size=count, dtype=dtype))
        return maps[0].view(rows, -1), maps[1].view(answer_rows, h), maps[2]

    def prepare(self, progress: Progress = SILENT) -> None:
        """Compute what is to be on disk and not there yet.

        Raises:
            ConfigError: the disk has no room.
        """
        if not self.cached:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "done.json"
        self._done = self._marked(mark)
        self._maps = self._open()
        left = self._row[self.cached] - self._row[self._done]
        with progress.bar("features", left, "token") as bar:
            while self._done < self.cached:
                batch = self._next_batch()
                computed = compute_features(self.target, [self.answers[i] for i in batch])
                for i, features in zip(batch, computed, strict=True):
                    self._write(i, features)
                self._done = batch.stop
                # mapped pages reach the disk in the kernel's own time: enough after a kill, which this is for
                replace_text(mark, json.dumps({"key": self._key, "sequences": self._done}))
                bar.advance(self._row[batch.stop] - self._row[batch.start])

    def _marked(self, mark: Path) -> int:
        """How many sequences an earlier run left here; 0 where it was another run's, or cannot be told."""
        try:
            said = json.loads(mark.read_text())
            return int(said["sequences"]) if said["key"] == self._key else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _next_batch(self) -> range:
        stop = self._done + 1
        while stop < self.cached and self._row[stop + 1] - self._row[self._done] <= PASS_TOKENS:
            stop += 1
        return range(self._done, stop)

    def _write(self, i: int, features: Features) -> None:
        assert self._maps is not None
        taps, final, lse = self._maps
        taps[self._row[i] : self._row[i + 1]] = features.taps
        where = slice(self._answer_row[i], self._answer_row[i + 1])
        final[where], lse[where] = features.final, features.lse

    def get(self, indices: Sequence[int]) -> list[Features]:
        """Features of the sequences at ``indices``, on the target's device."""
        missing = [i for i in indices if i >= self._done]
        computed = dict(zip(missing, self._compute(missing), strict=True))
        return [computed[i] if i in computed else self._read(i) for i in indices]

    def _compute(self, indices: list[int]) -> list[Features]:
        out: list[Features] = []
        while len(out) < len(indices):
            batch = [indices[len(out)]]
            while len(out) + len(batch) < len(indices):
                following = indices[len(out) + len(batch)]
                if sum(len(self.answers[i]) for i in (*batch, following)) > PASS_TOKENS:
                    break
                batch.append(following)
            out += compute_features(self.target, [self.answers[i] for i in batch])
        return out

    def _read(self, i: int) -> Features:
        assert self._maps is not None
        taps, final, lse = self._maps
        where = slice(self._answer_row[i], self._answer_row[i + 1])
        rows = slice(self._row[i], self._row[i + 1])
        device, dtype = self.target.device, self.target.dtype
        return Features(taps[rows].to(device, dtype), final[where].to(device, dtype), lse[where].to(device))


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the new one, never half of one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
