"""The training loop: steps, schedule, checkpoints, resume, log.

Step i draws everything from (seed, i) alone, never from a generator that runs on. So a run that was killed and resumed
sees the same batches as one that was not. It ends at the same weights on the same machine, with as many threads, if its
end is given in steps. If it is given in minutes, the learning rate follows the clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_stream.console import SILENT, Progress
from dspark_stream.errors import ConfigError
from dspark_stream.models.torch.drafter import Drafter
from dspark_stream.training.answers import Answer
from dspark_stream.training.blocks import make_batch, sample_anchors
from dspark_stream.training.features import FeatureSource
from dspark_stream.training.log import loss_fields, open_log, spoken
from dspark_stream.training.loss import LossParts
from dspark_stream.training.muon import Muon
from dspark_stream.training.plan import STATE, anew
from dspark_stream.training.validate import Walked, walk
from dspark_stream.training.workers import Share, Workers, mean_parts

WARM_UP = 0.04
CLIP_NORM = 1.0
LOG_STEPS = 20


@dataclass(frozen=True)
class LoopConfig:
    """How to train. Whichever of ``steps`` and ``minutes`` is reached first ends the run; one may be None."""

    steps: int | None
    minutes: float | None
    batch: int = 12
    """Sequences a step."""
    anchors: int = 24
    """Blocks a sequence."""
    lr: float = 2e-3
    muon: bool = True
    """False: AdamW for everything."""
    seed: int = 0
    validate_every: int = 250
    checkpoint_minutes: float = 3.0


class Trainer:
    """Trains one drafter; everything that a resumed run needs is in ``folder / STATE``.

    Args:
        drafter: new, float32, on the target's device.
        answers: to train on.
        held_out: never trained on.
        features: of the held-out answers, then of those to train on.
        folder: of the run.
    """

    def __init__(
        self,
        drafter: Drafter,
        answers: list[Answer],
        held_out: list[Answer],
        features: FeatureSource,
        config: LoopConfig,
        folder: Path,
    ) -> None:
        self.drafter, self.answers, self.held_out = drafter, answers, held_out
        self.features, self.config, self.folder = features, config, folder
        self.device = drafter.target.device
        self.parameters = [p for p in drafter.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(drafter, config)
        self.workers = Workers(drafter, config.batch)
        self.step = 0
        self.rows = 0
        """Block rows trained so far."""
        self.elapsed_s = 0.0
        self.began_with: str | None = None
        """Fingerprint of the target; after `resume`, of the one that the state was trained with."""
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def close(self) -> None:
        """End the workers' threads and close the features' files."""
        self.workers.close()
        self.features.close()

    # --- one step --------------------------------------------------------------------------------------------

    def indices(self, step: int) -> list[int]:
        """The sequences of a step: each at most once an epoch, in an order drawn from (seed, epoch)."""
        size = min(self.config.batch, len(self.answers))
        per_epoch = len(self.answers) // size
        epoch, at = divmod(step, per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mixed(self.config.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.answers), generator=generator))
        return [int(i) for i in self._order[1][at * size : (at + 1) * size]]

    def anchors(self, answers: list[Answer], seed: int) -> list[Tensor]:
        """Of each answer, drawn from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        return [sample_anchors(a, self.config.anchors, generator) for a in answers]

    def train_step(self) -> LossParts:
        """One optimiser step.

        Raises:
            ConfigError: a gradient that is not finite; the weights and the state saved last are as they were.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * rate(self.progress)
        indices = self.indices(self.step)
        answers = [self.answers[i] for i in indices]
        parts = self.workers.backward(
            answers,
            self.features,
            [len(self.held_out) + i for i in indices],
            self.anchors(answers, mixed(self.config.seed, 500_009 + self.step)),
        )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        if not norm.isfinite():
            raise ConfigError(
                f"step {self.step + 1}: the gradient is not finite, with --lr {self.config.lr:g}: give a smaller "
                f"one, {anew(self.folder)}",
                param="lr",
            )
        for optimizer in self.optimizers:
            optimizer.step()
        self.workers.follow()
        self.step += 1
        self.rows += sum(min(self.config.anchors, len(a.answer_ids)) for a in answers) * self.drafter.gamma
        return parts

    # --- schedule --------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 … 1, by steps or by time, whichever is further."""
        c = self.config
        by_steps = self.step / c.steps if c.steps else 0.0
        by_time = self.elapsed_s / (60 * c.minutes) if c.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    # --- the run ---------------------------------------------------------------------------------------------

    def run(self, progress: Progress = SILENT, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train from where the folder stands to the end. Validates and saves on the way, and at the end.

        ``stop`` is asked after every step; when it says so the state is saved. Returns False where it did.
        """
        c = self.config
        started = time.monotonic() - self.elapsed_s
        saved_s = self.elapsed_s
        left = 60 * c.minutes - self.elapsed_s if c.minutes else (c.steps or 0) - self.step
        note = ""
        with (
            open_log(self.folder, {a.domain for a in self.held_out}, self.step) as log,
            progress.bar("training", max(0, int(left)), "s" if c.minutes else "step") as bar,
        ):
            first_s, first = self.elapsed_s, self.step
            while self.progress < 1:
                parts = self.train_step()
                self.elapsed_s = time.monotonic() - started
                last, stopped = self.progress >= 1, stop()
                if self.step % LOG_STEPS == 0 or last:
                    log(self._train_line(parts))
                    note = f"step {self.step} loss {parts.total.item():.3f}"
                if self.step % c.validate_every == 0 or last:
                    line = self._validation_line(*self.validate())
                    log(line)
                    progress.say(f"step {self.step}, held out: {spoken(line)}")
                    self.elapsed_s = time.monotonic() - started
                    last = self.progress >= 1  # validating takes time, too
                if last or stopped or self.elapsed_s - saved_s > 60 * c.checkpoint_minutes:
                    self.save()
                    saved_s = self.elapsed_s
                bar.reach(min(int(self.elapsed_s - first_s), int(left)) if c.minutes else self.step - first, note)
                if stopped:
                    return False
        return True

    def _train_line(self, parts: LossParts) -> dict[str, Any]:
        return {
            "kind": "train",
            "step": self.step,
            "elapsed_s": round(self.elapsed_s, 1),
            "block_rows": self.rows,
            "lr": f"{self.optimizers[0].param_groups[0]['lr']:.2e}",
            **loss_fields(parts),
        }

    def _validation_line(self, walked: dict[str, Walked], parts: LossParts) -> dict[str, Any]:
        everything = Walked([a for w in walked.values() for a in w.accepted])
        return {
            "kind": "held_out",
            "step": self.step,
            "elapsed_s": round(self.elapsed_s, 1),
            "block_rows": self.rows,
            **loss_fields(parts),
            "accepted_length": round(everything.accepted_length, 3),
            **{f"accepted_length_{d}": round(w.accepted_length, 3) for d, w in sorted(walked.items())},
            "by_position": " ".join(f"{a:.2f}" for a in everything.by_position(self.drafter.gamma)),
        }

    @torch.no_grad()
    def validate(self) -> tuple[dict[str, Walked], LossParts]:
        """Accepted length by domain, and the teacher-forced loss, of the held-out answers."""
        worker, size, c = self.workers.workers[0], self.config.batch, self.drafter.config
        features = self.features.get(range(len(self.held_out)))
        walked = walk(worker.drafter, self.held_out, features)
        shares: list[Share] = []
        for at in range(0, len(self.held_out), size):
            answers = self.held_out[at : at + size]
            anchors = self.anchors(answers, at)
            batch = make_batch(answers, features[at : at + size], anchors, gamma=c.block_size, mask_id=c.mask_token_id)
            shares.append(worker.loss(batch))
        whole = sum(s.weight for s in shares)
        return walked, mean_parts([s.parts for s in shares], [s.weight / whole for s in shares])

    # --- state -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Everything a resumed run needs; the earlier state stays until the new one is whole.

        Raises:
            ConfigError: the disk is full; the earlier state is still there.
        """
        path = self.folder / STATE
        part = path.with_name(STATE + ".part")
        state = {
            "step": self.step,
            "rows": self.rows,
            "elapsed_s": self.elapsed_s,
            "target": self.began_with,
            "drafter": self.drafter.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        try:
            torch.save(state, part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a short write
            part.unlink(missing_ok=True)
            raise ConfigError(f"the state cannot be saved to {path}: {error}", param="run_dir") from error

    def resume(self) -> bool:
        """Take up the state in the folder, if there is one.

        Raises:
            ConfigError: there is one, and it is broken or of another drafter.
        """
        path = self.folder / STATE
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.drafter.load_state_dict(state["drafter"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.rows, self.elapsed_s = int(state["step"]), int(state["rows"]), float(state["elapsed_s"])
            self.began_with = state.get("target")
        except Exception as error:  # whatever torch raises for a broken archive or other shapes
            raise ConfigError(f"{path} cannot be taken up: {error}", param="run_dir") from error
        self.workers.follow()
        return True


def make_optimizers(drafter: Drafter, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for the rest (norms, the heads' tables), at one rate.

    Muon's update is scaled to have the size that AdamW's would have. For the same tokens it trains further than AdamW
    alone, which is what counts where time is dear (docs/decisions/008).
    """
    named = [(n, p) for n, p in drafter.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and n.startswith(("layers.", "fc."))] if config.muon else []
    rest = [p for _, p in named if not any(p is m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=config.lr))
    optimizers.append(torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    return optimizers


def rate(progress: float) -> float:
    """Learning rate factor: linear warm-up over the first 4 %, then linearly to zero."""
    if progress < WARM_UP:
        return max(progress, 1e-3) / WARM_UP
    return (1 - progress) / (1 - WARM_UP)


def mixed(seed: int, number: int) -> int:
    """A seed for one draw of many."""
    return (seed * 1_000_003 + number) % 2**63
