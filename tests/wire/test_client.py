"""Our own client and the terminal chat, against the real server with a fake engine behind it."""

import asyncio
import inspect
import io
import json
import re
import sys

import pytest

from dspark_stream.client import terminal
from dspark_stream.client.connection import (
    ConnectionLostError,
    DsparkClient,
    RefusedError,
    UnreachableError,
)
from dspark_stream.client.terminal import ChatOptions, chat
from dspark_stream.client.words import Figures, tinted, why_none
from dspark_stream.types import RecommendedSampling
from fakes import FakeEngine, Script, model_info
from wire.harness import Launch, Running, check_response, text_of

TEXT = "".join(f"w{i} " for i in range(10))


async def collect(stream) -> list[dict]:
    return [event async for event in stream]


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_a_response_from_first_to_last_event(running: Running, encoding):
    async with await DsparkClient.connect(running.url, encoding=encoding) as client:
        assert client.hello["model"] == "fake-135m"
        events = await collect(await client.create({"input": "hello", "dspark": {"steps": True}}))
    check_response(events)
    assert text_of(events) == TEXT
    assert any(event["type"] == "dspark:step" for event in events)


async def test_lanes_run_side_by_side_and_each_stream_gets_its_own(running: Running):
    async with await DsparkClient.connect(running.ws_url) as client:
        streams = [await client.create({"input": f"hello {i}"}) for i in range(8)]
        for events in await asyncio.gather(*map(collect, streams)):
            check_response(events)
    assert len({stream.response_id for stream in streams}) == 8


async def test_one_lane_is_first_in_first_out(running: Running):
    async with await DsparkClient.connect(running.url) as client:
        streams = [await client.create({"input": "hello"}, lane="mine") for _ in range(3)]
        answers = await asyncio.gather(*map(collect, streams))
    for stream, events in zip(streams, answers, strict=True):
        check_response(events)
        assert events[0]["response"]["id"] == stream.response_id


async def test_a_refused_request_raises_what_the_service_said(running: Running):
    async with await DsparkClient.connect(running.url) as client:
        good = await client.create({"input": "hello"})
        with pytest.raises(RefusedError) as caught:
            await collect(await client.create({"input": "hello", "temperature": -1}))
        assert (caught.value.status, caught.value.param) == (400, "temperature")
        check_response(await collect(good))


async def test_cancel_before_and_after_the_response_has_an_id(launch: Launch):
    engine = FakeEngine(Script(tokens=("w ",) * 100_000))
    running = await launch(engine)
    async with await DsparkClient.connect(running.url) as client:
        early = await client.create({"input": "hello"})
        await early.cancel()
        assert (await collect(early))[-1]["type"] == "response.cancelled"
        late = await client.create({"input": "hello"})
        events = []
        async for event in late:
            events.append(event)
            if event["type"] == "response.output_text.delta" and len(events) < 10:
                await late.cancel()
        assert events[-1]["type"] == "response.cancelled"


async def test_streams_end_when_the_connection_does(launch: Launch):
    engine = FakeEngine(Script(tokens=("w ",) * 100_000))
    running = await launch(engine)
    client = await DsparkClient.connect(running.url)
    stream = await client.create({"input": "hello"})
    await client.close()
    with pytest.raises(ConnectionLostError):
        await collect(stream)
    with pytest.raises(ConnectionLostError):
        await client.create({"input": "again"})


async def test_who_cannot_be_reached_says_why(launch: Launch):
    with pytest.raises(UnreachableError, match="Connection refused"):
        await DsparkClient.connect("ws://127.0.0.1:9")
    with pytest.raises(UnreachableError, match="is not an address"):
        await DsparkClient.connect("gopher://127.0.0.1")
    running = await launch(api_key="right")
    with pytest.raises(UnreachableError, match="--api-key"):
        await DsparkClient.connect(running.url, api_key="wrong")
    async with await DsparkClient.connect(running.url, api_key="right") as client:
        check_response(await collect(await client.create({"input": "hello"})))


