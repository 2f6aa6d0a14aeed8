"""Take a picture of the page in use: python tests/page/screenshot.py URL OUT [--race] [--dark] [--width N] …"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
from pathlib import Path

from playwright.async_api import async_playwright

ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MAX_BYTES = 300_000
"""A picture in the repository should not be larger."""


async def take(options: argparse.Namespace) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not executable:
        sys.exit("Chromium is needed:  apt-get install chromium  (or set CHROMIUM=/path/to/it)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=ARGS)
        page = await browser.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        await page.goto(options.url)
        await page.wait_for_selector('#connection[data-phase="open"]')
        await page.locator("#settings-toggle").click()
        await page.locator('[name="max_output_tokens"]').fill(str(options.max_tokens))
        await page.locator('[name="temperature"]').fill(str(options.temperature))
        await page.locator('[name="seed"]').fill("7")
        await page.locator("#settings-toggle").click()
        if options.race:
            await page.locator('label[for="view-race"]').click()
        await page.locator("#question").fill(options.ask)
        await page.locator("#question").press("Enter")
        await page.locator("#stop").wait_for(state="visible")
        await page.locator("#send").wait_for(state="visible", timeout=options.timeout_s * 1000)
        if not options.race:
            await page.evaluate("document.getElementById('main').scrollTop = 0")
            # With a round chosen, its line and its text are marked.
            await page.locator(".strip").focus()
            for _ in range(6):
                await page.keyboard.press("ArrowLeft")
        await page.mouse.move(1, 1)
        await page.wait_for_timeout(300)
        await page.screenshot(path=options.out)
        await browser.close()


def main(options: argparse.Namespace) -> None:
    asyncio.run(take(options))
    size = Path(options.out).stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"{options.out} has {size} bytes, more than {MAX_BYTES}")
    print(f"{options.out}: {size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("out")
    parser.add_argument("--ask", default="What makes a rainbow?")
    parser.add_argument("--race", action="store_true")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--timeout-s", type=float, default=120.0)
    main(parser.parse_args())
