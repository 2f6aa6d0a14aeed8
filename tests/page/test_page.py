"""The page in a real browser, against the real server. Every test also fails on a console error or CSP violation."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.async_api import Locator, Page, expect

from dspark_stream.errors import ContextLengthError, DrainingError, DsparkError, OverloadedError, RateLimitError
from dspark_stream.server.app import Server
from dspark_stream.types import RecommendedSampling
from fakes import FakeEngine, FakeTokenizer, Script, model_info
from page.conftest import Launch, Site
from wire.harness import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the browser's

WORDS = "".join(f"w{i} " for i in range(10))
LIMITED = RateLimitError("too many streams", retry_after_s=3)
LONG = Script(tokens=[f"word{i} " for i in range(4000)], rounds=(3, 1, 2))


async def ask(page: Page, question: str) -> Locator:
    """Send a question with the keyboard; gives the answer's element."""
    before = await page.locator("#turns .answer").count()
    await page.locator("#question").fill(question)
    await page.locator("#question").press("Enter")
    return page.locator("#turns .answer").nth(before)


async def ended(page: Page) -> None:
    await expect(page.locator("#send")).to_be_visible()
    await expect(page.locator(".answer[aria-busy]")).to_have_count(0)


async def choose(page: Page, control: str) -> None:
    await page.locator(f'label[for="{control}"]').click()


async def setting(page: Page, name: str, value: str) -> None:
    if await page.locator("#settings").is_hidden():
        await page.locator("#settings-toggle").click()
    await page.locator(f'[name="{name}"]').fill(value)


def seconds(duration: str) -> float:
    """Of a duration as the page writes it."""
    value, unit = duration.split()
    return float(value) / {"ms": 1000, "s": 1}[unit]


async def figures(answer: Locator) -> dict[str, str]:
    """Of the panel for the curious, which this opens."""
    if await answer.locator(".curious").get_attribute("open") is None:
        await answer.locator(".curious summary").click()
    await expect(answer.locator(".curious dl > div")).not_to_have_count(0)
    rows = await answer.locator(".curious dl > div").all()
    return {await row.locator("dt").inner_text(): await row.locator("dd b").inner_text() for row in rows}


# --- the chat ---------------------------------------------------------------------------------------------------


async def until(page: Page, expression: str) -> None:
    """It holds. Asked from outside: what a page polls itself, its security policy takes for code from a string."""
    async with asyncio.timeout(10):
        while not await page.evaluate(expression):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_an_answer_streams_and_accepted_runs_are_marked(site: Site) -> None:
    """Text or a figure that the rounds do not say, a run that is cut or joined, or one that only colour tells."""
    page = await site.connected()
    await expect(page.locator("#model")).to_contain_text("fake-135m")
    answer = await ask(page, "Hello?")
    await ended(page)

    assert await answer.locator(".prose").inner_text() == WORDS.strip()
    # Rounds of 3, 1, 2, 3 and 1 tokens; the last of each is the target's own, and plain text.
    assert await answer.locator("mark").all_inner_texts() == ["w0 w1", "w4", "w6 w7"]
    assert await answer.locator("mark.starts.ends").count() == 3
    # A run has a tint and a start; what is the target's own has the page's ink and nothing else.
    shadow = await answer.locator("mark").first.evaluate("m => getComputedStyle(m).boxShadow")
    assert "-2px 0px" in shadow
    await expect(answer.locator(".line")).to_contain_text("50\u00a0% of this answer was guessed ahead.")
    await expect(answer.locator(".line")).not_to_contain_text("without")  # nothing was measured
    assert re.search(r"\d tokens a second", await answer.locator(".speed").inner_text())

    shown = await figures(answer)
    assert {k: shown[k] for k in ("Block γ", "Verified ℓ", "Accepted τ", "Tokens", "Streams")} == {
        "Block γ": "4", "Verified ℓ": "4.00", "Accepted τ": "2.00", "Tokens": "10", "Streams": "1",
    }  # fmt: skip
    assert await answer.locator(".rounds .accepted").count() == 5
    assert await answer.locator(".rounds .rejected").count() == 5 * 4 - 5
    await expect(page.locator("#status")).to_contain_text("Answer complete: 10 tokens")
    # No Greek before somebody was curious.
    await answer.locator(".curious summary").click()
    assert not re.search("[γℓτ]", await page.locator("body").inner_text())
    # Marks can be put away.
    await page.locator("#marks").uncheck()
    assert await answer.locator("mark").first.evaluate("m => getComputedStyle(m).boxShadow") == "none"


async def test_a_run_tells_its_round_to_pointer_and_keyboard(site: Site) -> None:
    """A round that only a mouse can ask for, or that says something else than the wire."""
    page = await site.connected()
    answer = await ask(page, "Hello?")
    await ended(page)
    await answer.locator("mark").nth(1).hover()
    tip = page.locator("#tip")
    await expect(tip).to_contain_text("Round 3: 1 guess accepted at once")
    await expect(tip).to_contain_text(
        "4 drafted, 4 verified, 1 accepted. Before the check the drafter gave it a chance of 90\u00a0%"
    )
    await page.mouse.move(1, 1)
    await expect(tip).to_be_hidden()
    await answer.locator("mark").first.focus()
    await expect(tip).to_contain_text("both a chance of 81\u00a0%")
    await page.keyboard.press("ArrowRight")
    await expect(answer.locator("mark.lit")).to_have_text("w4")
    await expect(answer.locator("mark.lit")).to_have_attribute("aria-describedby", "tip")


async def test_a_run_that_was_found_says_so(launch: Launch) -> None:
    """A guess that no drafter made, told as the drafter's, before a reload or after it."""

    class Found(FakeEngine):
        def _round(self, stream: Any, count: int) -> Any:
            event = super()._round(stream, count)
            return msgspec.structs.replace(event, round=msgspec.structs.replace(event.round, source="lookup"))

    page = await (await launch(Found(Script()))).connected()
    answer = await ask(page, "Hello?")
    await ended(page)
    tip = page.locator("#tip")
    for _ in range(2):
        await answer.locator("mark").first.hover()
        await expect(tip).to_contain_text("Found earlier in this text: 4 guesses, 4 verified, 2 accepted.")
        await expect(tip).to_contain_text("both had a chance of 81")
        assert (await figures(answer))["Found"] == "5"
        await page.reload()
        await expect(page.locator("#connection")).to_have_attribute("data-phase", "open")


async def test_nothing_drafted_is_explained(launch: Launch) -> None:
    """An answer without runs that does not say why."""

    class Paused(FakeEngine):
        def _round(self, stream: Any, count: int) -> Any:
            event = super()._round(stream, 1)
            none = msgspec.structs.replace(event.round, draft_tokens=[], scheduled=0, confidence=[], survival=[])
            return msgspec.structs.replace(event, round=none)

    for engine, why in [
        (Paused(), "Drafting is paused: at this load it would not pay."),
        (Paused(info=model_info(schedule="none")), "Drafting is switched off on this server."),
        (Paused(info=model_info(drafter=None, gamma=0)), "This server has no drafter"),
    ]:
        page = await (await launch(engine)).connected()
        answer = await ask(page, "Hello?")
        await ended(page)
        await expect(answer.locator(".line")).to_contain_text(why)
        assert await answer.locator("mark").count() == 0


class PrefillEngine(FakeEngine):
    """As the real engine: the first token comes from reading the prompt, in no round."""

    def _round(self, stream: Any, count: int) -> Any:
        if stream.written:
            return super()._round(stream, count)
        event = super()._round(stream, 1)
        stream.rounds = self.rounds_total = 0
        return msgspec.structs.replace(event, round=None)


async def test_the_token_that_the_prompt_gives_is_the_targets_own(launch: Launch) -> None:
    """A first token that is left unmarked, uncounted, or taken for a round's text that reads the same."""
    site = await launch(PrefillEngine(Script(tokens=["a ", "a ", "b ", "a ", "c "], rounds=(1, 3)), step_s=0.02))
    page = await site.connected()
    answer = await ask(page, "Hello?")
    await ended(page)
    # Rounds of "a" and "b a c" follow the prompt's "a", which is in neither.
    assert await answer.locator("mark").all_inner_texts() == ["b a"]
    shown = await figures(answer)
    assert (shown["Tokens"], shown["Accepted τ"]) == ("5", "2.00")

    await setting(page, "max_output_tokens", "1")
    answer = await ask(page, "Shortly")
    await ended(page)
    assert await answer.locator("mark").count() == 0
    assert (await figures(answer))["Tokens"] == "1"


