"""Everything random in a round comes from here, by counter, never from a global state.

Philox 4x64 keyed by (the stream's seed or key, position, purpose). So any token's noise can be made again at any time,
in any order, on any machine. numpy's generator is many times as fast for a whole vocabulary as the contract in torch
(`dspark_kernels/noise/reference.py`). Tests demand the same bits of both.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from dspark_kernels.noise.reference import ROUND, SMALLEST, TOKEN


class _Philox(threading.local):
    """One generator a thread, which is set to each key: making a new one takes ten times as long."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(0)
        self._fresh = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def __call__(self, seed: int, position: int, purpose: int) -> np.random.Generator:
        self._fresh["state"]["key"][:] = seed & 0xFFFF_FFFF_FFFF_FFFF, (position << 8) | purpose
        self._bits.state = self._fresh
        return self._generator


_generator = _Philox()


class RoundUniforms:
    """The 2γ+1 uniforms in [0, 1) of one rejection round of one stream.

    ``key`` must be the stream's own. If two streams share uniforms, their drafts depend on each other, and a schedule
    that reads the confidence of one biases the other.
    """

    def __init__(self, key: int, start: int, gamma: int) -> None:
        u = _generator(key, start, ROUND).random(2 * gamma + 1).tolist()
        self.bonus: float = u[0]
        self.draft: list[float] = u[1 : gamma + 1]
        self.accept: list[float] = u[gamma + 1 :]


def token_exponentials(seed: int, position: int, vocab: int) -> Tensor:
    """E ~ Exp(1) for every token of the vocabulary at one output position, [V] float64.

    argmin E/p is distributed as p: the Gumbel-max trick with -log E for the Gumbel noise, without the logarithm of p.
    """
    u = np.maximum(_generator(seed, position, TOKEN).random(vocab), SMALLEST)
    return torch.log1p(torch.from_numpy(u).neg_()).neg_()


class NoiseCache:
    """A stream's token exponentials at the positions of a round: drafting and verification use the same.

    Kernels make their own from ``seed``; then nothing is kept here. See `models.protocols.Noise`.
    """

    def __init__(self, seed: int, vocab: int) -> None:
        self.seed, self.vocab = seed, vocab
        self._rows: dict[int, Tensor] = {}

    def at(self, first: int, count: int) -> Tensor:
        """Exponentials of positions ``first`` … ``first + count - 1``, [count, V]; earlier ones are forgotten."""
        for position in [p for p in self._rows if p < first]:
            del self._rows[position]
        for position in range(first, first + count):
            if position not in self._rows:
                self._rows[position] = token_exponentials(self.seed, position, self.vocab)
        return torch.stack([self._rows[p] for p in range(first, first + count)])
