"""Our own client and the terminal chat, against the real server with a fake engine behind it."""

import asyncio
import io
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
from fakes import FakeEngine, Script
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
    assert "accepted length" in said.err
    assert "plain: 1 answers" in said.err
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


async def test_origins_are_underlined_on_a_terminal(running: Running, monkeypatch):
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    assert await talk(monkeypatch, "hello\n", url=running.url, origin=True) == 0
    # Rounds of 3, 1 and 2 tokens: the last of each is the target's own.
    assert shown.getvalue().startswith("\x1b[4mw0 \x1b[0m\x1b[4mw1 \x1b[0mw2 w3 \x1b[4mw4 \x1b[0mw5 ")


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
    assert "dspark: 1 answers" in said.err
    assert list(engine.finished.values()) == ["cancelled"]


async def test_a_chat_without_a_service_says_how_to_start_one():
    with pytest.raises(UnreachableError, match="dspark-stream serve"):
        await asyncio.to_thread(chat, ChatOptions(url="ws://127.0.0.1:9"))
