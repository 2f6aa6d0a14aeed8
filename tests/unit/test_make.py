"""What a newcomer meets: the Makefile's own messages, and the Procfile under a process manager."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from dspark_kernels.cpu.build import library_path, supported_isas

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("setup", "serve", "test", "test-all", "style", "types", "docs", "bench", "abuse", "soak", "clean", "help")


@pytest.fixture
def bare(tmp_path):
    """A checkout with nothing installed, and a PATH with nothing but what `fake` puts there."""
    project, tools = tmp_path / "project", tmp_path / "bin"
    project.mkdir()
    tools.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    for name in ("sed", "rm", "touch"):
        (tools / name).symlink_to(shutil.which(name))
    return project


def fake(bare: Path, name: str, script: str) -> None:
    path = bare.parent / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make(project: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": str(project.parent / "bin"), "HOME": str(project.parent)} | variables
    command = [shutil.which("make"), "--no-print-directory", *argv]
    return subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_every_target(bare):
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert all(f"make {target}" in done.stdout for target in TARGETS)


def test_an_old_python_is_named_and_nothing_is_made(bare):
    fake(bare, "python3", 'case "$1" in --version) echo Python 3.8.1;; *) exit 1;; esac')
    done = make(bare, "setup")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed; found: Python 3.8.1" in done.stderr
    assert "make setup PYTHON=" in done.stderr
    assert not (bare / ".venv").exists()


def test_a_newer_python_beside_an_old_one_is_found(bare):
    fake(bare, "python3", "exit 1")
    fake(bare, "python3.12", 'case "$1" in --version) echo Python 3.12.9;; -m) exit 1;; *) echo python3.12;; esac')
    assert "making .venv with Python 3.12.9" in make(bare, "setup").stdout


def test_a_missing_venv_module_comes_with_the_command_that_mends_it(bare):
    # What Debian's python3 does without python3-venv: it leaves a half-made folder and fails.
    script = 'case "$1" in --version) echo Python 3.11.2;; -m) mkdir -p .venv/bin; exit 1;; *) echo python3.11;; esac'
    fake(bare, "python3", script)
    (bare.parent / "bin" / "mkdir").symlink_to(shutil.which("mkdir"))
    done = make(bare, "setup")
    assert done.returncode != 0
    assert "apt-get install python3.11-venv" in done.stderr
    assert not (bare / ".venv").exists()


def test_what_was_set_up_is_not_set_up_again(bare):
    stamp = bare / ".venv" / ".ready-run"
    stamp.parent.mkdir()
    stamp.touch()
    assert "installing" not in make(bare, "setup").stdout
    # A change of the dependencies is a reason.
    os.utime(bare / "pyproject.toml", (time.time() + 10, time.time() + 10))
    assert "installing torch==" in make(bare, "--dry-run", "setup").stdout


def test_no_browser_and_no_right_to_install_one(bare):
    fake(bare, "id", "echo 1000")
    fake(bare, "apt-get", "exit 1")
    done = make(bare, "chromium")
    assert done.returncode != 0
    assert "sudo apt-get install chromium" in done.stderr
    assert make(bare, "chromium", "CHROMIUM=/opt/chrome").returncode == 0


def test_port_and_host_reach_the_service(bare):
    (bare / ".venv").mkdir()
    (bare / ".venv" / ".ready-run").touch()
    shown = make(bare, "--dry-run", "serve", "PORT=9001", "HOST=::1").stdout
    assert '--host "::1" --port "9001"' in shown
    # Without them the program's own settings decide, DSPARK_PORT among them.
    assert "--port" not in make(bare, "--dry-run", "serve").stdout


def test_a_model_reaches_the_service_and_tests_fetch_a_small_one(bare):
    (bare / ".venv").mkdir()
    (bare / ".venv" / ".ready-run").touch()
    assert '--model "smollm2-135m"' in make(bare, "--dry-run", "serve", "MODEL=smollm2-135m").stdout
    assert "--model" not in make(bare, "--dry-run", "serve").stdout
    assert "MODEL=" in make(bare, "help").stdout
    assert re.search(r"models\.fetch smollm2-135m$", make(bare, "--dry-run", "model").stdout, re.MULTILINE)


def test_all_that_tests_need_is_set_up_before_them(bare):
    shown = make(bare, "--dry-run", "test").stdout
    tests = shown.index(".venv/bin/python -m pytest -n logical")
    steps = ("kernels_ahead.py", '".[dev]"', "openai[realtime]", "apt-get install", "models.fetch", "import dspark")
    assert all(-1 < shown.find(step) < tests for step in steps)


def test_bytecode_is_kept_where_the_environment_forbids_it(bare):
    """Else every program that a test starts compiles torch's source, for five seconds."""
    (bare / ".venv" / "bin").mkdir(parents=True)
    (bare / ".venv" / ".ready-run").touch()
    python = bare / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "forbidden: <$PYTHONDONTWRITEBYTECODE>"\n')
    python.chmod(0o755)
    assert make(bare, "model", PYTHONDONTWRITEBYTECODE="1").stdout == "forbidden: <>\n"


