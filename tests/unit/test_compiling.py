"""Where compiled kernels go when the cache takes nothing."""

from __future__ import annotations

import logging
import shutil
import sys
from types import SimpleNamespace

import pytest

from dspark_kernels import compiling


def copies(out):
    """A compiler of its own kind."""
    return [sys.executable, "-c", f"open({str(out)!r}, 'w').write('built')"]


def test_a_library_is_built_into_the_cache(tmp_path):
    """Guards against a library that is built at every start."""
    library = tmp_path / "cache" / "kernels.so"
    assert compiling.compile_library(library, copies) == library
    assert library.read_text() == "built"
    assert list(library.parent.iterdir()) == [library]


@pytest.mark.parametrize("why", ["read-only", "full"])
def test_without_a_cache_it_is_built_for_this_process(tmp_path, monkeypatch, caplog, why):
    """Guards against models that run several times slower since a folder cannot be written."""
    caplog.set_level(logging.WARNING)
    library = tmp_path / "cache" / "kernels.so"
    if why == "full":
        monkeypatch.setattr(compiling.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    else:
        library.parent.write_text("a file where the folder should be")
    built = compiling.compile_library(library, copies)
    assert built.read_text() == "built"
    assert built.parent.stat().st_mode & 0o077 == 0, "others could put another library there"
    assert not library.is_file()
    assert "compiled at every start" in caplog.text
    shutil.rmtree(built.parent)


def test_a_compiler_that_fails_is_not_asked_twice(tmp_path):
    """Guards against minutes spent on the same error."""
    calls = []

    def fails(out):
        calls.append(out)
        return [sys.executable, "-c", "import sys; sys.exit('no such flag')"]

    with pytest.raises(compiling.CompilerError, match="no such flag"):
        compiling.compile_library(tmp_path / "kernels.so", fails)
    assert len(calls) == 1


def test_without_any_folder_it_is_said(tmp_path, monkeypatch):
    """Guards against a traceback where nothing can be written at all."""

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(compiling.tempfile, "TemporaryDirectory", read_only)
    monkeypatch.setattr(compiling.tempfile, "mkdtemp", read_only)
    with pytest.raises(compiling.CompilerError, match="Read-only file system"):
        compiling.compile_library(tmp_path / "kernels.so", copies)
