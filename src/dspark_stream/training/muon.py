"""Muon: momentum whose every update is made orthogonal (K. Jordan, kellerjordan.github.io/posts/muon), for matrices.

torch has one too, which multiplies in bfloat16 on every machine; a CPU without it in hardware takes a minute to update
a small drafter that way, and a second in float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dspark_stream.models.loading import fast_dtype

STEPS = 5
QUINTIC = (3.4445, -4.775, 2.0315)
"""a, b, c of x → a·x + b·x³ + c·x⁵, which drives singular values in (0, 1] towards one, quickly rather than exactly."""
ADAMW_RMS = 0.2
"""Root mean square of an AdamW update, which an orthogonal one is scaled to (Moonlight, arXiv 2502.16982)."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal and scaled to the size of AdamW's updates, so that both take one rate.

    Args:
        params: matrices [m, n].
        lr: as AdamW's.
        momentum: share of an update that is kept.
        precision: of the products; None: bfloat16 where the device multiplies it in hardware, else float32.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, precision: torch.dtype | None = None
    ) -> None:
        self.precision = precision
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient. No closure is taken."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]), self.precision or fast_dtype(p.device))
                p.add_(update, alpha=-group["lr"] * ADAMW_RMS * max(p.shape) ** 0.5)


def orthogonal(update: Tensor, precision: torch.dtype) -> Tensor:
    """UVᵀ of ``update`` = USVᵀ [m, n], roughly: singular values that are not tiny go to 0.7 … 1.2 (Newton-Schulz)."""
    a, b, c = QUINTIC
    tall = update.shape[0] > update.shape[1]
    x = (update.T if tall else update).to(precision)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(update.dtype)