# --- the chat ------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def talk(monkeypatch, lines: str, **options) -> int:
    """Run the chat on a thread, with ``lines`` as its piped input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return await asyncio.to_thread(chat, ChatOptions(**options))


async def test_a_piped_chat_puts_answers_on_stdout_alone(running: Running, monkeypatch, capsys):
    lines = "hello\n/plain\nand then?\n\n/stats\n/new\nhello again\n/nonsense\n"
    assert await talk(monkeypatch, lines, url=running.url, instructions="be brief") == 0
    said = capsys.readouterr()
    assert said.out == f"{TEXT}\n" * 3
    assert "[50 % of 10 tokens guessed ahead, 2.00 tokens a round, 4500.0 tokens a second]" in said.err
    assert "plain: 1 answer, " in said.err
    assert "over these answers dspark was 1.00 × as fast as plain" in said.err
    assert "/nonsense is no command" in said.err
    assert "/quit" in said.err
    assert "\x1b" not in said.out + said.err
    assert [request.mode for request in running.engine.submitted] == ["dspark", "plain", "plain"]
    turns = [[role for role, _ in chat if role != "system"] for chat in running.tokenizer.chats]
    assert turns == [["user"], ["user", "assistant", "user"], ["user"]]
    assert all(chat[0] == ("system", "be brief") for chat in running.tokenizer.chats)


async def test_the_system_message_can_be_changed(running: Running, monkeypatch, capsys):
    lines = "hello\n/system be long\nhello\n/system\nhello\n"
    assert await talk(monkeypatch, lines, url=running.url, instructions="be brief") == 0
    systems = [[text for role, text in chat if role == "system"] for chat in running.tokenizer.chats]
    assert systems == [["be brief"], ["be long"], []]


async def test_one_question_is_asked_and_nothing_is_read(running: Running, monkeypatch, capsys):
    assert await talk(monkeypatch, "never read\n", url=running.url, question="hello") == 0
    assert capsys.readouterr().out == f"{TEXT}\n"
    assert len(running.engine.submitted) == 1


async def test_a_question_that_is_refused_is_a_failure(running: Running, monkeypatch, capsys):
    assert await talk(monkeypatch, "", url=running.url, question="word " * 3000) == 2
    assert "refused: " in capsys.readouterr().err


async def test_quit_leaves_the_rest_unread(running: Running, monkeypatch, capsys):
    assert await talk(monkeypatch, "/quit\nhello\n", url=running.url) == 0
    assert capsys.readouterr().out == ""


async def test_a_refused_question_is_forgotten(running: Running, monkeypatch, capsys):
    lines = "word " * 3000 + "\nhello\n"
    assert await talk(monkeypatch, lines, url=running.url) == 0
    said = capsys.readouterr()
    assert "refused: " in said.err
    assert [role for role, _ in running.tokenizer.chats[-1]] == ["user"]
    assert said.out.endswith(f"{TEXT}\n")


@pytest.mark.parametrize(
    ("environ", "code"),
    [
        ({"TERM": "vt100"}, "4"),
        ({"TERM": "xterm-256color"}, "38;5;255;48;5;17"),
        ({"TERM": "xterm", "COLORTERM": "truecolor", "COLORFGBG": "0;15"}, "38;5;16;48;5;153"),
    ],
)
async def test_accepted_runs_are_tinted_on_a_terminal(running: Running, monkeypatch, environ, code):
    for name in ("NO_COLOR", "TERM", "COLORTERM", "COLORFGBG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    assert await talk(monkeypatch, "hello\n", url=running.url) == 0
    # Rounds of 3, 1 and 2 tokens: the last of each is the target's own.
    on, off = f"\x1b[{code}m", "\x1b[0m"
    assert shown.getvalue().startswith(f"{on}w0 w1 {off}w2 w3 {on}w4 {off}w5 ")
    assert shown.getvalue().replace(on, "").replace(off, "") == f"{TEXT}\n"


@pytest.mark.parametrize(
    ("no_color", "term", "colour", "stdout", "tinted"),
    [
        ("", "xterm", "auto", Terminal, True),
        ("1", "xterm", "auto", Terminal, False),
        ("", "dumb", "auto", Terminal, False),
        ("", "xterm", "never", Terminal, False),
        ("", "xterm", "auto", io.StringIO, False),
        ("1", "xterm", "always", io.StringIO, True),
    ],
)
async def test_whoever_wants_no_colours_gets_none(
    running: Running, monkeypatch, no_color, term, colour, stdout, tinted
):
    """Guards against codes in a file, and against rounds that are asked for and not shown."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", shown := stdout())
    assert await talk(monkeypatch, "hello\n", url=running.url, colour=colour) == 0
    assert ("\x1b" in shown.getvalue()) is tinted
    assert [request.record_rounds for request in running.engine.submitted] == [tinted]


