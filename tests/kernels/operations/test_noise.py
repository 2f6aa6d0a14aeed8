"""Counter-based noise: numpy's own Philox, word by word."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark_kernels.dispatch import interpreted
from dspark_kernels.noise import ROUND, TOKEN, exponentials, race_noise, uniforms
from dspark_kernels.noise.reference import signed
from dspark_stream.decoding.noise import RoundUniforms, token_exponentials

SEEDS = [0, 1, 2**31, 2**63 - 1, 0xFFFF_FFFF_FFFF_FFFF, 0xD2E7470EE14C6C93]
POSITIONS = [0, 1, 4095, 2**24 - 1]


def scalar(x: int, device=None) -> torch.Tensor:
    return torch.tensor(signed(x), device=device)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("position", POSITIONS)
def test_words_are_numpys(seed, position):
    """Guards against noise that differs between the engine's CPU path and its kernels: other texts for one seed."""
    index = torch.arange(1003)
    key = np.array([seed, (position << 8) | TOKEN], dtype=np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key)).random(1003)
    got = uniforms(scalar(seed), scalar(position), TOKEN, index)
    assert torch.equal(got, torch.from_numpy(expected))


def test_the_engines_draws():
    """Uniforms of a round and exponentials of a position, as decoding/noise.py deals them."""
    key, start, gamma = 0x9E37_79B9_7F4A_7C15, 77, 7
    u = RoundUniforms(key, start, gamma)
    got = uniforms(scalar(key), torch.tensor(start), ROUND, torch.arange(2 * gamma + 1)).tolist()
    assert got == [u.bonus, *u.draft, *u.accept]
    assert torch.equal(exponentials(torch.tensor(5), torch.tensor(9), torch.arange(500)), token_exponentials(5, 9, 500))


def test_race_noise_is_gumbel():
    """Guards against a distribution that is not the standard Gumbel's: the texts would not be the target's."""
    noise = race_noise(torch.tensor(3), torch.arange(50).unsqueeze(1), torch.arange(4000)).flatten().double()
    for q in (0.001, 0.1, 0.5, 0.9, 0.999):
        expected = -np.log(-np.log(q))
        assert abs((noise < expected).double().mean().item() - q) < 4 * (q * (1 - q) / len(noise)) ** 0.5


@pytest.mark.skipif(not (interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a GPU")
def test_triton_draws_the_same(device):
    """Guards against a kernel's own idea of Philox: uniforms to the bit, race noise within rounding."""
    from noise_kernel import draw

    for seed in SEEDS:
        for position in POSITIONS:
            s, p = scalar(seed, device), scalar(position, device)
            u = torch.empty(512, dtype=torch.float64, device=device)
            at, whole = (torch.empty(512, dtype=torch.float32, device=device) for _ in range(2))
            draw[(1,)](s, p, u, at, whole, FIRST=1024, COUNT=512)
            index = torch.arange(1024, 1536, device=device)
            assert torch.equal(u, uniforms(s, p, TOKEN, index))
            torch.testing.assert_close(at, race_noise(s, p, index), atol=2e-6, rtol=2e-6)
            assert torch.equal(at, whole)
