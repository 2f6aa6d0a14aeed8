"""Changes to rows of logits by the tokens before them: what the CPU's kernels and torch are told of them.

To a row's logits this is done, in the order of vLLM's v1 sampler (`Sampler.apply_logits_processors`):

1. a token's bias is added;
2. repetition: of a token in prompt or answer, what is positive is divided by the penalty, the rest multiplied;
3. frequency · times + presence is taken from a token that was generated so many times;
4. stop tokens are ruled out (-∞) while the answer is too short. vLLM does that first: -∞ stays -∞ either way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

EDIT = np.dtype([("token", np.int32), ("bias", np.float32), ("times", np.int32)])
"""Of one token. ``times`` that it was generated; 0: it is in the prompt alone, -1: in neither."""


class Edits(NamedTuple):
    """Of one stream, before its next row."""

    entries: npt.NDArray[Any]
    """[n] of `EDIT`, each token once."""
    stops: npt.NDArray[np.int32]
    """Tokens that are ruled out while the answer is too short."""
    masked: int
    """Rows, the next one first, in which they are."""
    frequency: float
    presence: float
    repetition: float
