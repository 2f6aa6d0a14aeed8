"""One batch's gradients: its sequences dealt to workers, each a thread with a low-precision copy of the drafter.

The master weights and the optimiser stay float32; copies are in the target's precision, as the service will run them.
Each thread has one core, and computes each product on it. Operations of a small drafter are too short to be split: a
split one waits for its slowest part. Two cores gain 1.25 x by splitting, and nearly 2 x this way. Each worker
normalises by its own slots' weight; the shares below make the sum exactly the mean over the whole batch.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_stream.models.torch.drafter import Drafter
from dspark_stream.training.answers import Answer
from dspark_stream.training.blocks import BlockAttend, BlockBatch, make_batch
from dspark_stream.training.features import FeatureSource
from dspark_stream.training.loss import Head, LossParts, Slots, block_loss, slot_weights


class Share(NamedTuple):
    """A worker's loss, and the weight of the slots that it is the mean of."""

    parts: LossParts
    weight: float


class Worker:
    """A copy of the drafter, and the loss of some sequences under it.

    Args:
        master: float32; only read here.
    """

    def __init__(self, master: Drafter) -> None:
        target = master.target
        drafter = Drafter(master.config, target, master.draft_ids)
        self.drafter = drafter.to(device=target.device, dtype=target.dtype).requires_grad_(True)
        self.slot_weights = slot_weights(drafter.gamma).to(target.device)
        self.head = Head(drafter.head_weight, target.softcap)
        self.to_draft = torch.arange(drafter.vocab_size, device=target.device)
        if drafter.draft_ids is not None:
            self.to_draft.fill_(-1)
            self.to_draft[drafter.draft_ids] = torch.arange(drafter.draft_vocab_size, device=target.device)

    @torch.no_grad()
    def follow(self, master: Drafter) -> None:
        """Take over the master's weights."""
        torch._foreach_copy_(list(self.drafter.parameters()), list(master.parameters()))

    def backward(
        self, answers: list[Answer], features: FeatureSource, indices: list[int], anchors: list[Tensor]
    ) -> Share:
        """Gradients of the blocks at ``anchors`` of some answers, left in the copy's parameters."""
        c = self.drafter.config
        batch = make_batch(answers, features.get(indices), anchors, gamma=c.block_size, mask_id=c.mask_token_id)
        for parameter in self.drafter.parameters():
            parameter.grad = None
        share = self.loss(batch)
        share.parts.total.backward()
        return share

    def loss(self, batch: BlockBatch) -> Share:
        """Forward pass and loss of a batch."""
        drafter, head = self.drafter, self.drafter.markov_head
        hidden = drafter.block_hidden(batch.block_ids, batch.block_positions, BlockAttend(drafter, batch))
        hidden = hidden.view(*batch.labels.shape, -1)  # [B, γ, H]
        e = head.embed(batch.previous) if head is not None else None
        features = self._head_features(hidden, e)
        labels = torch.where(batch.labels >= 0, self.to_draft[batch.labels.clamp(min=0)], -1)
        weights = self.slot_weights * (batch.labels >= 0)
        total = weights.sum()
        slots = Slots(
            batch.target_final.flatten(0, 1),
            batch.target_lse.flatten(),
            labels.flatten(),
            (weights / total).flatten(),
        )
        confidence = drafter.confidence_head
        parts = block_loss(
            hidden.flatten(0, 1),
            None if features is None else features.flatten(0, 1),
            None if head is None else head.markov_w2.weight,
            None if confidence is None else lambda: confidence(hidden, e).flatten(),
            self.head,
            slots,
        )
        return Share(parts, float(total))

    def _head_features(self, hidden: Tensor, e: Tensor | None) -> Tensor | None:
        """What W2 multiplies, [B, γ, r]; slot by slot only where the head carries a state."""
        head = self.drafter.markov_head
        if head is None or e is None:
            return None
        state = head.initial_state(len(hidden))
        if state is None:
            return head.step(e, hidden, None)[0]
        outputs: list[Tensor] = []
        for k in range(hidden.shape[1]):
            out, state = head.step(e[:, k], hidden[:, k], state)
            outputs.append(out)
        return torch.stack(outputs, 1)


class Workers:
    """As many workers as the CPU has threads to give, or one on a GPU; close it to end their threads."""

    def __init__(self, master: Drafter, most: int, count: int | None = None) -> None:
        threads = torch.get_num_threads()
        count = max(1, min(most, count or threads)) if master.target.device.type == "cpu" else 1
        self.master = master
        self.workers = [Worker(master) for _ in range(count)]
        self._pool = ThreadPoolExecutor(count, "train", lambda: torch.set_num_threads(1)) if count > 1 else None
        if self._pool is not None:
            list(self._pool.map(time.sleep, [0.01] * count))  # all threads are there now
            torch.set_num_threads(threads)  # what the last one set is what threads to come would begin with
        self.follow()

    def follow(self) -> None:
        """Bring every copy to the master's weights."""
        for worker in self.workers:
            worker.follow(self.master)

    def backward(
        self, answers: list[Answer], features: FeatureSource, indices: list[int], anchors: list[Tensor]
    ) -> LossParts:
        """The batch's mean loss, its gradients in the master's parameters."""
        count = min(len(self.workers), len(answers))
        dealt = [(answers[w::count], features, indices[w::count], anchors[w::count]) for w in range(count)]
        if self._pool is None:
            shares = [self.workers[0].backward(*dealt[0])]
        else:
            shares = list(self._pool.map(lambda worker, part: worker.backward(*part), self.workers, dealt))
        whole = sum(s.weight for s in shares)
        fractions = [s.weight / whole for s in shares]
        self._gather(fractions)
        return mean_parts([s.parts for s in shares], fractions)

    @torch.no_grad()
    def _gather(self, fractions: Sequence[float]) -> None:
        master = list(self.master.parameters())
        for p in master:
            if p.grad is None:
                p.grad = torch.empty_like(p)
        sums = [p.grad for p in master if p.grad is not None]
        for i, (fraction, worker) in enumerate(zip(fractions, self.workers, strict=False)):
            own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in worker.drafter.parameters()]
            if i == 0:
                torch._foreach_copy_(sums, own)
                torch._foreach_mul_(sums, fraction)
            else:
                torch._foreach_add_(sums, own, alpha=fraction)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def mean_parts(parts: Sequence[LossParts], fractions: Sequence[float]) -> LossParts:
    """Losses of parts of a batch, weighted to the whole's."""
    pairs = list(zip(fractions, parts, strict=True))
    return LossParts(
        torch.stack([f * p.total.detach() for f, p in pairs]).sum(),
        ce=sum(f * p.ce for f, p in pairs),
        l1=sum(f * p.l1 for f, p in pairs),
        confidence=sum(f * p.confidence for f, p in pairs),
    )


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of giving it back to the system, where there is glibc.

    A step allocates and frees the same few hundred MiB every time; taking them page by page from the system anew
    costs a tenth of the step. For the process of a training run; a service should give memory back.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    trim_threshold, top_pad, mmap_threshold, arenas = -1, -2, -3, -8
    for parameter, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_threshold, 2**25), (arenas, 1)):
        mallopt(parameter, value)
