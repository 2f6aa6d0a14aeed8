"""The contract of counter-based noise, in plain torch: Philox 4x64-10 (Salmon et al., SC'11) as numpy numbers it.

Word i of the generator with key (k0, k1) is word i mod 4 of the block with counter i div 4 + 1, and a uniform is its
upper 53 bits: exactly `numpy.random.Generator(Philox(key=...)).random()`, of which the engine takes its noise
(`decoding/noise.py`, docs/decisions/006). So a kernel makes any entry alone, without the ones before it, and a text
does not depend on the device that drew its noise. 64-bit words are held as int64 of the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND, TOKEN = 0, 1
"""What a draw is for, of those that share a seed and a position.

ROUND: uniforms of one rejection round, keyed by its anchor position; a position may be drafted for again later, an
anchor position never comes back, so no uniform is ever used twice. TOKEN: exponentials of one output position for
coupled verification, shared by drafter and target.
"""

MULTIPLIER = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
ROUNDS = 10
LOW = 0xFFFF_FFFF
SMALLEST, LARGEST = 2.0**-54, 1.0 - 2.0**-24
"""Where single precision rounds a uniform to 0 or to 1, it counts as these: noise must be finite, or a token that is
the only one left could lose its race. In double precision no uniform is 1, and one that is 0 counts as the smallest."""


def signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 of the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _high(a: Tensor, b: int) -> Tensor:
    """Upper 64 bits of an unsigned 64x64-bit product."""
    a_low, a_high, b_low, b_high = a & LOW, _shift(a, 32), b & LOW, b >> 32
    low, cross, crossed = a_low * b_low, a_low * b_high, a_high * b_low
    middle = _shift(low, 32) + (cross & LOW) + (crossed & LOW)
    return a_high * b_high + _shift(cross, 32) + _shift(crossed, 32) + _shift(middle, 32)


def words(key: Tensor, tag: Tensor, index: Tensor) -> Tensor:
    """Word ``index`` of the generator keyed (``key``, ``tag``); all int64 and broadcast together."""
    counter = (index >> 2) + 1
    c0, c1, c2, c3 = counter, torch.zeros_like(counter), torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(ROUNDS):
        high0, low0 = _high(c0, MULTIPLIER[0]), c0 * signed(MULTIPLIER[0])
        high1, low1 = _high(c2, MULTIPLIER[1]), c2 * signed(MULTIPLIER[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key, low1, high0 ^ c3 ^ tag, low0
        key, tag = key + signed(WEYL[0]), tag + signed(WEYL[1])
    place = index & 3
    return torch.where(place < 2, torch.where(place == 0, c0, c1), torch.where(place == 2, c2, c3))


def uniforms(key: Tensor, position: Tensor, purpose: int, index: Tensor) -> Tensor:
    """Uniforms in [0, 1), float64; arguments int64, broadcast together."""
    return _shift(words(key, (position << 8) | purpose, index), 11).double() * 2.0**-53


def exponentials(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """E ~ Exp(1) of tokens at output positions, float64: `decoding.noise.token_exponentials`, entry by entry."""
    return -torch.log1p(-uniforms(seed, position, TOKEN, token).clamp(min=SMALLEST))


def race_noise(seed: Tensor, position: Tensor, token: Tensor, purpose: int = TOKEN) -> Tensor:
    """-log E, float32: what is added to a token's logit for the race (argmax of the sums is a draw from softmax).

    Single precision suffices: a 53-bit uniform keeps its relative precision however small it is, and only small E win.
    """
    u = uniforms(seed, position, purpose, token).float().clamp(SMALLEST, LARGEST)
    return -torch.log(-torch.log1p(-u))
