"""Rotary positions: frequencies of every scaling that is honoured, the same for torch and for the CPU's kernels.

Plain (RoPE, arXiv 2104.09864), `linear` (position interpolation, arXiv 2306.15595), `yarn` (arXiv 2309.00071), `llama3`
(Llama 3.1's wavelengths), and a factor for each frequency, as the tensor `rope_freqs` of GGUF files has them. Any other
kind is refused: a scaling that is dropped gives wrong text without an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

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
        if self.divisors:
            if len(self.divisors) != len(plain):
                raise RotaryError(f"{len(self.divisors)} rotary factors for heads of {size}: {size // 2} are needed")
            out = out / np.array(self.divisors)
        return out

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
            ramp: npt.NDArray[np.float64] = np.clip(
                (np.arange(size // 2) - low) / (high - low if high > low else 1e-3), 0.0, 1.0
            )
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
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" and self.factor > 1 else 1.0

    def tables(self, positions: int, size: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """cos and sin [positions, D/2]."""
        angles = np.arange(positions, dtype=np.float64)[:, None] * self.frequencies(size)[None, :]
        return (
            (self.amplitude * np.cos(angles)).astype(np.float32),
            (self.amplitude * np.sin(angles)).astype(np.float32),
        )


def rotary_of_config(fields: Mapping[str, Any], base: float, positions: int) -> Rotary:
    """Of a config's `rope_parameters` or `rope_scaling`; ``base``, ``positions``: what the config says besides.

    Raises:
        RotaryError: a kind that is not known, or a field missing or of another type.
    """
    kind = fields.get("rope_type", fields.get("type")) or "default"
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise RotaryError(f"rotary scaling of kind {kind!r} is not known; known: default, linear, yarn, llama3")
    needed = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed.get(kind, ()):
        if fields.get(name) is None:
            raise RotaryError(f"rotary scaling {kind} without {name}")
    mscale, mscale_all = fields.get("mscale"), fields.get("mscale_all_dim")
    attention = fields.get("attention_factor")
    given = {
        "base": fields.get("rope_theta") or base,
        "kind": kind,
        "original": fields.get("original_max_position_embeddings") or positions,
        "attention_factor": attention,
    }
    for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"):
        if fields.get(name) is not None and kind != "default":
            given[name] = fields[name]
    try:
        rotary = msgspec.convert(given, Rotary, strict=False)
    except msgspec.ValidationError as error:
        raise RotaryError(f"rotary scaling: {error}") from error
    if attention is None and kind == "yarn" and mscale and mscale_all:
        stretched = [0.1 * float(m) * math.log(rotary.factor) + 1.0 for m in (mscale, mscale_all)]
        rotary = msgspec.structs.replace(rotary, attention_factor=stretched[0] / stretched[1])
    return _checked(rotary)


def rotary_of_gguf(
    fields: Mapping[str, Any], architecture: str, base: float, positions: int, divisors: tuple[float, ...] = ()
) -> Rotary:
    """Of a GGUF file's metadata, ``divisors`` its tensor `rope_freqs`.

    Raises:
        RotaryError: as `rotary_of_config`.
    """

    def field(name: str) -> Any:
        return fields.get(f"{architecture}.rope.scaling.{name}")

    kind = field("type") or "none"
    legacy = fields.get(f"{architecture}.rope.scale_linear")  # before scaling had a kind
    if kind == "none" and legacy not in (None, 0, 1):
        kind = "linear"
    scaling = {
        "rope_type": "default" if kind == "none" else kind,
        "factor": field("factor") or legacy,
        "original_max_position_embeddings": field("original_context_length"),
        "beta_fast": field("yarn_beta_fast"),
        "beta_slow": field("yarn_beta_slow"),
    }
    rotary = rotary_of_config(scaling, base, positions)
    extra = field("attn_factor")
    if extra not in (None, 0, 1):
        rotary = msgspec.structs.replace(rotary, attention_factor=rotary.amplitude * float(extra))
    return msgspec.structs.replace(rotary, divisors=divisors)


def _checked(rotary: Rotary) -> Rotary:
    for name in ("base", "factor", "original", "beta_fast", "beta_slow"):
        value = getattr(rotary, name)
        if not (math.isfinite(value) and value > 0):
            raise RotaryError(f"rotary scaling: {name} is {value}, a number above 0 is needed")
    if rotary.kind == "llama3" and not rotary.high_freq_factor > rotary.low_freq_factor:
        raise RotaryError("rotary scaling llama3: high_freq_factor must be above low_freq_factor")
    return rotary
