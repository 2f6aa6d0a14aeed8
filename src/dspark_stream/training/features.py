"""What the drafter learns from: the target's hidden states, computed once and kept on disk.

Of each sequence of n tokens, the last A of them the answer, these are kept:

- the taps of every position;
- of the A rows that predict answer tokens (positions n-A-1 … n-2): the final hidden state, and the log-sum-exp of the
  logits over the whole vocabulary.

The final hidden state times the LM head gives logits. So p_t over any part of the vocabulary is one small product, and
the target itself is not needed again. H hidden size, V target vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from dspark_kernels.ragged_attention import Segment, ragged_attention
from dspark_stream.console import SILENT, Progress
from dspark_stream.errors import ConfigError
from dspark_stream.files import write_whole
from dspark_stream.models.torch.attention import int_tensor
from dspark_stream.models.torch.target import Target
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
        self._computing = threading.Lock()  # the target keeps the taps of the pass under way
        self._key = self._digest(fingerprint)
        self._files: dict[str, BinaryIO] = {}

    def _digest(self, fingerprint: str) -> str:
        digest = hashlib.sha256(json.dumps([fingerprint, self.target.tap_layers, self.cached]).encode())
        for answer in self.answers[: self.cached]:
            digest.update(repr((answer.prompt_ids, answer.answer_ids)).encode())
        return digest.hexdigest()

    @property
    def _layout(self) -> dict[str, tuple[list[int], int, torch.dtype]]:
        """Of each file: where each sequence's rows begin, the rows' width and type."""
        return {
            "taps": (self._row, self._tap_width, torch.bfloat16),
            "final": (self._answer_row, self.target.hidden_size, torch.bfloat16),
            "lse": (self._answer_row, 1, torch.float32),
        }

    def _open(self) -> None:
        """Open the files, at their full size.

        Raises:
            ConfigError: the disk has no room for them.
        """
        for name, (begin, width, dtype) in self._layout.items():
            path = self.folder / f"{name}.bin"
            size = begin[self.cached] * width * dtype.itemsize
            try:
                file = path.open("r+b" if path.exists() else "w+b", buffering=0)
                self._files[name] = file
                file.truncate(size)
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now, not after an hour's work
            except OSError as error:
                self.close()
                for other in () if self._done else self._files:  # half of them would only take room from a smaller try
                    (self.folder / f"{other}.bin").unlink(missing_ok=True)
                free = shutil.disk_usage(self.folder).free
                raise ConfigError(
                    f"no room for {size / 2**30:.1f} GiB of features at {path} ({free / 2**30:.1f} GiB free): "
                    f"{error}; give a smaller --feature-budget (0 computes them on the fly)",
                    param="feature_budget",
                ) from error

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

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
        if self._done and (short := self._cut_short()):
            progress.say(f"{short} is not as long as it was left: the features are computed anew")
            self._done = 0
        if not self._done:  # the files are about to be written over: what they were is no longer true
            mark.unlink(missing_ok=True)
        self._open()
        left = self._row[self.cached] - self._row[self._done]
        with progress.bar("features", left, "token") as bar:
            while self._done < self.cached:
                batch = self._next_batch()
                computed = compute_features(self.target, [self.answers[i] for i in batch])
                for i, features in zip(batch, computed, strict=True):
                    self._write(i, features)
                self._done = batch.stop
                # what is written reaches the disk in the kernel's own time: enough after a kill, which this is for
                write_whole(mark, json.dumps({"key": self._key, "sequences": self._done}))
                bar.advance(self._row[batch.stop] - self._row[batch.start])

    def _marked(self, mark: Path) -> int:
        """How many sequences an earlier run left here; 0 where it was another run's, or cannot be told."""
        try:
            said = json.loads(mark.read_text())
            return int(said["sequences"]) if said["key"] == self._key else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _cut_short(self) -> Path | None:
        """A file that has not its size, which is all its rows' from the beginning; or is gone."""
        for name, (begin, width, dtype) in self._layout.items():
            path = self.folder / f"{name}.bin"
            if not path.exists() or path.stat().st_size != begin[self.cached] * width * dtype.itemsize:
                return path
        return None

    def _next_batch(self) -> range:
        stop = self._done + 1
        while stop < self.cached and self._row[stop + 1] - self._row[self._done] <= PASS_TOKENS:
            stop += 1
        return range(self._done, stop)

    def _write(self, i: int, features: Features) -> None:
        for (name, (begin, width, dtype)), rows in zip(self._layout.items(), features, strict=True):
            data = as_bytes(rows.to("cpu", dtype).contiguous())
            done, offset = 0, begin[i] * width * dtype.itemsize
            while done < len(data):
                done += os.pwrite(self._files[name].fileno(), data[done:], offset + done)

    def get(self, indices: Sequence[int]) -> list[Features]:
        """Features of the sequences at ``indices``, on the target's device."""
        missing = [i for i in indices if i >= self._done]
        computed = dict(zip(missing, self._compute(missing), strict=True))
        return [computed[i] if i in computed else self._read(i) for i in indices]

    def _compute(self, indices: list[int]) -> list[Features]:
        with self._computing:
            computed = self._compute_alone(indices)
        # rounded as on disk, so that the budget decides no more than last bits
        return [
            f._replace(taps=f.taps.bfloat16().to(f.taps.dtype), final=f.final.bfloat16().to(f.final.dtype))
            for f in computed
        ]

    def _compute_alone(self, indices: list[int]) -> list[Features]:
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
        """Read, not mapped: every epoch would pay for mapping each page anew, several times what the copy costs."""
        taps, final, lse = (self._rows(name, i) for name in self._layout)
        device, dtype = self.target.device, self.target.dtype
        return Features(taps.to(device, dtype), final.to(device, dtype), lse.squeeze(1).to(device))

    def _rows(self, name: str, i: int) -> Tensor:
        begin, width, dtype = self._layout[name]
        rows = torch.empty((begin[i + 1] - begin[i], width), dtype=dtype)
        data = as_bytes(rows)
        done, offset = 0, begin[i] * width * dtype.itemsize
        while done < len(data):
            got = os.preadv(self._files[name].fileno(), [data[done:]], offset + done)
            if not got:
                raise ConfigError(f"{self.folder / name}.bin has been cut short", param="run_dir")
            done += got
        return rows


def as_bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory."""
    raw: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)
