"""Take a picture of the page in use: python tests/page/screenshot.py URL OUT [--race] [--dark] [--width N] …

With ``--film OUT.webm`` a race is filmed as well: its replay, in real time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

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
MAX_FILM_BYTES = 2_000_000

# The browser has an encoder; a second page of it plays the pictures into it at their times.
ENCODE = """async ({shots, width, height}) => {
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  const brush = canvas.getContext("2d");
  const pictures = await Promise.all(shots.map(async ([at, data]) =>
    [at, await createImageBitmap(await (await fetch("data:image/jpeg;base64," + data)).blob())]));
  brush.drawImage(pictures[0][1], 0, 0, width, height);
  const recorder = new MediaRecorder(
    canvas.captureStream(25), {mimeType: "video/webm;codecs=vp9", videoBitsPerSecond: 900000});
  const parts = [];
  recorder.ondataavailable = event => parts.push(event.data);
  const stopped = new Promise(done => { recorder.onstop = done; });
  recorder.start();
  const start = performance.now();
  for (const [at, picture] of pictures) {
    await new Promise(done => setTimeout(done, Math.max(0, at * 1000 - (performance.now() - start))));
    brush.drawImage(picture, 0, 0, width, height);
  }
  await new Promise(done => setTimeout(done, 1500));
  recorder.stop();
  await stopped;
  const bytes = new Uint8Array(await new Blob(parts).arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}"""


async def film(page: Page, browser: Browser, options: argparse.Namespace) -> None:
    """Play the race that is on the page once more, and film it."""
    session = await page.context.new_cdp_session(page)
    shots: list[tuple[float, str]] = []
    start = time.monotonic()

    async def keep(frame: dict[str, Any]) -> None:
        shots.append((time.monotonic() - start, frame["data"]))
        await session.send("Page.screencastFrameAck", {"sessionId": frame["sessionId"]})

    session.on("Page.screencastFrame", lambda frame: asyncio.ensure_future(keep(frame)))
    await session.send("Page.startScreencast", {"format": "jpeg", "quality": 90})
    await page.get_by_role("button", name="Play again").click()
    await page.locator(".race-line[data-same]").wait_for(timeout=options.timeout_s * 1000)
    await page.wait_for_timeout(1500)
    await session.send("Page.stopScreencast")
    encoder = await browser.new_page()
    size = {"width": options.width, "height": options.height}
    data = await encoder.evaluate(ENCODE, {"shots": shots, **size})
    await asyncio.to_thread(Path(options.film).write_bytes, base64.b64decode(data))


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
        if options.ask:
            await page.locator("#question").fill(options.ask)
            await page.locator("#question").press("Enter")
            await page.locator("#stop").wait_for(state="visible")
            await page.locator("#send").wait_for(state="visible", timeout=options.timeout_s * 1000)
        if options.compare:
            await page.get_by_role("button", name="The same without drafting").click()
            await page.locator("#send").wait_for(state="visible", timeout=options.timeout_s * 1000)
            await page.locator("summary", has_text="How it was made").click()
            await page.evaluate("document.getElementById('main').scrollTop = 0")
        if options.point:
            await page.evaluate("document.getElementById('main').scrollTop = 0")
            await page.locator(".prose mark.starts").nth(3).hover()
        else:
            await page.mouse.move(1, 1)
        await page.wait_for_timeout(300)
        await page.screenshot(path=options.out)
        if options.film:
            await film(page, browser, options)
        await browser.close()


def main(options: argparse.Namespace) -> None:
    asyncio.run(take(options))
    for path, most in [(options.out, MAX_BYTES)] + ([(options.film, MAX_FILM_BYTES)] if options.film else []):
        size = Path(path).stat().st_size
        if size > most:
            sys.exit(f"{path} has {size} bytes, more than {most}")
        print(f"{path}: {size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("out")
    asked = "Explain recursion with one short example."
    parser.add_argument("--ask", default=asked, help="empty: the page before any question")
    parser.add_argument("--race", action="store_true")
    parser.add_argument("--film")
    parser.add_argument("--compare", action="store_true", help="answer once more without drafting, open the figures")
    parser.add_argument("--point", action="store_true", help="point at a run")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--timeout-s", type=float, default=120.0)
    main(parser.parse_args())
