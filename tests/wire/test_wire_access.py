"""Who may connect: Host, Origin and key, checked before an upgrade and without telling anything."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import websockets

from dspark_stream.errors import ConfigError
from dspark_stream.server.settings import ServerConfig
from wire.harness import Launch, Running


async def refusal(running: Running, **options: Any) -> int:
    """The HTTP status with which an upgrade is refused."""
    with pytest.raises(websockets.InvalidStatus) as caught:
        async with running.socket(**options):
            pass
    assert caught.value.response.body is not None
    assert b'"error"' in caught.value.response.body
    return caught.value.response.status_code


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://localhost.evil.example", "http://localhost:1"]
)
async def test_a_foreign_origin_is_refused(running: Running, origin: str) -> None:
    """Guards against any web page in the user's browser talking to the local server: CORS does not cover sockets."""
    assert await refusal(running, origin=origin) == 403
    async with running.http() as http:
        body = {"model": "fake-135m", "input": "x"}
        async with http.post("/v1/responses", json=body, headers={"Origin": origin}) as answer:
            assert answer.status == 403
            assert "Access-Control-Allow-Origin" not in answer.headers
    assert not running.engine.submitted


async def test_the_pages_own_origins_may_connect(launch: Launch) -> None:
    """Guards against a page that cannot reach the server that it came from."""
    running = await launch(allowed_origins=("https://app.example",))
    port = running.server.port
    for origin in (
        f"http://127.0.0.1:{port}",
        f"http://localhost:{port}",
        f"http://[::1]:{port}",
        "https://app.example",
    ):
        async with running.socket(origin=origin) as socket:
            assert socket.hello["type"] == "dspark:hello"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "a b", "x;y"])
async def test_a_foreign_host_is_refused(running: Running, host: str) -> None:
    """Guards against DNS rebinding: a foreign name that resolves to this machine is not this machine's."""
    async with running.http() as http:
        for path in ("/", "/v1/models", "/metrics", "/props"):
            async with http.get(path, headers={"Host": host}) as answer:
                assert answer.status in (400, 403), path
                assert (await answer.json())["error"]["message"]
        # Probes come by address, and learn nothing.
        async with http.get("/health", headers={"Host": "10.1.2.3"}) as answer:
            assert answer.status == 200


async def test_further_hosts_can_be_allowed(launch: Launch) -> None:
    """Guards against an allow-list that cannot be extended, or is opened for other ports of a host:port entry."""
    running = await launch(allowed_hosts=("box.lan", "other.lan:9000"))
    async with running.http() as http:
        for host, status in (
            ("box.lan", 200),
            ("BOX.lan:1234", 200),
            ("other.lan:9000", 200),
            ("other.lan:9001", 403),
        ):
            async with http.get("/v1/models", headers={"Host": host}) as answer:
                assert answer.status == status, host


async def test_a_key_is_needed_before_the_upgrade(launch: Launch) -> None:
    """Guards against an upgrade that is granted first and checked later, and against keys that nearly match."""
    running = await launch(api_key="sekret-1")
    assert await refusal(running) == 401
    for header in ("Bearer sekret-2", "Bearer ", "sekret-1", "Basic sekret-1", "Bearer sekret-11"):
        assert await refusal(running, additional_headers={"Authorization": header}) == 401, header
    assert await refusal(running, subprotocols=["dspark.v1+json", "openai-insecure-api-key.nope"]) == 401
    async with running.socket(additional_headers={"Authorization": "Bearer sekret-1"}) as socket:
        await socket.create()
        await socket.response()


