"""Pages of other origins, in a real browser: what an allowed one can do, and that another can do nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from fakes import Script
from page.conftest import Launch, Site

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "sekret-1"
TRY = """async ({url, key, offers}) => {
  const seen = {};
  const headers = {"Content-Type": "application/json", "X-Stainless-Lang": "js"};
  const ask = async (name, path, options) => {
    try {
      const answer = await fetch(url + path, options);
      seen[name] = [answer.status, await answer.text()];
    } catch (error) { seen[name] = "refused"; }
  };
  const body = JSON.stringify({input: "hi", stream: true});
  const withKey = {...headers, Authorization: "Bearer " + key};
  await ask("probe", "/health");
  await ask("models", "/v1/models", {headers: withKey});
  await ask("no key", "/v1/models");
  await ask("stream", "/v1/responses", {method: "POST", headers: withKey, body});
  await ask("bad body", "/v1/responses", {method: "POST", headers: withKey, body: "{}"});
  await ask("nothing", "/nothing");
  for (const offered of offers) {
    seen[offered.join()] = await new Promise((done) => {
      const socket = new WebSocket(url.replace("http", "ws") + "/v1/responses", offered);
      socket.onmessage = (message) => { done([socket.protocol, JSON.parse(message.data).type]); socket.close(); };
      socket.onclose = (event) => done(event.code);
    });
  }
  return seen;
}"""
KEYED = f"openai-insecure-api-key.{KEY}"
OFFERS = [[KEYED], ["realtime", KEYED], ["realtime", KEYED, "openai-beta.realtime-v1"], ["dspark.v1+json", KEYED]]


@asynccontextmanager
async def elsewhere() -> AsyncIterator[str]:
    """The origin of a server that has one empty page."""

    async def page(_request: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>elsewhere</title>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/", page)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def tried(site: Site, origin: str) -> dict[str, Any]:
    """What a page of this origin got from the site."""
    context = await site.browser.new_context()
    page = await context.new_page()
    await page.goto(origin)
    url = site.server.url.rstrip("/")
    seen: dict[str, Any] = await page.evaluate(TRY, {"url": url, "key": KEY, "offers": OFFERS})
    await context.close()
    return seen


async def test_a_page_of_an_allowed_origin_can_fetch_stream_and_connect(launch: Launch) -> None:
    """Guards against an --allowed-origin that is of no use in a browser."""
    async with elsewhere() as origin:
        site = await launch(Script(), api_key=KEY, allowed_origins=(origin,))
        seen = await tried(site, origin)
    statuses = {name: found[0] for name, found in seen.items() if found[0] in range(1000)}
    assert statuses == {"probe": 200, "models": 200, "no key": 401, "stream": 200, "bad body": 400, "nothing": 404}
    assert "event: response.completed" in seen["stream"][1]
    assert '"invalid_api_key"' in seen["no key"][1]
    for offered in OFFERS:
        first = next((name for name in offered if name != KEYED), KEYED)
        assert seen[",".join(offered)] == [first, "dspark:hello"]


async def test_a_page_of_another_origin_gets_nothing(launch: Launch) -> None:
    """Guards against every page that is open in a browser using the server beside it."""
    async with elsewhere() as allowed, elsewhere() as foreign:
        site = await launch(Script(), api_key=KEY, allowed_origins=(allowed,))
        seen = await tried(site, foreign)
    assert set(map(str, seen.values())) == {"refused", "1006"}
    assert not site.engine.submitted
