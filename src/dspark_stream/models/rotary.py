"""Rotary positions: frequencies of every scaling that is supported, the same for torch and for the CPU's kernels.

Plain (RoPE, arXiv 2104.09864), `linear` (position interpolation, arXiv 2306.15595), `yarn` (arXiv 2309.00071), `llama3`
(Llama 3.1's wavelengths), and a factor for each frequency, as the tensor `rope_freqs` of GGUF files has them. Any other
kind is refused: a scaling that is dropped gives wrong text without an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt

Kind = Literal["default", "linear", "yarn", "llama3"]


class RotaryError(ValueError):
    """A scaling that is not known, or that lacks what it needs; the message says which field."""


class Rotary(msgspec.Struct, frozen=True, kw_only=True):
    """One rotary embedding. Fields are those of `transformers`' `rope_parameters`."""

    base: float
    kind: Kind = "default"
    factor: float = 1.0
    original: int = 0
    """Positions that the model was first trained for (yarn, llama3)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    """On cosine and sine; None: yarn's own, 0.1·ln(factor) + 1."""
    divisors: tuple[float, ...] = ()
    """One for each frequency, on top of all that (`rope_freqs`)."""

    def frequencies(self, size: int) -> npt.NDArray[np.float64]:
        """Radians a position [D/2] of heads of ``size``."""
        plain: npt.NDArray[np.float64] = self.base ** -(np.arange(0, size, 2, dtype=np.float64) / size)
        out = self._scaled(plain, size)
        return out / np.array(self.divisors) if self.divisors else out

    def _scaled(self, plain: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
        stretched: npt.NDArray[np.float64] = plain / self.factor
        if self.kind == "linear":
            return stretched
        if self.kind == "llama3":
            waves = self.original * plain / (2 * np.pi)  # of so many periods in the original context
            mix = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            mix = np.clip(mix, 0.0, 1.0)  # 0: long waves, stretched; 1: short ones, as they are
            return (1 - mix) * stretched + mix * plain
        if self.kind == "yarn":
            low, high = (self._dimension_of(turns, size) for turns in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0.0), min(high, size - 1.0)
            width = high - low if high > low else 1e-3
            ramp: npt.NDArray[np.float64] = np.clip((np.arange(size // 2) - low) / width, 0.0, 1.0)
            return stretched * ramp + plain * (1 - ramp)
        return plain

    def _dimension_of(self, turns: float, size: int) -> float:
        """Which frequency turns so often within the original context."""
        return size * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.base))

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return _stretched(self.factor) if self.kind == "yarn" else 1.0

    @property
    def parameters(self) -> dict[str, Any]:
        """As `rope_parameters` of a config, which cannot have divisors, nor an amplitude but yarn's."""
        out: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.base}
        if self.kind != "default":
            out["factor"] = self.factor
        if self.kind in ("yarn", "llama3"):
            out["original_max_position_embeddings"] = self.original
        if self.kind == "llama3":
            out |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind == "yarn":
            out |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate}
            out["attention_factor"] = self.amplitude
        return out


