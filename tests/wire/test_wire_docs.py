"""What a newcomer copies out of the documentation works against a running service."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import pytest

from unit.test_docs import ROOT, fences
from wire.harness import Launch
from wire.test_wire_openai import PYTHON as WITH_OPENAI

NAMED = "qwen2.5-coder-0.5b"
BLOCKS = [
    (name, language, code)
    for name in ("README.md", "docs/getting-started.md", "docs/api.md")
    for language, code in fences((ROOT / name).read_text())
    if language == "python" or (language == "sh" and code.startswith("curl "))
]


@pytest.mark.parametrize(
    ("language", "code"), [pytest.param(lang, code, id=f"{name} {lang}") for name, lang, code in BLOCKS]
)
async def test_what_is_shown_gets_an_answer(launch: Launch, tmp_path: Path, language: str, code: str) -> None:
    """Guards against examples that were right once: they run as they stand, but for the port."""
    running = await launch(served_names=(NAMED,))
    assert "127.0.0.1:8000" in code
    script = tmp_path / "script"
    script.write_text(code.replace("127.0.0.1:8000", f"127.0.0.1:{running.server.port}"))
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    python = str(WITH_OPENAI) if "import OpenAI" in code else sys.executable
    if shutil.which(python) is None:
        pytest.fail(f"{python} is missing: `make test` makes it")
    process = await asyncio.create_subprocess_exec(
        "bash" if language == "sh" else python,
        str(script),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    assert all(f"w{i} " in out.decode() for i in range(10)), out.decode()


def test_each_way_in_is_shown() -> None:
    assert [(name, language) for name, language, _ in BLOCKS] == [
        ("README.md", "sh"),
        ("README.md", "python"),
        ("docs/getting-started.md", "sh"),
        ("docs/getting-started.md", "python"),
    ]
