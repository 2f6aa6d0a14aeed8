"""What `pip install` takes along: asked of the build tool itself, without building."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTED = """
import setuptools
made = setuptools.Distribution({"script_name": "setup.py"})
made.parse_config_files()
files = made.get_command_obj("build_py")
files.ensure_finalized()
print(*files.get_output_mapping(), sep="\\n")
"""


@pytest.fixture(scope="module")
def packed() -> set[str]:
    """Files of the wheel, as paths in it."""
    command = [sys.executable, "-W", "ignore", "-c", LISTED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return {line.removeprefix("build/lib/") for line in done.stdout.split()}


def ours(folder: str) -> set[Path]:
    """Files of a folder of the repository, but for what tools leave there."""
    return {
        path.relative_to(ROOT / folder)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_page_is_in_the_package(packed):
    """Guards against an installed service that has no page: it was found in checkouts alone."""
    assert {f"dspark_stream/web/{path}" for path in ours("web")} <= packed


def test_weights_and_kernels_sources_are_in_the_package(packed):
    """Guards against an installed service that decodes plainly, or slowly, since files are missing."""
    for folder, target in (
        ("src/dspark_stream/drafters", "dspark_stream/drafters"),
        ("kernels/dspark_kernels/cpu/csrc", "dspark_kernels/cpu/csrc"),
        ("kernels/dspark_kernels/sequential_head/csrc", "dspark_kernels/sequential_head/csrc"),
    ):
        assert {f"{target}/{path}" for path in ours(folder)} <= packed, folder


def test_every_module_is_in_the_package(packed):
    """Guards against a folder without ``__init__.py``, which imports in a checkout and is left out of a wheel."""
    for folder in ("src/dspark_stream", "kernels/dspark_kernels"):
        modules = {f"{Path(folder).name}/{path}" for path in ours(folder) if path.suffix == ".py"}
        assert modules <= packed


def test_nothing_else_is_in_the_package(packed):
    """Guards against tests, benches or prompts in the wheel, and against libraries built for one machine."""
    assert {path.split("/")[0] for path in packed} == {"dspark_stream", "dspark_kernels"}
    assert not [path for path in packed if path.endswith(".so")]