NEEDED = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Kinds that are known, and what they cannot do without."""


def rotary_of_config(fields: Mapping[str, Any], base: float, positions: int) -> Rotary:
    """Of a config's `rope_parameters` or `rope_scaling`; ``base``, ``positions``: what the config says besides.

    Raises:
        RotaryError: a kind that is not known, or a field missing, of another type or out of range.
    """
    kind = fields.get("rope_type", fields.get("type")) or "default"
    if not isinstance(kind, str) or kind not in NEEDED:
        raise RotaryError(f"rope_type {kind!r} is not known; known: {', '.join(NEEDED)}")
    for name in NEEDED[kind]:
        if fields.get(name) is None:
            raise RotaryError(f"rope_type {kind} without {name}")
    theta = fields.get("rope_theta")
    given = {"rope_theta": base if theta is None else theta}
    for name in TAKEN if kind != "default" else ():
        if fields.get(name) is not None:
            given[name] = fields[name]
    try:
        f = msgspec.convert(given, _Fields)
    except msgspec.ValidationError as error:
        raise RotaryError(f"rotary scaling: {error}") from error
    for name in TAKEN:
        value = getattr(f, name)
        least = 1 if name == "rope_theta" else 0  # of 1 all frequencies would be the same
        if value is not None and not (math.isfinite(value) and (value > least or name == "truncate")):
            raise RotaryError(f"{name} is {value}, a number above 0 is needed")
    if kind == "llama3" and not f.high_freq_factor > f.low_freq_factor:
        raise RotaryError(f"high_freq_factor {f.high_freq_factor} is not above low_freq_factor {f.low_freq_factor}")
    attention = f.attention_factor if kind == "yarn" else None
    if attention is None and kind == "yarn" and f.mscale and f.mscale_all_dim:
        attention = _stretched(f.factor, f.mscale) / _stretched(f.factor, f.mscale_all_dim)
    return Rotary(
        base=f.rope_theta,
        kind=cast(Kind, kind),
        factor=f.factor,
        original=f.original_max_position_embeddings or positions,
        low_freq_factor=f.low_freq_factor,
        high_freq_factor=f.high_freq_factor,
        beta_fast=f.beta_fast,
        beta_slow=f.beta_slow,
        truncate=f.truncate,
        attention_factor=attention,
    )


class _Fields(msgspec.Struct):
    """Of a config's `rope_parameters`, with the library's defaults."""

    rope_theta: float
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


TAKEN = _Fields.__struct_fields__


def _stretched(factor: float, by: float = 1.0) -> float:
    """YaRN's amplitude."""
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


GGUF_SCALING = {
    "type": None,
    "factor": None,
    "original_context_length": None,
    "attn_factor": None,
    "finetuned": None,
    "yarn_beta_fast": None,
    "yarn_beta_slow": None,
    "yarn_ext_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_log_multiplier": 0.0,
}
"""What may stand below `rope.scaling` in a GGUF file; with a number: that alone, which changes nothing."""


def rotary_of_gguf(
    fields: Mapping[str, Any], architecture: str, base: float, positions: int, divisors: tuple[float, ...] = ()
) -> Rotary:
    """Of a GGUF file's metadata, ``divisors`` its tensor `rope_freqs`. Without a kind a factor is that of `linear`, as
    llama.cpp has it.

    Raises:
        RotaryError: as `rotary_of_config`; a field that is not known.
    """
    above = f"{architecture}.rope.scaling."
    given = {name.removeprefix(above): value for name, value in fields.items() if name.startswith(above)}
    for name, value in given.items():
        if name not in GGUF_SCALING or GGUF_SCALING[name] not in (None, value):
            raise RotaryError(f"{above}{name} {value!r} is not known")
    legacy = fields.get(f"{architecture}.rope.scale_linear")  # before scaling had a kind
    factor = given.get("factor", None if legacy == 0 else legacy)
    kind = given.get("type", "none" if factor is None else "linear")
    scaling = {
        "rope_type": "default" if kind == "none" else kind,
        "factor": factor,
        "original_max_position_embeddings": given.get("original_context_length"),
        "beta_fast": given.get("yarn_beta_fast"),
        "beta_slow": given.get("yarn_beta_slow"),
    }
    amplitude = given.get("attn_factor", 1.0)
    if isinstance(amplitude, bool) or not isinstance(amplitude, int | float) or not 0 < amplitude < math.inf:
        raise RotaryError(f"{above}attn_factor is {amplitude!r}, a number above 0 is needed")
    if not all(math.isfinite(d) and d > 0 for d in divisors):
        raise RotaryError("rope_freqs.weight has factors that are not above 0")
    try:
        rotary = rotary_of_config(scaling, base, positions)
    except RotaryError as error:
        raise RotaryError(f"{above}*: {error}") from error
    if amplitude != 1:
        rotary = msgspec.structs.replace(rotary, attention_factor=rotary.amplitude * amplitude)
    return msgspec.structs.replace(rotary, divisors=divisors)
