"""The suite of operations once more, with Triton's kernels in its interpreter: a process of its own, since the variable
must be set before triton is first imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

OPERATIONS = Path(__file__).parent / "operations"


@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed here (it is on Linux, x86-64)")
def test_kernels_agree_with_their_references():
    """Guards against kernels that are only ever run where there is a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(OPERATIONS), "-k", "triton", "-p", "no:cacheprovider", "-W", "ignore"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    ran = re.search(r"(\d+) passed", done.stdout)
    assert ran, done.stdout[-2000:]
    assert int(ran[1]) >= 140
    assert "skipped" not in done.stdout
