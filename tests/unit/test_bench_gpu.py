"""bench/gpu.py is one call on a GPU that somebody has lent: it must not be the first time that it runs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)
def test_every_section_runs_over_tiny_shapes(tmp_path):
    """Guards against a bench that breaks after the machine has been paid for. SmolLM2 is left out: it needs minutes."""
    sections = ["8B shape", "profile", "drafts", "linears"]
    out = tmp_path / "gpu.csv"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/gpu.py"), "--smoke", "--out", str(out), "--only", *sections],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SMOKE" in done.stdout
    rows = list(csv.DictReader(out.open()))
    assert {"copy bandwidth", "tiny shape: host gap between rounds"} <= {r["what"] for r in rows}
    assert (tmp_path / "gpu-profile.txt").exists()
