"""Philox 4x64-10 for Triton kernels: device functions, not kernels of their own. See reference.py for the contract."""

import triton
import triton.language as tl

from dspark_kernels.noise import reference

M0, M1 = tl.constexpr(reference.MULTIPLIER[0]), tl.constexpr(reference.MULTIPLIER[1])
W0, W1 = tl.constexpr(reference.WEYL[0]), tl.constexpr(reference.WEYL[1])
ROUND, TOKEN = tl.constexpr(reference.ROUND), tl.constexpr(reference.TOKEN)
SMALLEST, LARGEST = tl.constexpr(reference.SMALLEST), tl.constexpr(reference.LARGEST)


@triton.jit
def _block(counter, key, tag):
    """One block of four words; ``counter`` [...] uint64, key and tag scalars or alike."""
    c0 = counter
    c1 = counter * 0
    c2 = counter * 0
    c3 = counter * 0
    k0 = key.to(tl.uint64) + counter * 0
    k1 = tag.to(tl.uint64) + counter * 0
    m0 = tl.full([], M0, tl.uint64)
    m1 = tl.full([], M1, tl.uint64)
    w0 = tl.full([], W0, tl.uint64)
    w1 = tl.full([], W1, tl.uint64)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0 + c0 * 0)
        low0 = c0 * m0
        high1 = tl.umulhi(c2, m1 + c2 * 0)
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


@triton.jit
def _fraction(word):
    """The upper 53 bits as float64 in [0, 1)."""
    return (word >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def uniforms(key, position, purpose: tl.constexpr, index):
    """Uniforms in [0, 1), float64, at ``index`` [...] (int64), wherever those lie."""
    tag = (position.to(tl.int64) << 8) | purpose
    place = index & 3
    c0, c1, c2, c3 = _block((index >> 2).to(tl.uint64) + 1, key, tag)
    word = tl.where(place < 2, tl.where(place == 0, c0, c1), tl.where(place == 2, c2, c3))
    return _fraction(word)


@triton.jit
def _minus_log_exponential(u):
    """-log E, float32, with E = -log(1-u) by Kahan's correction: log1p without a library of its own."""
    x = tl.minimum(tl.maximum(u.to(tl.float32), SMALLEST), LARGEST)
    rest = 1.0 - x
    gone = 1.0 - rest  # what the subtraction really took away
    e = tl.where(gone == 0.0, x, -tl.log(rest) * tl.math.div_rn(x, tl.where(gone == 0.0, 1.0, gone)))
    return -tl.log(e)


@triton.jit
def race_noise_at(seed, position, token):
    """-log E of scattered tokens [...] (int64) at one output position."""
    return _minus_log_exponential(uniforms(seed, position, TOKEN, token))


@triton.jit
def race_noise_from(seed, position, first, COUNT: tl.constexpr):
    """-log E of the COUNT tokens from ``first`` on (a multiple of 4): four for each block computed, [COUNT]."""
    tag = (position.to(tl.int64) << 8) | TOKEN
    counter = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint64) + 1
    c0, c1, c2, c3 = _block(counter, seed, tag)
    word = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    return _minus_log_exponential(_fraction(word))
