"""Several keys: who gets in, by which name they go, what each may do, and what a changed file changes."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import websockets

from dspark_stream.errors import ConfigError
from dspark_stream.server.keys import MAX_KEYS, KeyRing, read_keys
from dspark_stream.server.settings import ServerConfig
from fakes import Script
from wire.harness import Launch, Running, eventually

UNNAMED = f"key-{hashlib.sha256(b'sekret-c').hexdigest()[:8]}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    write(path, "# ours\nalice:sekret-a  max_streams=1\n\n  bob:sekret:b\nsekret-c\n")
    return path


def write(path: Path, text: str | bytes) -> None:
    """As a careful operator does: whole, readable to nobody else, with another inode each time."""
    part = path.with_suffix(".new")
    part.write_bytes(text.encode() if isinstance(text, str) else text)
    part.chmod(0o600)
    part.replace(path)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def status(running: Running, key: str) -> int:
    async with running.http() as http, http.get("/v1/models", headers=bearer(key)) as answer:
        return answer.status


# --- the file -------------------------------------------------------------------------------------------------


def test_lines_of_a_key_file(file: Path) -> None:
    """Guards against keys cut at their colons, labels made of keys, and limits that are not read."""
    keys = read_keys(file)
    assert [(key.label, key.max_streams) for key in keys] == [("alice", 1), ("bob", None), (UNNAMED, None)]
    ring = KeyRing("", file)
    for shown, label in ((b"sekret-a", "alice"), (b"sekret:b", "bob"), (b"sekret-c", UNNAMED)):
        found = ring.find([b"other", shown])
        assert found is not None
        assert found.label == label
    for shown in (b"", b"alice", b"sekret-", b"alice:sekret-a", b"# ours", b"sekret-c max_streams=1"):
        assert ring.find([shown]) is None
    assert "sekret" not in repr(keys)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "a b:key\n",
        "label:\n",
        ":sekret\n",
        "a:sekret\na:sekret-2\n",
        "a:sekret\nb:sekret\n",
        "a:sekret max_streams=0\n",
        "a:sekret max_streams=x\n",
        "a:sekret max_streams=1 max_streams=2\n",
        "a:sekret anything\n",
        "a:sekretö\n",
        b"a:sekret\xff\n",
        "a:" + "sekret" * 100 + "\n",
        "x" * 65 + ":sekret\n",
        "".join(f"k{i}:sekret-{i}\n" for i in range(MAX_KEYS + 1)),
        b"\0" * (1 << 20) + b"\0",
    ],
)
def test_a_broken_file_is_refused_at_the_start(tmp_path: Path, text: str | bytes) -> None:
    """Guards against a service that starts with other keys than the operator wrote, and against keys in errors."""
    path = tmp_path / "keys"
    write(path, text)
    with pytest.raises(ConfigError) as caught:
        KeyRing("", path)
    assert caught.value.param == "api_key_file"
    assert str(path) in str(caught.value)
    assert "sekret" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    """Guards against tracebacks, and against a loop that waits for what a pipe may yet say."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, tmp_path / "missing", pipe, Path("/dev/zero")):
        with pytest.raises(ConfigError):
            KeyRing("", path)


