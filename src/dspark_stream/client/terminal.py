"""``dspark-stream chat``: talk to a running service in the terminal.

The socket lives on a thread of its own, so that it answers the service's pings while a person thinks at the
prompt; the main thread reads lines, shows text and is where Ctrl-C arrives.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import queue
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dspark_stream.client import words
from dspark_stream.client.connection import (
    TERMINAL_EVENTS,
    ClientError,
    DsparkClient,
    Event,
    RefusedError,
    ResponseStream,
    UnreachableError,
)
from dspark_stream.client.words import Figures
from dspark_stream.console import DIM, Colour, coloured, paint, printable
from dspark_stream.errors import DsparkError

T = TypeVar("T")

EXIT_REFUSED = 2
OWN = {
    "instructions": "/system",
    "model": "/model",
    "dspark": "/plain and /dspark",
    **dict.fromkeys(("type", "event_id", "stream_id", "input", "previous_response_id", "store", "generate"), ""),
}
"""Fields of a request that `/set` leaves alone, and what sets them instead."""
SPELLINGS = {"max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens"}


@dataclass
class ChatOptions:
    """What the command line says."""

    url: str
    question: str = ""
    """Asked at once, and nothing else is; empty: questions are read from stdin."""
    api_key: str = ""
    instructions: str = ""
    mode: str = "dspark"
    verification: str = ""
    """Empty: the service's choice."""
    colour: Colour = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    """Sampling fields as the API has them."""


class _LoopThread:
    """An event loop on a thread; `call` waits for a coroutine there and can be interrupted."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="chat socket", daemon=True).start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


class _Printer:
    """Shows an answer as it comes; where it is tinted, each run that one verification accepted stands out."""

    def __init__(self, colour: Colour) -> None:
        self.tinted = coloured(sys.stdout, colour)
        self.text = ""
        self._pending = ""

    def delta(self, text: str) -> None:
        self.text += text
        if self.tinted:
            self._pending += text  # shown when its round's pieces are known
        else:
            _show(text)

    def step(self, text: str, pieces: list[tuple[str, bool]]) -> None:
        at = self._pending.find(text) if self.tinted and text else -1
        if at < 0:
            return
        _show(self._pending[:at])
        self._pending = self._pending[at + len(text) :]
        print(words.tinted(pieces), end="", flush=True)

    def finish(self) -> None:
        _show(self._pending)
        self._pending = ""
        print(flush=True)


@dataclass
class _Chat:
    options: ChatOptions
    thread: _LoopThread
    client: DsparkClient
    history: list[dict[str, str]] = field(default_factory=list)
    totals: dict[str, Figures] = field(default_factory=dict)

    def command(self, line: str) -> bool:
        """Do what a /command says; False ends the chat."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "/quit" | "/exit":
                return False
            case "/plain" | "/dspark" as chosen:
                self.options.mode = chosen[1:]
                self.note(f"the next answers are decoded in {self.options.mode} mode")
            case "/set":
                self.note(self._set(rest))
            case "/model":
                self.note(self._model(rest))
            case "/new":
                self.history.clear()
                self.note("a new conversation")
            case "/save" | "/save!":
                self.note(self._save(rest, replace=word == "/save!"))
            case "/stats":
                self.note(words.stats(self.totals))
            case "/system":
                self.options.instructions = rest
                self.note("the system message is " + (repr(rest) if rest else "none"))
            case "/help":
                self.note(words.HELP)
            case _:
                self.note(f"{word} is no command. These are:\n{words.HELP}")
        return True

    def _set(self, rest: str) -> str:
        """Set a sampling value that the service takes, and say what holds."""
        chosen, recommended = self.options.settings, self.client.hello["sampling"]
        name, _, text = rest.replace("=", " ", 1).partition(" ")
        name, text = SPELLINGS.get(name, name), text.strip()
        if not name:
            return words.settings(chosen, recommended)
        if name in OWN:
            return f"`{name}` is not set here" + (f": {OWN[name]} does it" if OWN[name] else ", the chat fills it in")
        if not text:
            return f"a value is missing: /set {name} VALUE, or /set {name} null for the service's own"
        wanted = {**chosen, name: _value(text)}
        try:
            # Nothing is generated, but all is checked: what is wrong is said in the service's own words.
            self._run({**self._body(wanted), "input": [], "generate": False})
        except RefusedError as error:
            if error.param == name and isinstance(wanted[name], str) and "got `str`" in str(error):
                return f"refused: {text!r} is no value of `{name}`; /set shows what it is now"
            return f"refused: {error}" + ("" if name in words.SETTINGS else "; /set lists those that there are")
        self.options.settings = {key: value for key, value in wanted.items() if value is not None}
        if wanted[name] is None:
            return f"{name} is the service's own again"
        return f"{name} is {json.dumps(wanted[name], ensure_ascii=False)}"

    def _model(self, name: str) -> str:
        hello = self.client.hello
        if name and name != hello["model"]:
            return (
                f"this service serves one model, {hello['model']}. Another one needs a service of its own: "
                f"dspark-stream serve {name} --port 8001, then dspark-stream chat --url ws://127.0.0.1:8001"
            )
        return f"{words.served(hello)}; the only model of this service"

    def _save(self, name: str, *, replace: bool) -> str:
        path = Path(name).expanduser()
        if not name or path.suffix.lower() not in words.SAVED_AS:
            return f"{name or 'where to'}? A file that ends in {' or '.join(words.SAVED_AS)}, as in: /save talk.md"
        system = self.options.instructions
        turns = [{"role": "system", "content": system}, *self.history] if system else self.history
        if not self.history:
            return "nothing was said yet"
        model, chosen = self.client.hello["model"], self.options.settings
        try:
            with path.open("w" if replace else "x", encoding="utf-8") as file:
                file.write(words.conversation(turns, path.suffix.lower(), model=model, chosen=chosen))
        except FileExistsError:
            return f"{path} is there already; /save! {name} replaces it"
        except OSError as error:
            return f"{path} cannot be written: {error.strerror}"
        return f"saved to {path}"

    def ask(self, question: str) -> bool:
        """Ask, show the answer, and remember both; a question that is refused leaves no trace. Whether it was
        answered.
        """
        self.history.append({"role": "user", "content": question})
        printer = _Printer(self.options.colour)
        try:
            final = self._run(self._body(self.options.settings, steps=printer.tinted), printer)
        except RefusedError as error:
            self.history.pop()
            self.note(f"refused: {error}")
            return False
        finally:
            printer.finish()
        response = final["response"]
        if printer.text:
            self.history.append({"role": "assistant", "content": printer.text})
        else:
            self.history.pop()
        if response.get("error"):
            self.note(f"failed: {response['error']['message']}")
        mine, mode, hello = Figures(), self.options.mode, self.client.hello
        for figures in (mine, self.totals.setdefault(mode, Figures())):
            figures.add(**_figures(response))
        said = mine.words(words.why_none(mode, hello["gamma"], hello["schedule"]))
        ending = {"response.cancelled": ", stopped", "response.incomplete": ", cut at the limit"}
        self.note(f"[{said}{ending.get(final['type'], '')}]")
        return not response.get("error")

    def _run(self, body: Event, printer: _Printer | None = None) -> Event:
        """Send ``body``, show what comes, and return the terminal event."""
        events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        stream = self.thread.call(self.client.create(body))
        asyncio.run_coroutine_threadsafe(_pump(stream, events), self.thread.loop)
        asked_to_stop = False
        while True:
            try:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                if event["type"] == "response.output_text.delta" and printer is not None:
                    printer.delta(event["delta"])
                elif event["type"] == "dspark:step" and printer is not None:
                    printer.step(event["text"], event["pieces"])
                elif event["type"] in TERMINAL_EVENTS:
                    return event
            except KeyboardInterrupt:
                if asked_to_stop:
                    raise  # twice: the service does not answer, leave
                asked_to_stop = True
                self.thread.call(stream.cancel())

    def _body(self, settings: dict[str, Any], *, steps: bool = False) -> Event:
        options = self.options
        dspark: Event = {"mode": options.mode}
        if options.verification:
            dspark["verification"] = options.verification
        if steps:
            dspark["steps"] = True
        body: Event = {**settings, "input": list(self.history), "store": False, "dspark": dspark}
        if options.instructions:
            body["instructions"] = options.instructions
        return body

    def note(self, text: str) -> None:
        """What is not the answer goes to stderr, so that answers can be piped on."""
        print(paint(text, DIM, sys.stderr, self.options.colour), file=sys.stderr, flush=True)


