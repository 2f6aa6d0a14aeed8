"""Which implementation of an operation runs: chosen once for each kind of device, and logged.

A GPU of compute capability 8.0 or later takes the Triton kernels; everything else takes the references. Under
``TRITON_INTERPRET=1`` the Triton kernels run on CPU tensors too, in Triton's interpreter: that is how they are tested
without a GPU.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

log = logging.getLogger(__name__)

OLDEST = (8, 0)
"""Compute capability that the kernels are written for: bfloat16 on tensor cores, asynchronous copies."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter; only as it was when triton was first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def uses_triton(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to the Triton kernels.

    On a GPU without Triton, or too old for the kernels, the references run, correct and slow; the log says so.
    """
    if device.type != "cuda":
        return interpreted() and find_spec("triton") is not None
    capability = torch.cuda.get_device_capability(device)
    lacking = "triton is not installed" if find_spec("triton") is None else ""
    if capability < OLDEST:
        lacking = f"its compute capability is {capability[0]}.{capability[1]}, kernels need {OLDEST[0]}.{OLDEST[1]}"
    name = torch.cuda.get_device_name(device)
    if lacking:
        log.warning("operations on %s (%s) run on plain torch, many times slower: %s", device, name, lacking)
    else:
        log.info("operations on %s run on Triton kernels (%s)", device, name)
    return not lacking
