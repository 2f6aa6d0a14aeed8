"""Take docs/page.png and docs/race.webm anew: a race on the page, of a service of its own, pictured and filmed.

python bench/pictures.py               # or make pictures
python bench/pictures.py --url http://127.0.0.1:8000/ --picture /tmp/phone.png --film "" --width 390 --dark
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

from dspark_stream.config import Config
from own_service import KEYS, OwnService

DOCS = Path(__file__).resolve().parents[1] / "docs"
ARGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUESTION = "Write a Python function that checks for a palindrome."
MAX_BYTES = 300_000
"""A picture in the repository should not be larger."""
MAX_FILM_BYTES = 2_000_000
RACE_S = 180.0

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
    await page.locator(".race-line[data-same]").wait_for(timeout=RACE_S * 1000)
    await page.wait_for_timeout(1500)
    await session.send("Page.stopScreencast")
    encoder = await browser.new_page()
    data = await encoder.evaluate(ENCODE, {"shots": shots, "width": options.width, "height": options.height})
    await asyncio.to_thread(Path(options.film).write_bytes, base64.b64decode(data))


async def take(url: str, key: str | None, options: argparse.Namespace) -> None:
    """Run a race on the page, and keep what it looks like."""
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
        await page.goto(url)
        if key:
            await page.locator("#key").fill(key)
            await page.locator("#key").press("Enter")
        await page.wait_for_selector('#connection[data-phase="open"]')
        await page.locator('label[for="view-race"]').click()
        await page.locator("#question").fill(options.ask)
        await page.locator("#question").press("Enter")
        await page.locator(".race-line[data-same]").wait_for(timeout=RACE_S * 1000)
        print(await page.locator(".race-line").inner_text())
        await page.mouse.move(1, 1)
        await page.screenshot(path=options.picture)
        if options.film:
            await film(page, browser, options)
        await browser.close()


def main(options: argparse.Namespace) -> None:
    """With a service of its own, unless one is named."""
    if options.url:
        asyncio.run(take(options.url, None, options))
    else:
        service = OwnService(Config().model, [])
        try:
            service.start(1200.0)  # its model may have to be fetched
            asyncio.run(take(service.url, KEYS["victim"], options))
        finally:
            service.close()
    for path, most in [(options.picture, MAX_BYTES)] + ([(options.film, MAX_FILM_BYTES)] if options.film else []):
        size = Path(path).stat().st_size
        if size > most:
            sys.exit(f"{path} has {size} bytes, more than {most}")
        print(f"{path}: {size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a service that runs already, and asks for no key")
    parser.add_argument("--picture", default=str(DOCS / "page.png"))
    parser.add_argument("--film", default=str(DOCS / "race.webm"), help="empty: none")
    parser.add_argument("--ask", default=QUESTION)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    main(parser.parse_args())
