"""Which implementation of an operation runs: chosen once for each kind of device, and logged.

A GPU takes the Triton kernels; everything else takes the references. Under ``TRITON_INTERPRET=1`` the Triton kernels
run on CPU tensors too, in Triton's interpreter: that is how they are tested without a GPU.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

log = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter; only as it was when triton was first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def uses_triton(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to the Triton kernels.

    On a GPU without Triton the references run, correct and slow; the log says so.
    """
    wanted = device.type == "cuda" or interpreted()
    there = find_spec("triton") is not None
    if wanted and not there:
        log.warning("triton is not installed: operations on %s run on plain torch, many times slower", device)
    elif device.type == "cuda":
        log.info("operations on %s run on Triton kernels (%s)", device, torch.cuda.get_device_name(device))
    return wanted and there