async def test_text_shows_while_it_streams_and_what_stands_is_not_touched_again(launch: Launch) -> None:
    """Text that only shows at the end, or a page that draws everything anew each frame."""
    site = await launch(
        Script(tokens=[f"word{i}{sep}" for i in range(4000) for sep in [" " if i % 50 else "\n\n"]], rounds=(3, 1, 2))
    )
    page = await site.connected()
    await setting(page, "max_output_tokens", "600")
    answer = await ask(page, "A long one")
    first = answer.locator("mark").first
    await first.wait_for()
    await until(page, "document.querySelectorAll('.prose > p').length > 1")  # the first block is settled
    await first.evaluate("e => { window.first = e }")
    assert await answer.get_attribute("aria-busy") == "true"
    await ended(page)
    assert await page.evaluate("window.first.isConnected")
    said = re.findall(r"word\d+", await answer.locator(".prose").text_content() or "")
    assert said == [f"word{i}" for i in range(600)]
    await expect(answer.locator(".answer-state")).to_have_text("cut at the token limit")


@pytest.mark.parametrize("how", ["button", "escape"])
async def test_stop(launch: Launch, how: str) -> None:
    """A stop that does not reach the engine, or an answer that looks complete after it."""
    site = await launch(LONG)
    page = await site.connected()
    answer = await ask(page, "Go on for ever")
    await answer.locator("mark").nth(3).wait_for()
    if how == "button":
        await page.locator("#stop").click()
    else:
        await page.keyboard.press("Escape")
    await ended(page)
    await expect(answer.locator(".answer-state")).to_have_text("stopped")
    await expect(answer).to_have_attribute("data-status", "cancelled")
    assert await answer.locator(".prose").inner_text() != ""
    assert list(site.engine.finished.values()) == ["cancelled"]
    assert site.engine.live == 0
    await expect(page.locator("#status")).to_contain_text("Stopped after")


async def test_stop_before_anything_has_come(launch: Launch) -> None:
    """A stop that is lost because the response has no id yet."""
    site = await launch(LONG)
    page = await site.connected()
    site.tokenizer.gate.clear()  # the prompt is still being read: the response has no id yet
    answer = await ask(page, "Quick")
    await expect(answer.locator(".answer-state")).to_have_text("waiting")
    await page.keyboard.press("Escape")
    await expect(answer.locator(".answer-state")).to_have_text("stopped")
    await ended(page)
    site.tokenizer.gate.set()
    assert site.engine.submitted == []

    site.engine.script = Script()
    answer = await ask(page, "Usable")
    await ended(page)
    assert await answer.locator(".prose").inner_text() == WORDS.strip()


async def test_a_stop_that_comes_too_late_is_no_error(site: Site) -> None:
    """An alarm about an answer that had ended by itself while the stop was on its way."""
    page = await site.connected()
    heard: list[str] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: heard.append(str(frame))))
    # The cancel leaves when the answer's end is already on its way.
    await page.add_init_script(
        """const send = WebSocket.prototype.send;
           WebSocket.prototype.send = function (data) {
             if (data.includes("response.cancel")) setTimeout(() => send.call(this, data), 500);
             else send.call(this, data); }"""
    )
    await page.reload()
    await expect(page.locator("#connection")).to_have_attribute("data-phase", "open")
    site.engine.gate.clear()
    answer = await ask(page, "Short")
    await expect(answer.locator(".answer-state")).to_have_text("answering")
    await page.keyboard.press("Escape")
    site.engine.gate.set()
    await ended(page)
    assert await answer.locator(".prose").inner_text() == WORDS.strip()
    await eventually(lambda: any("not_found" in frame for frame in heard))
    await ask(page, "More")
    await ended(page)
    await expect(page.locator("#notice")).to_be_hidden()


async def test_turns_follow_each_other_and_a_new_chat_forgets_them(site: Site) -> None:
    """A model that is not told the earlier turns, or is told those of a chat that was left."""
    page = await site.connected()
    await ask(page, "One")
    await ended(page)
    await ask(page, "Two")
    await ended(page)
    assert site.tokenizer.chats[-1] == [("user", "One"), ("assistant", WORDS), ("user", "Two")]
    await expect(page.locator("#turns .question p")).to_have_text(["One", "Two"])

    await page.locator("#new-chat").click()
    await expect(page.locator("#turns .answer")).to_have_count(0)
    await expect(page.locator("#intro")).to_be_visible()
    await ask(page, "Three")
    await ended(page)
    assert site.tokenizer.chats[-1] == [("user", "Three")]


async def test_plain_decoding_is_a_switch(launch: Launch) -> None:
    """A switch that does not reach the engine, or plain tokens marked as drafted."""
    site = await launch(lambda r: Script(rounds=(1,)) if r.mode == "plain" else Script())
    page = await site.connected()
    await choose(page, "mode-plain")
    answer = await ask(page, "Plainly")
    await ended(page)
    assert site.engine.submitted[-1].mode == "plain"
    assert await answer.locator("mark").count() == 0
    await expect(answer.locator(".line")).to_contain_text("Written without drafting")
    assert await answer.locator(".prose").inner_text() == WORDS.strip()
    assert "Accepted τ" not in await figures(answer)

    await choose(page, "mode-dspark")
    await ask(page, "Again")
    await ended(page)
    assert site.engine.submitted[-1].mode == "dspark"


async def test_settings_reach_the_engine_and_last(site: Site) -> None:
    """Settings that are shown but not sent, forgotten, or sent although they are out of range."""
    page = await site.connected()
    await setting(page, "temperature", "0.7")
    await setting(page, "top_p", "0.9")
    await setting(page, "max_output_tokens", "6")
    await setting(page, "seed", "42")
    await setting(page, "system", "Be brief.")
    await page.locator('[name="verification"]').select_option("coupled")
    answer = await ask(page, "With settings")
    await ended(page)
    request = site.engine.submitted[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0.7, 0.9, 6, 42)
    assert request.verification == "coupled"
    assert site.tokenizer.chats[-1] == [("system", "Be brief."), ("user", "With settings")]
    assert (await figures(answer))["Seed"] == "42"

    await page.reload()
    await page.locator("#settings-toggle").click()
    await expect(page.locator('[name="temperature"]')).to_have_value("0.7")

    # What is out of range is shown, and not sent.
    await setting(page, "temperature", "7")
    await page.locator("#question").fill("Hot")
    await page.locator("#question").press("Enter")
    await expect(page.locator('[name="temperature"]')).to_be_focused()
    await expect(page.locator('[name="temperature"]')).to_have_attribute("aria-invalid", "true")
    assert len(site.engine.submitted) == 1


async def test_settings_start_where_the_model_is_recommended(launch: Launch) -> None:
    """A page that is greedy where its model is not meant to be, or that overrules what a person chose."""
    recommended = RecommendedSampling(temperature=0.7, top_p=0.8, top_k=20)
    site = await launch(FakeEngine(Script(), info=model_info(sampling=recommended)))
    page = await site.connected()
    await expect(page.locator('[name="temperature"]')).to_have_value("0.7")
    await expect(page.locator("#settings-digest")).to_contain_text("temperature 0.7")
    await ask(page, "As it comes")
    await ended(page)
    sampling = site.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 20)

    # Another setting was chosen: the recommendation stays a recommendation. Then 0 is chosen, and stays.
    await setting(page, "max_output_tokens", "6")
    await page.reload()
    await expect(page.locator('[name="temperature"]')).to_have_value("0.7")
    await setting(page, "temperature", "0")
    await ask(page, "Greedy")
    await ended(page)
    assert (site.engine.submitted[-1].sampling.temperature, site.engine.submitted[-1].sampling.top_p) == (0.0, 0.8)
    await page.reload()
    await expect(page.locator("#connection")).to_have_attribute("data-phase", "open")
    await expect(page.locator('[name="temperature"]')).to_have_value("0")
    await expect(page.locator('[name="top_p"]')).to_have_value("0.8")
    await expect(page.locator('[name="max_output_tokens"]')).to_have_value("6")


