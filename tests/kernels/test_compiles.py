"""Kernels are compiled for a GPU that is not there: what the interpreter lets pass and the compiler does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed here (it is on Linux, x86-64)")
@pytest.mark.parametrize(
    ("capability", "few", "least"),
    [("80", [], 120), ("90", ["--few"], 50), pytest.param("90", [], 120, marks=pytest.mark.slow)],
)
def test_triton_kernels_compile(capability, few, least):
    """Guards against a kernel that only the interpreter runs, or that wants more of a GPU than it has: every variant
    that captured rounds launch, in shapes that people have; to PTX and machine code. For the second generation of GPUs,
    whose limits are wider, one variant of those kernels will do whose code is alike."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "compile_kernels.py"), "--capability", capability, *few],
        env=environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = re.search(rf"(\d+) kernels compiled for sm_{capability}", done.stdout)
    assert found
    assert int(found[1]) >= least
