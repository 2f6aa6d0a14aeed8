"""``dspark-stream chat``: talk to a running service in the terminal.

The socket lives on a thread of its own, so that it answers the service's pings while a person thinks at the
prompt; the main thread reads lines, shows text and is where Ctrl-C arrives.
"""

from __future__ import annotations

import asyncio
import importlib
import queue
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dspark_stream.client.connection import (
    TERMINAL_EVENTS,
    ClientError,
    DsparkClient,
    Event,
    RefusedError,
    ResponseStream,
    UnreachableError,
)
from dspark_stream.console import paint, printable
from dspark_stream.errors import DsparkError

T = TypeVar("T")

EXIT_REFUSED = 2

HELP = """\
/plain   next answers one token a pass        /new    forget the conversation
/dspark  next answers with speculation        /stats  figures of this session
/system  what follows is the system message   /help   this
/quit    leave (or Ctrl-D)                    Ctrl-C  stop the answer"""


@dataclass
class ChatOptions:
    """What the command line says."""

    url: str
    question: str = ""
    """Asked at once, and nothing else is; empty: questions are read from stdin."""
    api_key: str = ""
    instructions: str = ""
    mode: str = "dspark"
    verification: str = "rejection"
    origin: bool = False
    max_output_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


@dataclass
class _Totals:
    """Sums over the answers of one mode."""

    answers: int = 0
    tokens: int = 0
    timed_tokens: int = 0
    decode_ms: float = 0.0
    rounds: int = 0
    accepted: int = 0

    def add(self, response: Event) -> None:
        usage, stats = response.get("usage") or {}, response.get("dspark") or {}
        tokens = usage.get("output_tokens", 0)
        self.answers += 1
        self.tokens += tokens
        # The first token comes out of the prompt's own pass, before decoding time begins.
        self.timed_tokens += max(tokens - 1, 0)
        self.decode_ms += stats.get("decode_ms", 0.0)
        self.rounds += stats.get("rounds", 0)
        self.accepted += stats.get("accepted", 0)

    def __str__(self) -> str:
        parts = [f"{self.tokens} tokens"]
        if self.decode_ms > 0 and self.timed_tokens:
            parts.append(f"{1000 * self.timed_tokens / self.decode_ms:.1f} tokens/s")
        if self.rounds:
            parts.append(f"accepted length {1 + self.accepted / self.rounds:.2f}")
        return ", ".join(parts)


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
    """Shows an answer as it comes; with origins where rounds are told apart."""

    def __init__(self, *, origin: bool) -> None:
        self._origin = origin
        self._pending = ""
        self.text = ""

    def delta(self, text: str) -> None:
        self.text += text
        if self._origin:
            self._pending += text  # shown when its round's pieces are known
        else:
            self._show(text)

    def step(self, text: str, pieces: list[tuple[str, bool]]) -> None:
        at = self._pending.find(text) if self._origin and text else -1
        if at < 0:
            return
        self._show(self._pending[:at])
        self._pending = self._pending[at + len(text) :]
        for piece, drafted in pieces:
            self._show(piece, drafted=drafted)

    def finish(self) -> None:
        self._show(self._pending)
        self._pending = ""
        print(flush=True)

    def _show(self, text: str, *, drafted: bool = False) -> None:
        shown = printable(text)
        print(paint(shown, "4", sys.stdout) if drafted else shown, end="", flush=True)


@dataclass
class _Chat:
    options: ChatOptions
    thread: _LoopThread
    client: DsparkClient
    history: list[dict[str, str]] = field(default_factory=list)
    totals: dict[str, _Totals] = field(default_factory=dict)

    def command(self, line: str) -> bool:
        """Do what a /command says; False ends the chat."""
        word, _, rest = line.partition(" ")
        match word:
            case "/quit" | "/exit":
                return False
            case "/plain" | "/dspark" as chosen:
                self.options.mode = chosen[1:]
                _note(f"the next answers are decoded in {self.options.mode} mode")
            case "/new":
                self.history.clear()
                _note("a new conversation")
            case "/stats":
                for mode, totals in self.totals.items():
                    _note(f"{mode}: {totals.answers} answers, {totals}")
                if not self.totals:
                    _note("no answers yet")
            case "/system":
                self.options.instructions = rest.strip()
                _note("the system message is " + (repr(rest.strip()) if rest.strip() else "none"))
            case "/help":
                _note(HELP)
            case _:
                _note(f"{word} is no command. These are:\n{HELP}")
        return True

    def ask(self, question: str) -> bool:
        """Ask, show the answer, and remember both; a question that is refused leaves no trace. Whether it was
        answered.
        """
        self.history.append({"role": "user", "content": question})
        printer = _Printer(origin=self.options.origin and sys.stdout.isatty())
        try:
            final = self._answer(printer)
        except RefusedError as error:
            self.history.pop()
            _note(f"refused: {error}")
            return False
        finally:
            printer.finish()
        response = final["response"]
        if printer.text:
            self.history.append({"role": "assistant", "content": printer.text})
        else:
            self.history.pop()
        if response.get("error"):
            _note(f"failed: {response['error']['message']}")
        mine = _Totals()
        for totals in (mine, self.totals.setdefault(self.options.mode, _Totals())):
            totals.add(response)
        ending = {"response.cancelled": ", stopped", "response.incomplete": ", cut at the limit"}
        _note(f"[{mine}, {self.options.mode}{ending.get(final['type'], '')}]")
        return not response.get("error")

    def _answer(self, printer: _Printer) -> Event:
        events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        stream = self.thread.call(self.client.create(self._body()))
        asyncio.run_coroutine_threadsafe(_pump(stream, events), self.thread.loop)
        asked_to_stop = False
        while True:
            try:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                if event["type"] == "response.output_text.delta":
                    printer.delta(event["delta"])
                elif event["type"] == "dspark:step":
                    printer.step(event["text"], event["pieces"])
                elif event["type"] in TERMINAL_EVENTS:
                    return event
            except KeyboardInterrupt:
                if asked_to_stop:
                    raise  # twice: the service does not answer, leave
                asked_to_stop = True
                self.thread.call(stream.cancel())

    def _body(self) -> Event:
        options = self.options
        dspark: Event = {"mode": options.mode, "verification": options.verification}
        if options.origin:
            dspark["steps"] = True
        if options.seed is not None:
            dspark["seed"] = options.seed
        body: Event = {"input": list(self.history), "store": False, "dspark": dspark}
        for name in ("instructions", "max_output_tokens", "temperature"):
            if getattr(options, name) not in (None, ""):
                body[name] = getattr(options, name)
        return body


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
            raise UnreachableError(f"{error}; a service starts with: dspark-stream serve") from None
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
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            importlib.import_module("readline")  # its import gives input() editing and a history
        _note(f"{hello['model']}, drafter {hello['drafter'] or 'none'}; /help lists the commands")
    while True:
        try:
            line = (input("> ") if interactive else _piped_line()).strip()
        except EOFError:
            if interactive:
                _note("")  # the shell's prompt begins on a line of its own
            return True
        except KeyboardInterrupt:
            _note("\n(/quit or Ctrl-D leaves)")
            continue
        if line.startswith("/"):
            if not session.command(line):
                return True
        elif line:
            session.ask(line)


def _piped_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _note(text: str) -> None:
    """What is not the answer goes to stderr, so that answers can be piped on."""
    print(paint(text, "2", sys.stderr), file=sys.stderr, flush=True)