def _show(text: str) -> None:
    """Text of an answer, as it comes."""
    print(printable(text), end="", flush=True)


def _value(text: str) -> Any:
    """A JSON value, or else the text as it stands: quotes are for what would read as something else."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _figures(response: Event) -> dict[str, Any]:
    usage, stats = response.get("usage") or {}, response.get("dspark") or {}
    named = {name: stats.get(name, 0) for name in ("rounds", "drafted", "accepted", "decode_ms")}
    return {"tokens": usage.get("output_tokens", 0), **named}


async def _pump(stream: ResponseStream, events: queue.SimpleQueue[Event | BaseException]) -> None:
    try:
        async for event in stream:
            events.put(event)
    except DsparkError as error:
        events.put(error)


def chat(options: ChatOptions) -> int:
    """Run the chat until its input ends; returns the exit code.

    Raises:
        ClientError: no service there, or the connection was lost.
    """
    thread = _LoopThread()
    try:
        try:
            client = thread.call(DsparkClient.connect(options.url, api_key=options.api_key))
        except UnreachableError as error:
            raise UnreachableError(
                f"{error}; --url says where it is, and a service starts with: dspark-stream serve"
            ) from None
        try:
            if not _talk(_Chat(options, thread, client)):
                return EXIT_REFUSED
        finally:
            with suppress(ClientError):
                thread.call(client.close())
    finally:
        thread.stop()
    return 0


def _talk(session: _Chat) -> bool:
    """Until its input ends; whether the one question, where there is one, was answered."""
    if session.options.question:
        return session.ask(session.options.question)
    hello = session.client.hello
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            importlib.import_module("readline")  # its import gives input() editing and a history
        session.note(f"{hello['model']}, drafter {hello['drafter'] or 'none'}; /help lists the commands")
    while True:
        try:
            line = (input("> ") if interactive else _piped_line()).strip()
        except EOFError:
            if interactive:
                session.note("")  # the shell's prompt begins on a line of its own
            return True
        except KeyboardInterrupt:
            session.note("\n(/quit or Ctrl-D leaves)")
            continue
        if line.startswith("/"):
            if not session.command(line):
                return True
        elif line:
            session.ask(line)


def _piped_line() -> str:
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line
