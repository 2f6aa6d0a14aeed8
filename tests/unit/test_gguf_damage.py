"""Damaged model files: each loads or is refused in one line, soon, and takes no more memory than a sound one."""

from __future__ import annotations

from collections import Counter

import pytest

from dspark_kernels.cpu.build import compiler
from gguf_damage import attempt, sweep
from tiny_families import SCALINGS, save, write_gguf


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_damaged_file_is_refused_or_loads(tmp_path, family):
    """Guards against a start that ends in a traceback, dies, or goes on without end over a file that came over a bad
    line or from a stranger. `python -m gguf_damage` does the same to real ones."""
    if compiler() is None:
        pytest.skip("no C++ compiler: apt-get install g++")
    path = write_gguf(tmp_path / "tiny.gguf", save(tmp_path / "model", family, SCALINGS["plain"]), SCALINGS["plain"])
    assert attempt(path, 60).kind == "loaded"
    (tmp_path / "copy").mkdir()
    kinds: Counter[str] = Counter()
    for damage, outcome in sweep(path, tmp_path / "copy", 100, seed=7, patience_s=60):
        kinds[outcome.kind] += 1
        assert outcome.kind in ("loaded", "refused"), (damage.said, outcome)
        assert outcome.more_mb < 150, damage.said
    assert kinds["refused"] > 30
    assert kinds["loaded"] > 10
