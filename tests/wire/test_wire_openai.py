"""The ``openai`` package as client, unchanged: over SSE, single bodies and its Responses WebSocket.

It lives in a virtual environment of its own, because its WebSocket extra pins an older ``websockets`` than ours.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from wire.harness import Launch, Running

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-clients" / "openai" / "bin" / "python"
SCRIPT = Path(__file__).with_name("openai_client.py")
WORDS = "".join(f"w{i} " for i in range(10))


async def run(running: Running, check: str, key: str = "unused") -> Any:
    """What the client saw."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: `make test` makes it")
    process = await asyncio.create_subprocess_exec(
        str(PYTHON),
        str(SCRIPT),
        f"{running.url}/v1",
        check,
        key,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return json.loads(out)


async def test_responses_over_sse(running: Running) -> None:
    """Guards against events that the package's stream helper cannot follow."""
    seen, raw = await asyncio.gather(run(running, "sse"), run(running, "raw_sse"))
    assert seen["text"] == seen["output_text"] == WORDS
    assert seen["status"] == "completed"
    assert seen["types"][0] == "response.created"
    assert seen["types"][-1] == "response.completed"
    assert raw["numbers"] == list(range(len(raw["numbers"])))


async def test_bodies_and_chat(running: Running) -> None:
    """Guards against bodies that its types refuse."""
    body, chat = await asyncio.gather(run(running, "body"), run(running, "chat"))
    assert body == {"text": WORDS, "second": "incomplete", "reason": "max_output_tokens"}
    assert chat == {
        "whole": WORDS,
        "text": WORDS,
        "reason": "stop",
        "completion_tokens": 10,
        "rounds": 5,
    }


async def test_errors_become_its_exceptions(launch: Launch) -> None:
    """Guards against errors that it cannot tell apart."""
    running = await launch(api_key="sekret-1")
    found = await run(running, "errors", "sekret-1")
    assert found["field"] == ["BadRequestError", 400, "temperature", "invalid_value"]
    assert found["model"] == ["NotFoundError", 404, "model", "model_not_found"]
    assert found["key"] == ["AuthenticationError", 401, None, "invalid_api_key"]
    assert found["models"] == ["fake-135m"]
    assert found["model_object"] == "dspark-stream"


async def test_its_responses_websocket(launch: Launch) -> None:
    """Guards against a socket that only our own clients understand."""
    running = await launch(api_key="sekret-1")
    found = await run(running, "websocket", "sekret-1")
    assert found["hello"] == "dspark:hello"
    assert found["texts"] == {"a": WORDS, "b": WORDS}
    assert found["error"] == ["error", 400, "temperature"]
    assert found["second"] == WORDS
    assert not [kind for kind in found["types"] if not kind.startswith("response.")]
