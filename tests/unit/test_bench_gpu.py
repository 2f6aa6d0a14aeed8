"""bench/gpu.py is one call on a GPU that somebody has lent: it must not be the first time that it runs."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def load(name: str) -> ModuleType:
    """A bench as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"bench/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(900)
def test_every_section_runs_over_tiny_shapes(tmp_path, monkeypatch, capsys):
    """Guards against a bench that breaks after the machine has been paid for. SmolLM2 is left out: it needs minutes.

    Sections run here, not in processes of their own as the next tests have them: each would first import everything.
    """
    monkeypatch.syspath_prepend(ROOT / "bench")
    bench, worker = load("gpu"), importlib.import_module("gpu_worker")

    def run_here(name, rows, options, limit_s):
        monkeypatch.setattr(sys, "argv", ["gpu_worker.py", name, "--rows", str(rows), *options])
        return f"{name}: failed" if worker.main() else ""

    monkeypatch.setattr(bench, "run_section", run_here)
    sections = [name for name in bench.LIMITS_S if name not in ("smollm2", "4b")]  # 4b is 8b in other sizes
    out = tmp_path / "gpu.csv"
    monkeypatch.setattr(bench, "LIMITS_S", dict.fromkeys(sections, 600))  # a GPU's seconds are minutes here
    monkeypatch.setattr(bench, "DEADLINE_S", 800.0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", str(out)])
    status = bench.main()
    said = capsys.readouterr().out
    assert status == 0, said[-3000:]
    assert "SMOKE" in said
    rows = list(csv.DictReader(out.open()))
    figures = {r["what"] for r in rows}
    assert {"copy bandwidth", "tiny shape: host gap between rounds", "draft of the tiny shape, w4a16"} <= figures
    assert any("walk over" in what for what in figures)
    assert any("adaptive / plain, 2 streams" in what for what in figures)
    assert "launches" in (tmp_path / "gpu-profile.md").read_text()


def test_sections_of_the_two_files_are_the_same():
    """Guards against a section that has a limit and no code, or code that nobody calls."""
    text = (ROOT / "bench/gpu_worker.py").read_text()
    for name in load("gpu").LIMITS_S:
        assert f'    "{name}": (' in text
    assert text.count(", QWEN3_") - text.count("import") <= len(load("gpu").LIMITS_S) + 2


def test_a_section_that_fails_or_hangs_loses_what_it_measured_to_nobody(tmp_path, monkeypatch, capsys):
    """Guards against one CUDA error, or one kernel that never ends, that takes all figures with it."""
    bench = load("gpu")
    worker = tmp_path / "worker.py"
    row = dict.fromkeys(bench.COLUMNS, "") | {"value": "1"}
    worker.write_text(f"""
import json, os, sys, time
name, rows = sys.argv[1], sys.argv[3]
with open(rows, "a") as file:
    file.write(json.dumps({row!r} | {{"what": name}}) + "\\n")
if name == "8b":
    os.abort()
if name == "smollm2":
    time.sleep(60)
""")
    monkeypatch.setattr(bench, "WORKER", worker)
    monkeypatch.setattr(bench, "LIMITS_S", {"floors": 20, "8b": 20, "smollm2": 2, "crowd": 20})
    out = tmp_path / "gpu.csv"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", str(out)])
    assert bench.main() == 1
    assert [r["what"] for r in csv.DictReader(out.open())] == ["floors", "8b", "smollm2", "crowd"]
    said = capsys.readouterr().out
    assert "FAILED 8b: exit status" in said
    assert "FAILED smollm2: ended after 2 s" in said
    monkeypatch.setattr(bench, "DEADLINE_S", 1.0)
    assert bench.main() == 1
    assert "FAILED floors: no time left" in capsys.readouterr().out


def test_what_is_missing_is_said(monkeypatch, capsys):
    """Guards against minutes of installing that end in a stack trace: no GPU, no package, in plain words."""
    ready = load("gpu_ready")
    monkeypatch.setattr(sys, "argv", ["gpu_ready.py"])
    monkeypatch.setattr(ready, "find_spec", lambda name: None)
    assert ready.main() == 1
    said = capsys.readouterr().err
    assert "CANNOT RUN: the package triton is not installed" in said
    assert "make gpu GPU_PY=python3" in said
    assert "LEFT OUT: the package bitsandbytes" in said


def test_rows_are_whole_lines(tmp_path):
    """Guards against figures of one section that another cannot read."""
    path = tmp_path / "rows"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/gpu_worker.py"), "floors", "--smoke", "--rows", str(path)],
        env=ENVIRON,
        check=False,
    )
    assert done.returncode == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [tuple(r) for r in rows] == [load("gpu").COLUMNS] * 2