# --- formatted text, and what a model must not be able to do ------------------------------------------------------

NASTY = """# Heading

Some **bold** text, `code` and a [link](https://example.org/page "title").

<script>window.pwned = 1</script>
<img src=x onerror="window.pwned = 2"> <svg onload="window.pwned = 3"></svg>
<style>body { display: none }</style> <p style="position: fixed">styled</p>
<iframe srcdoc="<script>parent.pwned = 4</script>"></iframe> <form action="https://evil.example"><input></form>

[a](javascript:window.pwned=5) [b](data:text/html,<script>window.pwned=6</script>) [c](vbscript:x)
![pixel](https://tracker.example/pixel.png) ![" onerror="window.pwned=7](x" onerror="window.pwned=8)

| a | b |
| - | - |
| 1 | 2 |

- [x] done
- [ ] open

```html
<b>not bold</b>
```
"""


def pieces(text: str) -> Script:
    """The text in tokens of a few characters."""
    return Script(tokens=[text[i : i + 3] for i in range(0, len(text), 3)], rounds=(4, 1, 3))


async def test_a_model_cannot_inject_anything(launch: Launch) -> None:
    """Script, markup, a form or a request to another host that came out of a model's text."""
    site = await launch(pieces(NASTY))
    page = await site.connected()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await setting(page, "max_output_tokens", "1000")
    answer = await ask(page, "Attack")
    await ended(page)
    prose = answer.locator(".prose")
    await expect(prose.locator("pre")).to_have_text("<b>not bold</b>")
    await expect(prose.locator("h4")).to_have_text("Heading")
    await expect(prose.locator("strong")).to_have_text("bold")
    await expect(prose.locator("td")).to_have_text(["1", "2"])
    await expect(prose).to_contain_text("<script>window.pwned = 1</script>")  # shown, not run

    link = prose.get_by_role("link", name="link")
    assert await link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert await link.get_attribute("target") == "_blank"
    names = await prose.evaluate("p => [...new Set([...p.querySelectorAll('*')].map(e => e.localName))]")
    assert not set(names) & {"script", "img", "svg", "style", "iframe", "form", "input"}
    attributes = await prose.evaluate(
        "p => [...new Set([...p.querySelectorAll('*')].flatMap(e => e.getAttributeNames()))]"
    )
    own = {"class", "tabindex", "type", "data-round", "aria-label"}  # of runs, code and its button
    assert set(attributes) <= {"href", "title", "rel", "target", "align", "start"} | own
    links = await prose.evaluate("p => [...p.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert all(href is None or href.startswith("https://") for href in links)

    assert await page.evaluate("window.pwned") is None
    assert [url for url in asked if "/code-worker.js" not in url and "/vendor/" not in url] == []


GROW = r"""async ([text, runs, step]) => {
  const { GrowingMarkdown, render } = await import("/markdown.js");
  const root = document.createElement("div"), at_once = document.createElement("div");
  const growing = new GrowingMarkdown(root);
  for (let i = runs.length ? 11 : step; i < text.length + step; i += step) {  // no run is cut
    growing.update(text.slice(0, i), runs.filter(run => run.end <= i));
  }
  if (runs.length) growing.finish(text, runs);
  at_once.append(render(text, 0, text.length, runs));
  const rounds = e => { const said = {};
    for (const m of e.querySelectorAll("mark"))
      said[m.dataset.round] = (said[m.dataset.round] ?? "") + m.textContent.replace(/\s/g, "");
    return JSON.stringify(said) };
  const lines = e => { const marks = rounds(e);
    for (const m of e.querySelectorAll("mark")) m.replaceWith(...m.childNodes);
    return e.innerHTML.replace(/\n+/g, "\n").trim() + marks };
  return [lines(root), lines(at_once)];
}"""


async def test_growing_markdown_ends_like_markdown_rendered_at_once(site: Site) -> None:
    """Formatting that depends on how the text was cut into rounds."""
    page = await site.connected()
    text = (
        NASTY
        + "\n1. one\n\n   still one\n2. two\n   - deep\n\n"
        + "3. three\n\n```py\nx = 1\n\n```\n\n4. four\n\nend\n===\n\n> quote\nlazy\n\nlast *words"
    )
    long = "".join(
        [
            *(f"{i}. **item** {i} of a tight list, long enough to be settled item by item\n" for i in range(1, 40)),
            "\nSome words.\n\n",
            *(f"* item {i} of a loose list\n\n  - with `code`\n\n  ~~~sh\n  ls\n  ~~~\n\n" for i in range(30)),
            "Some words.\n\n````md\n",
            *(f"- line {i} of a program\n```\n{i}\n```\n``\n`x`\n\n" for i in range(20)),
            "````\n\n~~~\nopen\n``",
        ]
    )
    sentence = "Sentence {0} has **bold words**, `code {0}` [1], a [link](https://x.example/{0}), a_b_{0}, 2 * {0}. "
    paragraphs = "".join(
        [
            *(sentence.format(i) for i in range(60)),
            "\n\nNever ended: *(see " + "some more words, " * 400,
            "\n\n",
            *(sentence.format(i) for i in range(20)),
            "\nA line more.\n\n",
            *(sentence.format(i) for i in range(20)),
        ]
    )
    for said, step in [(text, 1), (long, 12), (long, 84), (paragraphs, 12), (paragraphs, 60)]:
        runs = [{"start": at, "end": at + 9, "round": at // 12} for at in range(2, len(said) - 9, 12)]
        growing, whole = await page.evaluate(GROW, [said, [] if said is text else runs, step])
        assert growing == whole


async def test_code_is_coloured_while_it_is_written(launch: Launch) -> None:
    """A program in one colour until its end has come, or runs that the colours of the next line take away."""
    tokens = ["```python\n", *(part for i in range(60) for part in (f"    return {i}", "\n", f"    # {i}", "\n"))]
    site = await launch(step_s=0.02, script=Script(tokens=tokens, rounds=(2, 3)))
    page = await site.connected()
    answer = await ask(page, "Code")
    await expect(answer.locator(".hljs-comment").nth(20)).to_be_visible()
    await expect(answer).to_have_attribute("aria-busy", "true")
    await ended(page)
    await expect(answer.locator(".hljs-keyword")).to_have_count(60)
    await expect(answer.locator(".hljs-comment")).to_have_count(60)
    runs = await answer.evaluate(
        """a => { const by = {}; for (const m of a.querySelectorAll("mark"))
                     by[m.dataset.round] = (by[m.dataset.round] ?? "") + m.textContent.replace(/\\s/g, "");
                   return by }"""
    )
    # Rounds of two and three tokens, the last of each the target's own.
    rounds = {str(2 * i + j): tokens[5 * i + 2 * j : 5 * i + 3 * j + 1] for i in range(48) for j in (0, 1)}
    drafted = {number: "".join("".join(said).split()) for number, said in rounds.items() if number != "0"}
    assert runs == {number: said for number, said in drafted.items() if said}


async def test_code_is_copied_as_it_was_written(launch: Launch) -> None:
    """Line breaks that the pieces of a long program add or take, in the clipboard or in a selection."""
    lines = [f'line_{i} = """\n\n{i} < 2 & 3"""\n' for i in range(50)]
    page = await (await launch(Script(tokens=["```py\n", *lines, "```\n"], rounds=(4, 1, 2)))).connected()
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = await ask(page, "Code")
    await ended(page)
    program = "".join(lines)
    await expect(answer.locator(".lines")).to_have_count(7)
    await expect(answer.locator(".lines").last.locator(".hljs-string")).not_to_have_count(0)
    selected = await answer.evaluate(
        "a => { getSelection().selectAllChildren(a.querySelector('pre')); return getSelection().toString() }"
    )
    assert selected == program.removesuffix("\n")
    await answer.get_by_role("button", name="Copy the code").click()
    await expect(answer.get_by_role("button", name="Copy the code")).to_have_text("Copied")
    assert await page.evaluate("navigator.clipboard.readText()") == program
    marked = "".join(await answer.locator("pre mark").all_text_contents())
    assert (
        marked.count("line_") == 29
    )  # of rounds of 4, 1 and 2 tokens all but each last, of which the first is a fence


async def test_text_from_right_to_left(launch: Launch) -> None:
    """Arabic or Hebrew that is set from the left, or with the start of a run at its end."""
    site = await launch(pieces("مرحبا بكم في **هذا النص**.\n\n- عنصر\n\n```py\nx = 1\n```\n\nAnd English.\n"))
    page = await site.connected()
    answer = await ask(page, "اكتب")
    await ended(page)
    direction = "all => all.map(e => getComputedStyle(e).direction)"
    assert await page.locator(".question p").evaluate_all(direction) == ["rtl"]
    assert await answer.locator(".prose > :is(p, ul, .code)").evaluate_all(direction) == ["rtl", "rtl", "ltr", "ltr"]
    shadow = await answer.locator("mark.starts").first.evaluate("m => getComputedStyle(m).boxShadow")
    assert " 2px 0px" in shadow


async def test_bold_text_is_bold_from_its_first_word_on(site: Site) -> None:
    """Signs of the formatting that flash up until their end has come."""
    page = await site.connected()
    text = "Some **bold words** and `code`, 2 ** 3.\n\n1. **Item**: x\n"
    seen = await page.evaluate(
        """async text => {
          const { GrowingMarkdown } = await import("/markdown.js");
          const root = document.createElement("div"), seen = [];
          const growing = new GrowingMarkdown(root);
          for (const end of [8, 10, 14, 17, 18, 30, 40, 47, 54]) {
            growing.update(text.slice(0, end)); seen.push(root.textContent.trim()) }
          return seen;
        }""",
        text,
    )
    assert seen[1:4] == ["Some bol", "Some bold wo", "Some bold words"]
    assert all("**" not in said.replace("2 ** 3", "") for said in seen[1:]), seen
    # So too in a paragraph of thousands of words, and where an answer is cut.
    seen = await page.evaluate(
        r"""async text => {
          const { GrowingMarkdown } = await import("/markdown.js");
          const root = document.createElement("div"), seen = [];
          const growing = new GrowingMarkdown(root);
          for (let end = 5; end < text.length; end += 7) {
            growing.update(text.slice(0, end));
            const said = root.textContent.trim().replace(/\*+$/, "");  // no word has followed them
            if (/[*`]/.test(said)) seen.push(said.slice(-40)) }
          growing.finish(text, [], true);
          return [seen, root.querySelectorAll("strong").length, root.querySelector("code:last-child").textContent];
        }""",
        "Some **bold words** and then others. " * 100 + "And `half of the co",
    )
    assert seen == [[], 100, "half of the co"]


async def test_nothing_is_added_to_code_that_grows_or_is_cut(site: Site) -> None:
    """Signs that end bold text or code, within a program: "Copy" would copy them."""
    page = await site.connected()
    cases = {
        "- so:\n  ```python\n  call(**kwargs": "call(**kwargs",
        "1. > so:\n   > ```sh\n   > echo `date": "echo `date",
        "> ~~~\n> f(**kw": "f(**kw",
        "Words.\n\n    f(**kw": "f(**kw",
        "Words.\n\n    echo `date\n\n": "echo `date",
        "- run\n  ```sh": "",
        "- run **this": None,
        "> run `this": None,
        "| a |\n| - |\n| run **this": None,
        "# run **this": None,
    }
    for text, code in cases.items():
        for ends in (False, True):
            shown = await page.evaluate(
                """async ([text, ends]) => {
                  const { GrowingMarkdown } = await import("/markdown.js");
                  const root = document.createElement("div"), growing = new GrowingMarkdown(root);
                  growing.update(text);
                  if (ends) growing.finish(text, [], true);
                  return [root.querySelector("pre > code")?.textContent.trimEnd() ?? null, root.textContent];
                }""",
                [text, ends],
            )
            assert shown[0] == code, text
            assert code or not any(sign in shown[1] for sign in "*`"), text


async def test_runs_are_found_behind_any_number_of_brackets(site: Site) -> None:
    """A text of nothing but targets of links, which nest no calls."""
    page = await site.connected()
    marked = await page.evaluate(
        """async () => {
          const { mark } = await import("/marks.js");
          const root = document.createElement("div"), text = "a" + "]()".repeat(20000) + "b";
          root.innerHTML = "<p>ab</p>";
          mark(root, text, 0, text.length, [{ start: text.length - 1, end: text.length, round: 1 }]);
          return root.innerHTML;
        }"""
    )
    assert marked == '<p>a<mark class="run starts ends" data-round="1">b</mark></p>'


# --- the race -------------------------------------------------------------------------------------------------------


def by_mode(plain: str, dspark: str) -> Any:
    def script(request: Any) -> Script:
        text, rounds = (plain, (1,)) if request.mode == "plain" else (dspark, (4, 2))
        return Script(tokens=re.findall(r"\S+ ?", text), rounds=rounds)

    return script


async def race(page: Page, question: str = "Who is faster?") -> Locator:
    """Run one to its verdict."""
    await choose(page, "view-race")
    await page.locator("#question").fill(question)
    await page.locator("#question").press("Enter")
    verdict = page.locator(".race-line[data-same]")
    await expect(verdict).to_be_visible()
    return verdict


async def test_race_same_text(launch: Launch) -> None:
    """A race of unlike requests, both at once, out of step in the replay, or without its verdict."""
    text = " ".join(f"w{i}" for i in range(60))
    site = await launch(by_mode(text, text), step_s=0.02)
    page = await site.connected()
    await choose(page, "view-race")
    await page.locator("#question").fill("Who is faster?")
    await page.locator("#question").press("Enter")
    line = page.locator(".race-line")
    await expect(line.locator(".headline")).to_have_text("Plain runs, alone.")
    box = await page.locator(".lanes").bounding_box()
    assert len(site.engine.submitted) == 1
    await expect(line.locator(".headline")).to_have_text("DSpark runs, alone.")
    assert site.engine.live <= 1
    # Both are replayed from the same start: DSpark is ahead all the while.
    await expect(line.locator(".headline")).to_have_text("Both, from the same start.")
    width = "e => parseFloat(e.getAttribute('width'))"
    values = page.locator(".lanes .track .value")
    await until(page, "parseFloat(document.querySelectorAll('.track .value')[1].getAttribute('width')) > 30")
    plain_at, dspark_at = await values.evaluate_all(f"bars => bars.map({width})")
    assert plain_at < dspark_at
    await expect(page.locator(".lane[data-done]")).to_have_count(1)
    await expect(page.locator(".race-line[data-same='true']")).to_be_visible()
    await expect(line.locator(".headline")).to_have_text(re.compile(r"^Same text, \d\.\d\u00a0× sooner\.$"))
    plain, dspark = site.engine.submitted
    assert (plain.mode, dspark.mode) == ("plain", "dspark")
    assert plain.sampling == dspark.sampling
    assert plain.verification == "rejection"  # at temperature 0 there is nothing to couple
    clocks = [seconds(clock) for clock in await page.locator(".lane .clock").all_inner_texts()]
    sooner = float(re.findall(r"[\d.]+", await line.locator(".headline").inner_text())[0])
    assert abs(clocks[0] / clocks[1] - sooner) < 0.15
    assert await page.locator(".lane .prose").all_inner_texts() == [text] * 2
    assert await page.locator('.lane[data-mode="plain"] mark').count() == 0
    assert await page.locator('.lane[data-mode="dspark"] mark').count() > 0
    assert await page.locator(".lanes").bounding_box() == box  # the verdict pushed nothing
    # Once more, to its end at once.
    await page.get_by_role("button", name="Play again").click()
    await expect(line.locator(".headline")).to_have_text("Both, from the same start.")
    await expect(page.locator(".race-line[data-same='true']")).to_be_visible()
    assert len(site.engine.submitted) == 2


async def test_both_lanes_are_on_a_phone_s_screen(launch: Launch) -> None:
    """A race of which a phone shows one side."""
    text = " ".join(f"word{i}" for i in range(60))
    site = await launch(by_mode(text, text))
    for width, height in [(390, 844), (844, 390)]:
        page = await site.connected(width=width, height=height, has_touch=True, is_mobile=True)
        await race(page)
        for lane in await page.locator(".lane-text").all():
            await expect(lane).to_be_in_viewport(ratio=0.99)
            box = await lane.bounding_box()
            assert box is not None
            assert box["height"] > 120


async def test_race_with_temperature_is_coupled(launch: Launch) -> None:
    """A race of two samples that had no reason to be the same text."""
    site = await launch(by_mode("a b c d", "a b c d"))
    page = await site.connected()
    await setting(page, "temperature", "0.8")
    verdict = await race(page)
    await expect(verdict.locator(".headline")).to_contain_text("Same text")
    assert {request.verification for request in site.engine.submitted} == {"coupled"}
    await expect(page.locator(".how")).to_contain_text("Coupled verification")


async def test_race_is_greedy_unless_a_temperature_was_chosen(launch: Launch) -> None:
    """A race that samples because the model's makers recommend it, coupled and slower than it need be."""
    recommended = RecommendedSampling(temperature=0.7, top_p=0.8, top_k=20)
    site = await launch(FakeEngine(Script(), info=model_info(sampling=recommended)))
    page = await site.connected()
    await race(page)
    assert [r.sampling.temperature for r in site.engine.submitted] == [0.0, 0.0]
    assert {r.verification for r in site.engine.submitted} == {"rejection"}
    await expect(page.locator(".how")).to_contain_text("Greedy")
    await page.locator("#settings-toggle").click()
    await expect(page.locator("#race-note")).to_be_visible()
    await choose(page, "view-chat")
    await expect(page.locator("#race-note")).to_be_hidden()


async def test_race_texts_differ(launch: Launch) -> None:
    """A difference that is hidden, put in the wrong place, or left unexplained."""
    site = await launch(by_mode("The cat sat on the mat", "The cat lay on the mat"))
    page = await site.connected()
    verdict = await race(page)
    await expect(verdict.locator(".headline")).to_contain_text("Texts differ")
    await expect(verdict).to_contain_text("first difference is at character 9")
    await expect(verdict).to_contain_text("plain “sat on the mat”, DSpark “lay on the mat”")
    await expect(verdict).to_contain_text("rounding")


async def test_a_stopped_race_has_no_verdict(launch: Launch) -> None:
    """A verdict about half an answer, or a second answer that starts after the stop."""
    site = await launch(LONG)
    page = await site.connected()
    await choose(page, "view-race")
    await page.locator("#question").fill("For ever")
    await page.locator("#question").press("Enter")
    await expect(page.locator(".lane-count").first).to_have_text(re.compile(r"\d tokens recorded"))
    await page.keyboard.press("Escape")
    await expect(page.locator(".race-line .headline")).to_have_text("No verdict")
    assert len(site.engine.submitted) == 1  # the second was not begun
    await expect(page.locator(".lane .answer-state")).to_have_text(["stopped", "not started"])


# --- what is kept, and what can be done again -----------------------------------------------------------------------


async def test_a_conversation_survives_a_reload(site: Site) -> None:
    """Turns, runs or figures that a reload takes away, or that outlive the tab."""
    page = await site.connected()
    answer = await ask(page, "One")
    await ended(page)
    line = await answer.locator(".line").inner_text()
    await page.reload()
    answer = page.locator("#turns .answer")
    await expect(answer.locator(".prose")).to_have_text(WORDS.strip())
    assert await answer.locator("mark").all_inner_texts() == ["w0 w1", "w4", "w6 w7"]
    await expect(answer.locator(".line")).to_have_text(line)
    assert (await figures(answer))["Accepted τ"] == "2.00"
    await expect(page.locator("#connection")).to_have_attribute("data-phase", "open")
    await ask(page, "Two")
    await ended(page)
    assert site.tokenizer.chats[-1] == [("user", "One"), ("assistant", WORDS), ("user", "Two")]
    assert "One" not in await page.evaluate("JSON.stringify(localStorage)")
    # A new chat takes it away, with a way back.
    await page.locator("#new-chat").click()
    await expect(page.locator("#turns .answer")).to_have_count(0)
    await page.locator("#toast button").click()
    await expect(page.locator("#turns .question p")).to_have_text(["One", "Two"])


async def test_an_answer_that_a_reload_cut_off_says_so(launch: Launch) -> None:
    """Half an answer that looks whole, that the server goes on with, or that cannot be asked for again."""
    site = await launch(LONG)
    page = await site.connected()
    answer = await ask(page, "One")
    await answer.locator("mark").nth(20).wait_for()
    await page.reload()
    await expect(page.locator("#connection")).to_have_attribute("data-phase", "open")
    await expect(answer.locator(".answer-state")).to_have_text("cut off")
    await expect(answer.locator(".notice")).to_contain_text("The page was left before the answer ended.")
    await expect(answer.locator(".notice")).to_be_in_viewport()
    await eventually(lambda: site.engine.live == 0)
    site.engine.script = Script()
    await answer.get_by_role("button", name="Try again").click()
    await ended(page)
    await expect(page.locator("#turns .prose")).to_have_text([WORDS.strip()])


KEPT = """kept => sessionStorage.getItem("dspark-stream.conversation").length < 20000 &&
  sessionStorage.setItem("dspark-stream.conversation", kept)"""


async def test_a_long_conversation_is_there_at_once(launch: Launch) -> None:
    """A page that two hundred turns keep busy when it is opened, or that does not show their end."""
    text = "Some **bold** words.\n\n```python\ndef f(x):\n    return x + 1\n```\n\n1. one\n2. two\n\nThe end."
    page = await (await launch(pieces(text))).connected()
    await ask(page, "One")
    await ended(page)
    await page.evaluate("dispatchEvent(new Event('pagehide'))")
    (turn,) = json.loads(await page.evaluate("sessionStorage.getItem('dspark-stream.conversation')"))
    kept = json.dumps([{**turn, "question": f"Question {i}"} for i in range(200)])
    await page.add_init_script(f"({KEPT})({json.dumps(kept)})")
    browser = page.context.browser
    assert browser is not None
    await browser.start_tracing(page=page, categories=["toplevel"])
    await page.reload()
    await expect(page.get_by_text("Question 199")).to_be_in_viewport()
    await expect(page.locator(".answer").last.locator("mark").last).to_be_in_viewport()
    await until(page, "[...document.querySelectorAll('.prose')].every(prose => prose.querySelector('mark'))")
    assert longest_task_ms(await browser.stop_tracing()) < 500
    await page.get_by_text("Question 0").scroll_into_view_if_needed()
    await expect(page.locator(".answer").first.locator(".hljs-keyword").first).to_be_in_viewport()


async def test_regenerate_edit_and_export(site: Site) -> None:
    """An answer that cannot be had anew, or turns that vanish without a word."""
    page = await site.connected()
    await ask(page, "One")
    await ended(page)
    await ask(page, "Two")
    await ended(page)
    await page.get_by_role("button", name="Regenerate").click()
    await ended(page)
    assert site.tokenizer.chats[-1] == site.tokenizer.chats[-2]
    assert site.engine.submitted[-1].sampling.seed != site.engine.submitted[-2].sampling.seed
    await page.get_by_role("button", name="Edit").first.click()
    await page.locator(".question textarea").fill("Uno")
    await page.locator(".question textarea").press("Enter")
    await ended(page)
    assert site.tokenizer.chats[-1] == [("user", "Uno")]
    await expect(page.locator("#turns .question p")).to_have_text(["Uno"])
    await expect(page.locator("#toast")).to_contain_text("the turns after it were taken back")
    async with page.expect_download() as downloading:
        await page.locator("#export").click()
    download = await downloading.value
    text = (await download.path()).read_text()
    assert "Uno" in text
    assert WORDS.strip() in text


async def test_copy(site: Site) -> None:
    """A button that says that it copied, and did not."""
    page = await site.connected()
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = await ask(page, "One")
    await ended(page)
    await answer.get_by_role("button", name="Copy the answer").click()
    await expect(answer.get_by_role("button", name="Copy the answer")).to_have_text("Copied")
    assert await page.evaluate("navigator.clipboard.readText()") == WORDS


async def test_the_same_without_drafting(launch: Launch) -> None:
    """A speed-up that was not measured, or of another request."""
    text = " ".join(f"w{i}" for i in range(60))
    site = await launch(by_mode(text, text), step_s=0.01)
    page = await site.connected()
    answer = page.locator("#turns > li > .answer")
    await ask(page, "One")
    await ended(page)
    await expect(answer.locator(".line").first).not_to_contain_text("as fast")
    await page.get_by_role("button", name="The same without drafting").click()
    await ended(page)
    await expect(answer.locator(".line").first).to_contain_text(re.compile(r"\d\.\d\u00a0× as fast as without\."))
    await expect(page.locator(".outcome")).to_contain_text("The same text.")
    first, second = site.engine.submitted
    assert (second.mode, second.sampling, second.prompt_ids) == ("plain", first.sampling, first.prompt_ids)
    assert len(site.tokenizer.chats[-1]) == 1


async def test_code_is_coloured_and_its_runs_are_where_they_were(launch: Launch) -> None:
    """Marks that slip by what the formatting leaves out, or colours that are no spans of ours."""
    tokens = [
        "A **",
        "bold",
        "** [",
        "li",
        "nk](https://x.example/a.b) and",
        " code",
        ":\n\n",
        "```python\n",
        "def f",
        "(a):\n",
        "    return",
        " a + 1\n",
        "```",
        "\n\n- one",
        "\n- two",
    ]
    site = await launch(Script(tokens=tokens, rounds=(2,)))
    page = await site.connected()
    answer = await ask(page, "Code")
    await ended(page)
    await expect(answer.locator(".hljs-keyword")).to_have_text(["def", "return"])
    rounds = await answer.evaluate(
        """a => { const by = {}; for (const m of a.querySelectorAll("mark"))
                     (by[m.dataset.round] ??= []).push(m.textContent);
                   return by }"""
    )
    said = {number: "".join(parts).replace(" ", "") for number, parts in rounds.items()}
    # Every second token was drafted; of each what the page shows of it.
    assert said == {"0": "A", "2": "nkand", "3": ":", "4": "deff", "5": "return"}


async def test_nothing_is_sent_silently_or_not_sent_silently(launch: Launch) -> None:
    """A question that Enter swallows."""
    site = await launch(LONG)
    page = await site.connected()
    await ask(page, "One")
    await page.locator("#question").fill("Two")
    await page.locator("#question").press("Enter")
    await expect(page.locator("#hint")).to_contain_text("still being written")
    await expect(page.locator("#question")).to_have_value("Two")
    await page.keyboard.press("Escape")
    await ended(page)
    await site.server.stop()
    await expect(page.locator("#connection")).to_have_attribute("data-phase", "waiting")
    await page.locator("#question").press("Enter")
    await expect(page.locator("#hint")).to_contain_text("not connected")
    site.problems.clear()


async def test_a_wait_is_explained(launch: Launch) -> None:
    """A queue that looks like a page that hangs."""
    site = await launch(Script())
    page = await site.connected()
    site.engine.gate.clear()
    answer = await ask(page, "One")
    await expect(answer.locator(".answer-state")).to_contain_text("waiting for the first text: 2 s")
    site.engine.gate.set()
    await ended(page)


# --- when things go wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "again"),
    [
        (LIMITED, f"limit for one client. Give it {LIMITED.retry_after_s} seconds", True),
        (OverloadedError("the queue is full"), "The server is full at the moment", True),
        (DrainingError("going down"), "shutting down", True),
        (ContextLengthError("9 tokens too many"), "no longer fits the model’s context", False),
    ],
    ids=["limited", "full", "draining", "too-long"],  # an error's own wait is drawn, and would be in the name
)
async def test_a_refusal_is_explained(launch: Launch, error: DsparkError, words: str, again: bool) -> None:
    """A refusal that is shown as code, or after which the page can ask no more."""
    site = await launch(Script(error=error))
    page = await site.connected()
    answer = await ask(page, "Please")
    await expect(answer.locator(".notice")).to_contain_text(words)
    await expect(answer.locator(".notice .detail")).to_contain_text(error.message)
    await ended(page)
    retry = answer.get_by_role("button", name="Try again")
    await expect(retry).to_have_count(int(again))
    if again:
        site.engine.script = Script()
        await retry.click()
        await ended(page)
        await expect(page.locator("#turns .prose")).to_have_text([WORDS.strip()])
        assert site.tokenizer.chats[-1] == [("user", "Please")]


async def test_a_client_at_its_limit_tries_again(launch: Launch) -> None:
    """A 429 that ends the chat instead of being tried again."""
    site = await launch(LONG, max_streams_per_client=1)
    first, second = await site.connected(), await site.connected()
    running = await ask(first, "I came first")
    await running.locator("mark").first.wait_for()
    refused = await ask(second, "Me too")
    words = re.compile(r"limit for one client\. Give it \d seconds, then try again\.")
    await expect(refused.locator(".notice")).to_contain_text(words)
    await ended(second)
    await first.keyboard.press("Escape")
    await ended(first)
    site.engine.script = Script()
    await second.get_by_role("button", name="Try again").click()
    await ended(second)
    await expect(second.locator("#turns .prose")).to_have_text([WORDS.strip()])


async def test_limits_that_the_server_told_are_kept(launch: Launch) -> None:
    """A question that makes the server close the socket, or a limit that is off by one."""
    site = await launch(Script(), max_message_bytes=4096)
    page = await site.connected()
    answer = await ask(page, "ä" * 2500)  # in bytes too long, in characters not
    await expect(answer.locator(".notice")).to_contain_text("too long for one message")
    await expect(page.locator("#connection")).to_have_attribute("data-phase", "open")
    most = str(site.engine.info.max_model_len - 1)
    await expect(page.locator('[name="max_output_tokens"]')).to_have_attribute("max", most)
    answer = await ask(page, "x" * 2100)  # more than the context, which is the server's to refuse
    await expect(answer.locator(".notice")).to_contain_text("no longer fits")
    await setting(page, "max_output_tokens", "100")
    answer = await ask(page, "Short")
    await ended(page)
    assert await answer.locator(".prose").inner_text() == WORDS.strip()


async def test_a_failure_in_the_middle_keeps_the_text(launch: Launch) -> None:
    """Text that disappears with the failure that followed it."""
    site = await launch(Script(fail_after_rounds=2))
    page = await site.connected()
    answer = await ask(page, "Fail")
    await expect(answer.locator(".notice")).to_contain_text("The server failed while answering")
    await ended(page)
    assert await answer.locator(".prose").inner_text() == "w0 w1 w2 w3"
    await expect(answer.locator(".answer-state")).to_have_text("failed")


@pytest.mark.parametrize("by_hand", [True, False], ids=["try-now", "by-itself"])
async def test_a_restart_of_the_server_is_survived(site: Site, by_hand: bool) -> None:
    """A page that stays dead, or forgets its chat, when the server comes back."""
    page = await site.connected()
    await ask(page, "Before")
    await ended(page)
    site.engine.script = LONG
    answer = await ask(page, "Meanwhile")
    await answer.locator("mark").nth(3).wait_for()

    await site.server.stop()
    connection = page.locator("#connection")
    await expect(connection).to_have_attribute("data-phase", "waiting")
    await expect(page.locator("#connection-text")).to_contain_text("Next try in")
    await expect(answer).not_to_have_attribute("aria-busy", "true")
    await expect(answer.locator(".answer-state")).to_have_text("stopped by the server")
    await expect(answer.get_by_role("button", name="Try again")).to_be_visible()
    await expect(page.locator("#send")).to_be_disabled()

    site.engine, site.tokenizer = FakeEngine(Script()), FakeTokenizer()
    config = msgspec.structs.replace(site.server.config, port=site.server.port)
    site.server = Server(config, site.engine, site.tokenizer)
    await site.server.start()
    if by_hand:
        await page.locator("#retry-now").click()
    await expect(connection).to_have_attribute("data-phase", "open")
    await ask(page, "After")
    await ended(page)
    said = site.tokenizer.chats[-1]
    assert said[:2] == [("user", "Before"), ("assistant", WORDS)]
    assert said[-1] == ("user", "After")
    # Chromium reports each socket and probe that found nobody; nothing else may be there.
    assert all("ERR_CONNECTION" in problem or "WebSocket" in problem for problem in site.problems)
    site.problems.clear()


async def test_a_key_is_asked_for_only_where_one_is_needed(launch: Launch) -> None:
    """A key form that nobody sees, takes anything, or keeps the key beyond the tab."""
    site = await launch(Script(), api_key="s3cret-key")
    page = await site.open()
    form = page.locator("#key-form")
    await expect(form).to_be_visible()
    await expect(page.locator("#key")).to_be_focused()
    await page.keyboard.type("not valid, this")
    await page.keyboard.press("Enter")
    await expect(page.locator("#key-error")).to_contain_text("letters, digits")
    await page.locator("#key").fill("wrong")
    await page.keyboard.press("Enter")
    await expect(page.locator("#key-error")).to_contain_text("did not accept")
    await page.locator("#key").fill("s3cret-key")
    await page.keyboard.press("Enter")
    await expect(page.locator("#connection")).to_have_attribute("data-phase", "open")
    await expect(form).to_be_hidden()
    assert await page.evaluate("[localStorage, sessionStorage].map(s => JSON.stringify(s).includes('s3cret'))") == [
        False,
        True,
    ]
    await ask(page, "With a key")
    await ended(page)
    assert all("401" in problem or "WebSocket" in problem for problem in site.problems)
    site.problems.clear()


# --- for everybody --------------------------------------------------------------------------------------------------


async def test_keyboard_alone(launch: Launch) -> None:
    """Something that only a pointer reaches, or a focus that cannot be seen."""
    site = await launch(LONG)
    page = await site.connected()
    await expect(page.locator("#question")).to_be_focused()
    await page.keyboard.type("first line")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("second line")
    await page.keyboard.press("Enter")
    answer = page.locator("#turns .answer").first
    await answer.locator("mark").nth(5).wait_for()
    await page.keyboard.press("Escape")
    await ended(page)
    assert site.tokenizer.chats[-1] == [("user", "first line\nsecond line")]

    await page.keyboard.press("Tab")
    await expect(page.locator("#mode-dspark")).to_be_focused()
    await page.keyboard.press("ArrowRight")
    await expect(page.locator("#mode-plain")).to_be_checked()
    await page.keyboard.press("Tab")
    await expect(page.locator("#settings-toggle")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("#settings")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.locator("#settings")).to_be_hidden()
    await expect(page.locator("#settings-toggle")).to_be_focused()
    await page.keyboard.press("Tab")
    await expect(page.locator("#send")).to_be_focused()

    # The rounds are a slider: it says what the columns show, and marks the round's text.
    await answer.locator(".curious summary").click()
    strip = answer.get_by_role("slider", name="Rounds of this answer")
    await expect(strip).to_have_attribute("aria-valuetext", re.compile(r"^\d+ rounds; in the mean 4\.0 draft tokens"))
    await strip.focus()
    await page.keyboard.press("Home")
    await expect(strip).to_have_attribute("aria-valuetext", re.compile("^Round 1 of .*: 4 drafted, 4 checked, 2 acc"))
    await expect(answer.locator("mark.lit")).to_have_text("word0 word1")
    await page.keyboard.press("ArrowRight")
    await expect(answer.locator("mark.lit")).to_have_count(0)  # it had no run
    await expect(answer.locator(".round-line")).to_contain_text("Round 2: 0 of 4 accepted")

    # Every stop of the tab key is visible while it has the focus.
    await page.locator("#question").focus()
    for _ in range(14):
        await page.keyboard.press("Tab")
        seen = await page.evaluate(
            """() => { const e = document.activeElement;
                       const shown = e.matches("input[type=radio]") ? e.nextElementSibling  // its label
                         : e.matches("#question") ? e.form : e;
                       return e === document.body || getComputedStyle(shown).outlineStyle !== "none" }"""
        )
        assert seen, await page.evaluate("document.activeElement.outerHTML.slice(0, 120)")


CONTRAST = """() => {
  const style = getComputedStyle(document.documentElement);
  const light = name => {
    const hex = style.getPropertyValue(name).trim().slice(1);
    const [r, g, b] = [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16) / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05) };
  const papers = ["--paper", "--sheet", "--run"], out = {};
  for (const paper of papers) {
    const inks = ["--ink", "--soft", "--drafted", "--ok", "--code-word", "--code-text", "--code-number"];
    for (const ink of inks) out[ink + paper] = ratio(ink, paper) / 4.5;
    if (paper !== "--run") out["--edge" + paper] = ratio("--edge", paper) / 3;
  }
  out.lit = ratio("--ink", "--lit") / 4.5;
  out.primary = ratio("--on-primary", "--primary") / 4.5;
  out.alert = Math.min(ratio("--ink", "--alert-paper"), ratio("--soft", "--alert-paper")) / 4.5;
  return Object.entries(out).filter(([, r]) => r < 1);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_light_and_dark_have_enough_contrast(site: Site, scheme: str) -> None:
    """A scheme that does not follow the system's, or text too faint to read."""
    page = await site.connected(color_scheme=scheme)
    background = await page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    ink = await page.evaluate("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
    assert (sum(background) > sum(ink)) == (scheme == "light")
    assert await page.evaluate(CONTRAST) == []


async def test_a_phone_needs_no_sideways_scrolling(launch: Launch) -> None:
    """Something wider than a phone, or too small for a finger."""
    site = await launch(Script(tokens=["averylongword" * 12, " | a | b |", "```\n" + "x" * 300 + "\n```"] * 4))
    page = await site.connected(width=360, height=740, has_touch=True, is_mobile=True, reduced_motion="reduce")
    sideways = "[document.documentElement, document.getElementById('main')].map(e => e.scrollWidth - e.clientWidth)"
    assert await page.evaluate(sideways) == [0, 0]
    await page.locator("#settings-toggle").click()
    assert await page.evaluate(sideways) == [0, 0]
    await page.locator("#settings-toggle").click()
    answer = await ask(page, "long" * 60)
    await ended(page)
    assert await page.evaluate(sideways) == [0, 0]
    await race(page)
    assert await page.evaluate(sideways) == [0, 0]
    small = await page.evaluate(
        """() => [...document.querySelectorAll("button, .segmented label")].filter(e => e.checkVisibility())
                 .filter(e => e.getBoundingClientRect().height < 24).map(e => e.textContent)"""
    )
    assert small == []
    assert await answer.evaluate("a => getComputedStyle(a).animationName") == "none"


async def test_the_page_follows_the_text_only_for_a_reader_at_its_end(launch: Launch) -> None:
    """A page that tears a reader away from what is being read."""
    site = await launch(LONG)
    page = await site.connected(height=500)
    await setting(page, "max_output_tokens", "1900")
    await page.locator("#settings-toggle").click()
    answer = await ask(page, "Long")
    await answer.locator("mark").nth(150).wait_for()
    left = "(e => e.scrollHeight - e.scrollTop - e.clientHeight)(document.getElementById('main'))"
    assert await page.evaluate(left) < 60
    await page.evaluate("document.getElementById('main').scrollTop = 0")
    jump = page.locator("#latest")
    await expect(jump).to_be_visible()
    assert await page.evaluate("document.getElementById('main').scrollTop") == 0
    await jump.click()
    await expect(jump).to_be_hidden()
    assert await page.evaluate(left) < 60
    await page.keyboard.press("Escape")
    await ended(page)


async def test_the_end_of_an_answer_moves_no_reader(launch: Launch) -> None:
    """A page that jumps for somebody who reads in the middle when the last block is rendered for good."""
    site = await launch(step_s=0.01, script=pieces("**Some** words. " * 40 + "\n\n" + "More `words` here. " * 80))
    page = await site.connected(height=500)
    answer = await ask(page, "Long")
    await answer.locator("mark").nth(100).wait_for()
    site.engine.gate.clear()
    main = page.locator("#main")
    await main.evaluate("m => { m.scrollTop = 200 }")
    await expect(page.locator("#latest")).to_be_visible()
    site.engine.gate.set()
    await ended(page)
    assert await main.evaluate("m => m.scrollTop") == 200
    # Who is at the end sees all of it, the buttons too.
    await main.evaluate("m => { m.scrollTop = m.scrollHeight }")
    await ask(page, "Once more")
    await ended(page)
    await expect(page.locator(".curious summary").last).to_be_in_viewport()


PARAGRAPH = [*(f"word{i}{'. ' if i % 12 == 11 else ' '}" for i in range(59)), "end.\n\n"]
PROSE = [
    *PARAGRAPH * 2,
    *(f"- **item {i // 10}**: " if i % 10 == 0 else "on\n" if i % 10 == 9 else f"part{i} " for i in range(1000)), "\n",
    *PARAGRAPH,
    "```python\n", *(f"f({i})  # {i}\n" if i % 2 else f"`{i}` = " if i % 50 < 1 else f"v{i} = " for i in range(2700)),
    "```\n\n",
    *PARAGRAPH * 2,
]  # fmt: skip
# No line ends in it.
ONE_PARAGRAPH = [("w{} ", "**word{}** ", "`word{}`. ")[(i % 90 < 1) + 2 * (i % 12 > 10)].format(i) for i in range(4000)]
FRAMES = """() => { window.gaps = []; let last = performance.now();
  const tick = now => { gaps.push(now - last); last = now; requestAnimationFrame(tick) };
  requestAnimationFrame(tick) }"""
# Not by polling the page, which would be work of its own.
ANSWERED = """() => new Promise(done => { const stop = document.getElementById("stop");
  const look = () => document.querySelector("#turns .answer[data-status]") && done(gaps);
  new MutationObserver(look).observe(stop, { attributes: true }); look() })"""


def longest_task_ms(trace: bytes) -> float:
    """Of a page's main thread, in time of the processor: what others on the machine do is not the page's."""
    events = json.loads(trace)["traceEvents"]
    mains = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name" and "RendererMain" in e["args"]["name"]}
    tasks = [e["tdur"] / 1000 for e in events if (e["pid"], e["tid"]) in mains and "tdur" in e]
    assert len(tasks) > 1000  # else it was not the page that was traced
    return max(tasks)


@pytest.mark.parametrize("tokens", [PROSE[:4000], ONE_PARAGRAPH], ids=["mixed", "one-paragraph"])
async def test_a_long_answer_does_not_slow_the_page(launch: Launch, tokens: list[str]) -> None:
    """Work that grows with the answer: 4,000 tokens at 600 a second never keep the page busy for 50 ms at once.

    Prose, a list of a thousand tokens and a program of 2,700; or a single paragraph. In time of the processor, which a
    busy sibling makes longer: it is 13 to 20 ms on an idle machine.
    """
    engine = FakeEngine(Script(tokens=tokens, rounds=(3,)), step_s=0.0047, info=model_info(max_model_len=8192))
    page = await (await launch(engine)).connected()
    browser = page.context.browser
    assert browser is not None
    await setting(page, "max_output_tokens", "4000")
    await page.locator("#settings-toggle").click()
    await page.evaluate(FRAMES)
    await browser.start_tracing(page=page, categories=["toplevel"])
    await ask(page, "Long")
    gaps = await page.evaluate(ANSWERED)
    assert longest_task_ms(await browser.stop_tracing()) < 50
    await expect(page.locator("#turns .answer")).to_have_attribute("data-status", "completed")
    assert await page.locator("#turns mark").count() > 1300
    # Frames are drawn by other processes, which share the cores with the server and with others' work.
    assert sum(gap > 50 for gap in gaps) < len(gaps) / 20


AXE = Path(__file__).parent / "vendor" / "axe-core-4.14.1" / "axe.min.js"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
async def test_axe_finds_nothing_serious(launch: Launch, scheme: str, width: int) -> None:
    """What a checker of accessibility finds in any state of the page."""
    site = await launch(
        pieces("Some **bold** and\n\n```python\ndef f(): return 1  # one\n```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n")
    )
    page = await site.connected(width=width, height=844, color_scheme=scheme, bypass_csp=True)
    source = AXE.read_text()

    async def check(where: str) -> None:
        await page.evaluate(source)
        found = await page.evaluate("axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes[0].html]))")
        assert [v for v in found if v[0] in ("serious", "critical")] == [], where

    await check("intro")
    await page.locator("#settings-toggle").click()
    answer = await ask(page, "One")
    await ended(page)
    await figures(answer)
    await page.get_by_role("button", name="The same without drafting").click()
    await ended(page)
    await answer.first.locator("mark").first.focus()
    await check("chat")
    await race(page)
    await check("race")
    await page.goto(f"{site.server.url}help.html")
    await expect(page.locator("pre")).to_contain_text(f"curl {site.server.url}v1/chat/completions")
    await check("help")


# --- the modules without a page -------------------------------------------------------------------------------------


async def test_lanes_give_each_event_to_its_response(site: Site) -> None:
    """An event that lands in another lane's answer, or an answer that never ends."""
    page = await site.open()
    heard = await page.evaluate(
        """async () => {
          const { Lanes, ResponseState } = await import("/protocol.js");
          const heard = [], lanes = new Lanes();
          const add = (lane, id) => lanes.add(lane, new ResponseState(id, {
            delta: text => heard.push(id + ":" + text),
            end: end => heard.push(id + " " + end.status + (end.error ? " " + end.error.code : "")) }));
          add("a", "e1"); add("a", "e2"); add("b", "e3"); add("b", "e4");
          const say = (stream_id, type, more = {}) => lanes.receive({ type, stream_id, ...more });
          say("a", "response.created", { response: { id: "r1" } });
          say("b", "error", { event_id: "e3", error: { code: "full" } });
          say("a", "error", { event_id: "cancel-1", error: { code: "late" } });   // is about no response
          say("a", "response.output_text.delta", { delta: "x" });
          say("a", "response.completed", { response: {} });
          say("a", "response.output_text.delta", { delta: "y" });
          say("zzz", "response.output_text.delta", { delta: "nobody's" });
          lanes.lose(); lanes.lose();
          return heard;
        }"""
    )
    assert heard == ["e3 failed full", "e1:x", "e1 completed", "e2:y", "e2 lost", "e4 lost"]


async def test_origins_are_found_in_whichever_order_events_come(site: Site) -> None:
    """Origins that slip when a step is late, early or missing."""
    page = await site.open()
    marks = await page.evaluate(
        """async () => {
          const { TextByOrigin } = await import("/origin.js");
          const run = events => {
            const text = new TextByOrigin(), spans = [];
            for (const [kind, value, round] of events) {
              if (kind === "delta") text.delta(value); else text.step(round, value);
              spans.push(...text.take().map(s => (s.origin ?? "?")[0] + s.text));
            }
            return spans.join("|") + "+" + text.rest;
          };
          const one = [["ab", true], ["c", false]], two = [["de", true], ["f", false]];
          return [
            run([["delta", "abc"], ["step", one, 0], ["delta", "def"], ["step", two, 1]]),
            run([["step", one, 0], ["step", two, 1], ["delta", "abcd"], ["delta", "ef"]]),
            run([["delta", "abcdef"], ["step", two, 1]]),
            run([["delta", "abcdef"], ["step", one, 0], ["step", [["", true]], 1]]),
          ];
        }"""
    )
    assert marks == ["dab|oc|dde|of+", "dab|oc|dde|of+", "oabc|dde|of+", "dab|oc+def"]


async def test_figures_leave_the_wait_for_the_first_round_out(site: Site) -> None:
    """A speed that counts the wait for the first round as decoding."""
    page = await site.open()
    now = await page.evaluate(
        """async () => {
          const { Figures } = await import("/metrics.js"), figures = new Figures();
          figures.sent(1000);
          const step = (accepted, scheduled, at) => figures.step({ accepted, scheduled, streams: 2 }, at);
          step(4, 5, 3000); step(1, 5, 3500); step(0, 2, 4000);
          return figures.snapshot();
        }"""
    )
    assert now["first_ms"] == 2000
    assert now["tokens_per_s"] == 3.0  # two and one tokens in the second after the first round
    assert (now["tau"], now["ell"], now["tokens"], now["streams"]) == (1 + 5 / 3, 4.0, 8, 2)


async def test_figures_count_the_token_that_the_prompt_gives(site: Site) -> None:
    """A speed or a count that is off by the token that is in no round."""
    page = await site.open()
    now = await page.evaluate(
        """async () => {
          const { Figures } = await import("/metrics.js"), figures = new Figures();
          figures.sent(1000); figures.text(2000); figures.text(3000);
          figures.step({ accepted: 3, scheduled: 5, streams: 1 }, 3000, true);
          return figures.snapshot();
        }"""
    )
    assert (now["first_ms"], now["decode_ms"], now["tokens"], now["tokens_per_s"]) == (1000, 1000, 5, 4.0)


async def test_the_headers_let_nothing_foreign_in(site: Site) -> None:
    """A policy that the page had to be loosened for."""
    page = await site.connected()
    response = await page.goto(site.server.url)
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "base-uri 'none'" in policy
    assert await page.evaluate("document.querySelectorAll('[style]:not(#question, #tip), style').length") == 0