def test_kernels_are_built_before_anything_is_installed(tmp_path):
    """The names are those that the tests look for: else they would be built twice."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n')
    compiler.chmod(0o755)
    environ = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "user")}
    program = [sys.executable, "-I", "-S", str(ROOT / "tests" / "kernels_ahead.py"), str(tmp_path / "tests")]
    subprocess.run(program, env=environ, check=True, timeout=60)
    best, *others = supported_isas()
    wanted = {library_path(isa, sanitize=True).name for isa in (best, *others)}
    wanted |= {library_path(isa).name for isa in others}
    assert {path.name for path in tmp_path.glob("tests/dspark-stream/kernels/*")} == wanted
    assert [path.name for path in tmp_path.glob("user/dspark-stream/kernels/*")] == [library_path(best).name]


def test_docs_are_built_strictly_in_an_environment_of_their_own(bare):
    shown = make(bare, "--dry-run", "docs").stdout
    assert ".venv-docs/bin/python -m pip install" in shown
    # Events are told by the service's structs.
    assert re.search(r'mkdocs-material==\S+ "msgspec==\S+" "numpy>=\S+"', shown)
    assert re.search(r"^NO_\S+ \.venv-docs/bin/python -m mkdocs build --strict", shown, re.MULTILINE)
    assert "torch" not in shown


def test_the_ci_script_runs_as_it_is():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)


# --- Procfile ------------------------------------------------------------------------------------------------


def write_tiny_model(folder: Path) -> None:
    """A Llama with random weights and a byte tokenizer: everything real but the size."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    raw.save(str(folder / "tokenizer.json"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, process: subprocess.Popen[bytes], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, "the process manager ended early"
            assert time.monotonic() < deadline, "the service did not get ready"
            time.sleep(0.2)


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="the Procfile starts .venv, and the tests run in another environment"
)
def test_the_procfile_serves_on_port_and_ends_well_on_sigterm(tmp_path):
    write_tiny_model(tmp_path / "model")
    port = free_port()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("DSPARK_", "HOST"))}
    environ |= {"DSPARK_MODEL": str(tmp_path / "model"), "DSPARK_CACHE_DIR": str(tmp_path / "cache")}
    environ |= {"DSPARK_KV_MEMORY": "4MiB", "PORT": str(port)}
    log = tmp_path / "log"
    command = [sys.executable, "-m", "honcho", "start", "--no-colour", "-f", "Procfile"]
    with log.open("wb") as output:
        manager = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", manager, patience_s=120)
        below = psutil.Process(manager.pid).children(recursive=True)
        shells = [process.name() for process in below if process.name() in ("sh", "dash", "bash")]
        assert not shells, "a shell stands between the process manager and the service"
        manager.send_signal(signal.SIGTERM)
        manager.wait(timeout=60)
    finally:
        manager.kill()
        manager.wait()
    said = log.read_text()
    assert f"the page is at http://127.0.0.1:{port}/" in said
    assert re.search(r"web\.1 stopped \(rc=0\)", said), said