def test_a_tint_ends_where_a_line_does(monkeypatch):
    """Guards against a terminal that fills the rest of a line with the background."""
    monkeypatch.setenv("TERM", "vt100")
    monkeypatch.delenv("COLORTERM", raising=False)
    pieces = [("a\n", True), ("\x1b[2Jb", True), ("c", False)]
    assert tinted(pieces) == "\x1b[4ma\x1b[0m\n\x1b[4m[2Jb\x1b[0mc"


async def test_set_takes_what_the_service_takes(running: Running, monkeypatch, capsys):
    lines = "/set temperature 0.5\n/set max_tokens=4\n/set seed 7\n/set stop w9\n/set\nhello\n"
    lines += "/set temperature null\n/set temperature\nhello\n"
    assert await talk(monkeypatch, lines, url=running.url, settings={"top_p": 0.9}) == 0
    said = capsys.readouterr()
    first, second = (request.sampling for request in running.engine.submitted)
    assert (first.temperature, first.max_tokens, first.seed, first.stop, first.top_p) == (0.5, 4, 7, ("w9",), 0.9)
    assert (second.temperature, second.max_tokens, second.seed, second.top_p) == (1.0, 4, 7, 0.9)
    assert [request.verification for request in running.engine.submitted] == ["coupled", "coupled"]  # for the seed
    assert said.out == "w0 w1 w2 w3 \n" * 2
    for line in ("temperature         0.5", 'stop                "w9"', "top_k               off (default)"):
        assert line in said.err.split("\n")
    assert "temperature is the service's own again" in said.err
    assert "a value is missing" in said.err
    assert "cut at the limit" in said.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("temperature 2.5", "`temperature` must be from 0 to 2, but is 2.5"),
        ("max_tokens 0", "`max_output_tokens` must be at least 1"),
        ("temprature 1", "`temprature` is not a known field; /set lists those that there are"),
        ("temperature hot", "'hot' is no value of `temperature`"),
        ("tools [1]", "calls of tools are not read"),
        ("instructions x", "/system does it"),
        ("input x", "the chat fills it in"),
    ],
)
async def test_set_says_what_is_wrong_in_the_services_words(running: Running, monkeypatch, capsys, line, words):
    assert await talk(monkeypatch, f"/set {line}\nhello\n", url=running.url) == 0
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == f"{TEXT}\n"  # nothing of it was kept


async def test_set_shows_what_is_recommended_for_the_model(launch: Launch, monkeypatch, capsys):
    info = model_info(sampling=RecommendedSampling(temperature=0.7, top_k=20))
    running = await launch(FakeEngine(info=info))
    assert await talk(monkeypatch, "/set\n", url=running.url) == 0
    lines = capsys.readouterr().err.split("\n")
    assert "temperature         0.7 (recommended for the model)" in lines
    assert "top_p               1 (default)" in lines


async def test_model_says_what_is_served_and_that_it_is_the_only_one(running: Running, monkeypatch, capsys):
    assert await talk(monkeypatch, "/model\n/model qwen3-0.6b\n", url=running.url) == 0
    said = capsys.readouterr().err
    assert "fake-135m, drafter fake-drafter (γ = 4), schedule adaptive, 2048 tokens of context" in said
    assert "serves one model, fake-135m" in said
    assert "dspark-stream serve qwen3-0.6b" in said


