"""The page as people meet it: the real server, a fake engine behind it, a real Chromium in front."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from dspark_stream.server.app import Server
from dspark_stream.server.settings import ServerConfig
from fakes import FakeEngine, FakeTokenizer, Script

WEB = Path(__file__).resolve().parents[2] / "web"
# Everything that would make the browser ask other hosts, or a GPU, is off.
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

expect.set_options(timeout=10_000)


def chromium() -> str:
    """The browser to drive; its absence is a failure, because a page that nobody opened is not tested."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.fail("Chromium is needed to test the page:  apt-get install chromium  (or set CHROMIUM=/path/to/it)")
    return found


@dataclass
class Site:
    """A server with the page, what is behind it, and a way in."""

    server: Server
    engine: FakeEngine
    tokenizer: FakeTokenizer
    browser: Browser
    problems: list[str] = field(default_factory=list)
    """Console errors, exceptions and CSP violations of every page opened; a test that expects some clears them."""

    async def open(self, *, width: int = 1280, height: int = 800, **options: Any) -> Page:
        context = await self.browser.new_context(viewport={"width": width, "height": height}, **options)
        page = await context.new_page()
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on(
            "console",
            lambda m: self.problems.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None,
        )
        await page.add_init_script(
            "window.violations = [];"
            "addEventListener('securitypolicyviolation',"
            " e => violations.push(e.violatedDirective + ' ' + e.blockedURI))"
        )
        await page.goto(self.server.url)
        return page

    async def connected(self, **options: Any) -> Page:
        """A page whose socket is open."""
        page = await self.open(**options)
        await expect(page.locator("#connection")).to_have_attribute("data-phase", "open")
        return page


Launch = Callable[..., Awaitable[Site]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all tests of a module; each page has a context, and so storage, of its own."""
    executable = chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=ARGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def launch(browser: Browser) -> AsyncIterator[Launch]:
    """Start a server, with ``ServerConfig`` changes; every page must have run without a complaint."""
    sites: list[Site] = []

    async def start(script: Any = None, *, step_s: float = 0.004, **changes: Any) -> Site:
        engine = script if isinstance(script, FakeEngine) else FakeEngine(script, step_s=step_s)
        tokenizer = FakeTokenizer()
        values = {"port": 0, "web_dir": WEB, "shutdown_timeout_s": 0.0, "close_timeout_s": 0.5, **changes}
        server = Server(ServerConfig(**values), engine, tokenizer)
        await server.start()
        sites.append(Site(server, engine, tokenizer, browser))
        return sites[-1]

    problems: list[str] = []
    try:
        yield start
        for page in [page for context in browser.contexts for page in context.pages]:
            problems += [f"CSP: {v}" for v in await page.evaluate("window.violations")]
    finally:
        for context in list(browser.contexts):
            await context.close()
        for site in sites:
            site.engine.gate.set()
            await site.server.stop()
    for site in sites:
        problems += site.problems
    assert problems == []


@pytest_asyncio.fixture(loop_scope="module")
async def site(launch: Launch) -> Site:
    """A site whose answers are ten words, ``w0 … w9``, in rounds of 3, 1, 2, 3 and 1 tokens."""
    return await launch(Script())
