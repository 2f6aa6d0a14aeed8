"""Counter-based noise: Philox 4x64-10, in the layout of numpy's generator, on whatever device the caller is on."""

from dspark_kernels.noise.reference import ROUND, TOKEN, exponentials, race_noise, uniforms

__all__ = ["ROUND", "TOKEN", "exponentials", "race_noise", "uniforms"]