async def test_a_conversation_is_saved_and_nothing_is_overwritten_unasked(running, monkeypatch, capsys, tmp_path):
    page, data, other = tmp_path / "talk.md", tmp_path / "talk.JSON", tmp_path / "talk.txt"
    lines = f"/save {page}\nhello\n/save {page}\n/save {data}\n/save {other}\n/save\n"
    lines += f"again\n/save {page}\n/save {tmp_path}/no/such.md\n"
    assert await talk(monkeypatch, lines, url=running.url, instructions="be brief", settings={"seed": 7}) == 0
    said = capsys.readouterr().err
    assert "nothing was said yet" in said
    assert f"{page} is there already; /save! {page} replaces it" in said
    assert "ends in .md or .json" in said
    assert "cannot be written: No such file or directory" in said
    assert not other.exists()
    assert page.read_text() == (
        f"# A conversation with fake-135m\n\n## System\n\nbe brief\n\n## User\n\nhello\n\n## Assistant\n\n{TEXT}\n"
    )
    saved = json.loads(data.read_text())
    assert [turn["role"] for turn in saved["messages"]] == ["system", "user", "assistant"]
    assert (saved["model"], saved["settings"], saved["messages"][2]["content"]) == ("fake-135m", {"seed": 7}, TEXT)
    assert await talk(monkeypatch, f"bye\n/save! {page}\n", url=running.url) == 0
    assert "bye" in page.read_text()
    assert "hello" not in page.read_text()


async def test_help_lists_every_command(running: Running, monkeypatch, capsys):
    """Guards against a command that nobody finds, and one that is listed and gone."""
    assert await talk(monkeypatch, "/help\n", url=running.url) == 0
    listed = set(re.findall(r"(?m)(?:^|; )(/[a-z]+!?)", capsys.readouterr().err))
    known = set(re.findall(r'"(/[a-z]+!?)"', inspect.getsource(terminal._Chat.command)))
    assert listed == known - {"/exit"}  # another word for /quit


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"drafter": None, "gamma": 0}, "there is no drafter"),
        ({"schedule": "fixed:0"}, "drafting is switched off"),
        ({}, "did not seem to pay"),
    ],
)
async def test_an_answer_without_drafts_says_why(info, words):
    figures = Figures()
    figures.add(tokens=3, rounds=2, drafted=0, accepted=0, decode_ms=1.0)
    said = figures.words(why_none("dspark", model_info(**info).gamma, model_info(**info).schedule))
    assert said.startswith("3 tokens, nothing ")
    assert words in said
    assert said.endswith(", 2000.0 tokens a second")


def test_what_a_stop_cut_off_was_not_guessed():
    """The page counts the same way: the round's own token goes first, then accepted ones."""
    figures = Figures()
    figures.add(tokens=4, rounds=1, drafted=5, accepted=5, decode_ms=0.0)
    assert figures.words().startswith("75 % of 4 tokens guessed ahead")


async def test_what_a_model_writes_does_not_steer_the_terminal(launch: Launch, monkeypatch, capsys):
    running = await launch(Script(tokens=("a\x1b[2J", "\x9b31mb\n", "\tc\r\x07")))
    assert await talk(monkeypatch, "hello\n", url=running.url) == 0
    assert capsys.readouterr().out == "a[2J31mb\n\tc\n"


async def test_ctrl_c_stops_the_answer_and_not_the_program(launch: Launch, monkeypatch, capsys):
    engine = FakeEngine(Script(tokens=("w ",) * 100_000))
    running = await launch(engine)
    real = terminal._Printer.delta
    pressed = []

    def delta(self, text):
        real(self, text)
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal._Printer, "delta", delta)
    assert await talk(monkeypatch, "hello\n/stats\n", url=running.url) == 0
    said = capsys.readouterr()
    assert "stopped" in said.err
    assert "dspark: 1 answer, " in said.err
    assert list(engine.finished.values()) == ["cancelled"]


async def test_a_chat_without_a_service_says_how_to_start_one():
    with pytest.raises(UnreachableError, match="dspark-stream serve"):
        await asyncio.to_thread(chat, ChatOptions(url="ws://127.0.0.1:9"))