async def test_a_browsers_key_is_not_echoed_or_logged(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a key that comes back in the handshake or ends up in a log.

    Where it is the only offer the browser that made it must get it back, or drop the connection.
    """
    caplog.set_level(logging.DEBUG)
    running = await launch(api_key="sekret-1")
    offers = ["openai-insecure-api-key.sekret-1", "dspark.v1+json"]
    async with running.socket(subprotocols=offers) as socket:
        assert socket.connection.subprotocol == "dspark.v1+json"
        assert "sekret" not in str(socket.connection.response.headers)
    async with running.socket(subprotocols=offers[:1]) as socket:
        assert "sekret" not in str(socket.hello)
        await socket.create()
        await socket.response()
    async with running.socket(subprotocols=["nobody-knows-this", offers[0]]) as socket:
        assert "sekret" not in str(socket.connection.response.headers)
    ours = [r for r in caplog.records if not r.name.startswith(("websockets", "asyncio"))]
    assert not [record for record in ours if "sekret" in record.getMessage()]


async def test_what_needs_the_key_and_what_does_not(launch: Launch) -> None:
    """Guards against figures, models or the API without a key, and against probes and a page that need one."""
    running = await launch(api_key="sekret-1")
    async with running.http() as http:
        for path in ("/v1/models", "/v1/models/fake-135m", "/metrics", "/props"):
            async with http.get(path) as answer:
                assert answer.status == 401, path
                assert answer.headers["WWW-Authenticate"] == "Bearer"
            async with http.get(path, headers={"Authorization": "bearer sekret-1"}) as answer:
                assert answer.status == 200, path
        for path in ("/v1/responses", "/v1/chat/completions"):
            async with http.post(path, json={}) as answer:
                assert answer.status == 401, path
        for path in ("/health", "/ready"):
            async with http.get(path) as answer:
                assert answer.status == 200, path


def test_other_binds_demand_a_key() -> None:
    """Guards against a model that everybody on the network can use by accident."""
    for host in ("0.0.0.0", "::", "192.168.1.5", "box.lan"):
        with pytest.raises(ConfigError) as caught:
            ServerConfig(host=host)
        assert caught.value.param == "api_key"
        ServerConfig(host=host, api_key="k")
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        ServerConfig(host=host)


async def test_a_server_with_a_key_has_whatever_name_it_has(launch: Launch) -> None:
    """Guards against a deployed page that its own server refuses, and against foreign pages there."""
    running = await launch(host="0.0.0.0", api_key="sekret-1")
    key = "openai-insecure-api-key.sekret-1"
    headers = {"Host": "models.example"}
    async with running.http() as http:
        body = {"input": "x"}
        auth = {"Authorization": "Bearer sekret-1", **headers}
        async with http.post("/v1/responses", json=body, headers={**auth, "Origin": "https://models.example"}) as ok:
            assert ok.status == 200
        async with http.post("/v1/responses", json=body, headers={**auth, "Origin": "https://evil.example"}) as bad:
            assert bad.status == 403
    assert await refusal(running, subprotocols=["dspark.v1+json", key], origin="https://evil.example") == 403


async def test_so_many_sockets(launch: Launch) -> None:
    """Guards against sockets without bound."""
    running = await launch(max_sockets=1)
    async with running.socket():
        assert await refusal(running) == 503
    async with running.socket():
        pass


async def test_a_socket_that_cannot_be_closed_keeps_no_other_open(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a shutdown that ends with the first socket that goes wrong."""
    running = await launch()
    async with running.socket() as first, running.socket() as second:

        async def cancelled(code: int, reason: str) -> None:
            raise asyncio.CancelledError

        shell = next(iter(running.server.sockets.open))
        monkeypatch.setattr(shell, "close", cancelled)
        await running.server.sockets.close_all()
        monkeypatch.undo()
        closed = [asyncio.create_task(socket.closed()) for socket in (first, second)]
        done, _ = await asyncio.wait(closed, return_when=asyncio.FIRST_COMPLETED)
        assert done.pop().result() == 1012
        await running.server.sockets.close_all()
        assert [await task for task in closed] == [1012, 1012]


async def test_one_client_leaves_sockets_for_others(launch: Launch, tmp_path: Path) -> None:
    """Guards against one client that opens all sockets and keeps them."""
    keys = tmp_path / "keys"
    keys.write_text("alice:sekret-a\nbob:sekret-b\n")
    keys.chmod(0o600)
    alice, bob = ({"additional_headers": {"Authorization": f"Bearer sekret-{name}"}} for name in "ab")
    running = await launch(max_sockets=4, api_key_file=keys)
    async with running.socket(**alice), running.socket(**alice):
        assert await refusal(running, **alice) == 429
        async with running.socket(**bob):
            assert await refusal(running, **bob) == 429
    async with running.socket(**alice):
        pass
    # Where shares are off, for whoever stands behind one address.
    running = await launch(max_sockets=2, max_streams_per_client=10_000)
    async with running.socket(), running.socket():
        assert await refusal(running) == 503
