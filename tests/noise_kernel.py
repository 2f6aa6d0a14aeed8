"""A kernel that only draws noise, so that tests can look at it. Imported where Triton is at hand."""

import triton
import triton.language as tl

from dspark_kernels.noise.triton import race_noise_at, race_noise_from, uniforms


@triton.jit
def draw(seed_ptr, position_ptr, u_ptr, at_ptr, from_ptr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT uniforms and race noise by both ways, from word FIRST on."""
    seed, position = tl.load(seed_ptr), tl.load(position_ptr)
    i = tl.arange(0, COUNT)
    index = (FIRST + i).to(tl.int64)
    tl.store(u_ptr + i, uniforms(seed, position, 1, index))
    tl.store(at_ptr + i, race_noise_at(seed, position, index))
    tl.store(from_ptr + i, race_noise_from(seed, position, FIRST, COUNT))