def test_a_file_that_others_can_read_is_told_of(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against keys that every user of the machine can take."""
    read_keys(file)
    assert not caplog.records
    file.chmod(0o644)
    read_keys(file)
    assert "chmod 600" in caplog.text
    assert "sekret" not in caplog.text


def test_the_one_key_may_not_be_in_the_file(file: Path) -> None:
    """Guards against two names for one key, whose limits would depend on the order."""
    with pytest.raises(ConfigError):
        KeyRing("sekret-c", file)


# --- on the wire ----------------------------------------------------------------------------------------------


async def test_each_key_opens_the_service(launch: Launch, file: Path) -> None:
    """Guards against a list of which one key counts."""
    running = await launch(host="0.0.0.0", api_key="sekret-own", api_key_file=file)
    for key in ("sekret-own", "sekret-a", "sekret:b", "sekret-c"):
        assert await status(running, key) == 200, key
    for key in ("sekret-d", "alice", "sekret", UNNAMED):
        assert await status(running, key) == 401, key
    offers = ["dspark.v1+json", "openai-insecure-api-key.sekret-a"]
    async with running.socket(subprotocols=offers) as socket:
        assert socket.hello["type"] == "dspark:hello"


def test_a_file_is_enough_for_other_binds(file: Path) -> None:
    """Guards against deployments that have to invent a second key."""
    ServerConfig(host="0.0.0.0", api_key_file=file)


async def test_a_key_goes_by_its_label(launch: Launch, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against keys in logs and metrics, and against clients that cannot be told apart there."""
    caplog.set_level(logging.DEBUG)
    running = await launch(api_key_file=file)
    async with running.http(headers=bearer("sekret:b")) as http:
        async with http.post("/v1/responses", json={"input": "x"}) as answer:
            assert answer.status == 200
        async with http.get("/metrics") as answer:
            text = await answer.text()
    async with running.socket(additional_headers=bearer("sekret-a")) as socket:
        await socket.create()
        await socket.response()
    figures = 'dspark:client_generation_tokens_total{model_name="fake-135m",client="bob"} 10'
    assert figures in text
    await eventually(lambda: len([r for r in caplog.records if hasattr(r, "fields")]) >= 3)
    lines: list[Any] = [r.fields for r in caplog.records if hasattr(r, "fields")]
    assert {line["client"] for line in lines if line["route"] == "/v1/responses"} == {"alice", "bob"}
    ours = [r.getMessage() + repr(vars(r)) for r in caplog.records if r.name.startswith("dspark")]
    assert "sekret" not in text + "".join(ours)


async def test_limits_of_a_key(launch: Launch, file: Path) -> None:
    """Guards against one holder's streams that count against another's, or do not count across connections."""
    running = await launch(Script(tokens=("w",) * 5), api_key_file=file, max_queue=64)
    running.engine.gate.clear()
    async with (
        running.socket(additional_headers=bearer("sekret-a")) as alice,
        running.socket(additional_headers=bearer("sekret:b")) as bob,
        running.http() as http,
    ):
        for socket, header, most in ((alice, bearer("sekret-a"), 1), (bob, bearer("sekret:b"), 36)):
            assert socket.hello["limits"]["max_streams_per_client"] == most
            async with http.get("/props", headers=header) as answer:
                assert (await answer.json())["limits"]["max_streams_per_client"] == most
        await alice.create()
        await alice.until("response.in_progress")
        async with http.post("/v1/responses", json={"input": "x"}, headers=bearer("sekret-a")) as answer:
            assert answer.status == 429
            assert "1 streams" in (await answer.json())["error"]["message"]
        for i in range(2):
            await bob.create(stream_id=str(i))
        for _ in range(2):
            await bob.until("response.in_progress")
        running.engine.gate.set()
        await alice.until("response.completed")
        for _ in range(2):  # a socket with unread events is closed only after ten seconds
            await bob.until("response.completed")


# --- changes ----------------------------------------------------------------------------------------------------


async def test_a_changed_file_counts_without_a_restart(launch: Launch, file: Path) -> None:
    """Guards against keys that stay good until the next restart, on new requests and on open sockets."""
    running = await launch(api_key_file=file, key_poll_s=0.01)
    async with (
        running.socket(additional_headers=bearer("sekret-a")) as alice,
        running.socket(additional_headers=bearer("sekret:b")) as bob,
    ):
        write(file, "bob:sekret:b max_streams=3\ndora:sekret-d\n")
        assert await alice.closed() == 1008
        assert await status(running, "sekret-d") == 200
        assert await status(running, "sekret-a") == 401
        with pytest.raises(websockets.InvalidStatus):
            async with running.socket(additional_headers=bearer("sekret-a")):
                pass
        await bob.create()
        await bob.response()
    assert running.server.service.admission.limits == {"bob": 3}


async def test_a_label_with_another_key_is_another_holder(launch: Launch, file: Path) -> None:
    """Guards against a key that leaked, was replaced under its name, and goes on by an open socket."""
    running = await launch(api_key_file=file, key_poll_s=0.01)
    async with running.socket(additional_headers=bearer("sekret-a")) as alice:
        write(file, "alice:sekret-new\n")
        assert await alice.closed() == 1008
    assert await status(running, "sekret-new") == 200


def test_a_broken_change_leaves_the_keys(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against everybody locked out by a typing mistake, and against a log that says so every two seconds."""
    ring = KeyRing("", file)
    for change in ("alice sekret-a\n", None):
        caplog.clear()
        if change is None:
            file.unlink()
        else:
            write(file, change)
        for _ in range(3):
            assert ring.reload() is None
        assert ring.find([b"sekret-a"]) is not None
        assert len(caplog.records) == 1
        assert "sekret" not in caplog.text
    write(file, "alice:sekret-a\n")
    assert ring.reload() == {"bob", UNNAMED}
    assert ring.find([b"sekret:b"]) is None
    assert ring.reload() is None


def test_a_line_before_others_changes_nothing_for_them(file: Path) -> None:
    """Guards against keys named by their lines, whose holders swap names, limits and sockets when one is added."""
    ring = KeyRing("", file)
    write(file, "# a line more\nsekret-d\n" + file.read_text())
    assert ring.reload() == frozenset()
    found = ring.find([b"sekret-c"])
    assert found is not None
    assert found.label == UNNAMED


def test_a_file_with_the_same_size_and_time_is_read(file: Path) -> None:
    """Guards against secret stores that keep times: the new file is another one all the same."""
    ring = KeyRing("", file)
    before = file.stat()
    write(file, file.read_text().replace("sekret-a", "sekret-x"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ring.reload() == {"alice"}
