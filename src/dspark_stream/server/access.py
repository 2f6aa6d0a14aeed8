"""The access log: one line for every HTTP request and for every response on a socket, written when it is over.

No prompt, no answer, no key and nothing else that a client made up, but for its request id, which was checked.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from typing import Any

from aiohttp import web

from dspark_stream.types import FinishedEvent, TokensEvent

log = logging.getLogger("dspark_stream.access")

REQUEST_ID = "X-Request-Id"
MAX_REQUEST_ID_CHARS = 128
PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds: told where somebody debugs, or where they fail."""
_VALID = re.compile(rf"[\x20-\x7e]{{1,{MAX_REQUEST_ID_CHARS}}}")
_current: ContextVar[Entry] = ContextVar("entry")


class Entry:
    """One line to be, filled in while its request is served."""

    def __init__(self, request_id: str, method: str, route: str) -> None:
        self.request_id = request_id
        self.method = method
        self.route = route
        self.client = ""
        """Whose limits it counts against: a key's label, an IPv4 address or an IPv6 network."""
        self.address = ""
        self.key_label = ""
        """Of the key that was shown, where keys have labels."""
        self.status = 0
        self.answer_status: int | None = None
        """Of the head that was sent; None: none was."""
        self.whole = False
        """Whether an event stream was written to its last event: a client that closes then has read its answer."""
        self.error_status: int | None = None
        """Of the error that ended it."""
        self.response_id = ""
        self.error = ""
        self.reason = ""
        self.input_tokens = self.output_tokens = 0
        self.queue_ms = self.prefill_ms = self.decode_ms = 0.0
        self.tau = 0.0
        """Mean accepted length: 1 + accepted / rounds."""
        self._began = time.monotonic()

    @property
    def of_socket(self) -> bool:
        """Whether it is about something on a socket, not about an HTTP request."""
        return self.method == "WS"

    def for_response(self, response_id: str) -> Entry:
        """The line of one response on this socket; empty: of an event that became none."""
        entry = Entry(self.request_id, "WS", self.route)
        entry.address = self.address
        entry.client, entry.key_label, entry.response_id = self.client, self.key_label, response_id
        return entry

    def submitted(self, response_id: str, input_tokens: int) -> None:
        """The engine has it."""
        self.response_id, self.input_tokens = response_id, input_tokens

    def said(self, event: TokensEvent | FinishedEvent) -> None:
        """One of the engine's events."""
        if isinstance(event, TokensEvent):
            self.output_tokens += len(event.token_ids)
            return
        usage = event.usage
        self.reason = event.reason
        if event.error is not None:
            self.error, self.error_status = event.error.code, event.error.status
        self.input_tokens, self.output_tokens = usage.input_tokens or self.input_tokens, usage.output_tokens
        self.queue_ms, self.prefill_ms, self.decode_ms = usage.queue_ms, usage.prefill_ms, usage.decode_ms
        self.tau = usage.accepted_length

    def write(self, status: int) -> None:
        """It is over; says so once. ``status`` is HTTP's, on a socket 200 or that of the error."""
        if self.status:
            return  # said already
        self.status = status
        level = logging.DEBUG if self.route in PROBES and status < 400 else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "request", extra={"fields": self._fields()})

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "client": self.key_label or self.address,
            "method": self.method,
            "route": self.route,
            "status": self.status,
        }
        if self.error:
            fields["error"] = self.error
        if self.response_id:
            fields |= {
                "response_id": self.response_id,
                "finish": self.reason or "refused",
                "input_tokens": self.input_tokens,
                "output_tokens": self.output_tokens,
                "queue_ms": round(self.queue_ms, 1),
                "prefill_ms": round(self.prefill_ms, 1),
                "decode_ms": round(self.decode_ms, 1),
                "tau": round(self.tau, 3),
            }
        return fields | {"total_ms": round(1e3 * (time.monotonic() - self._began), 1)}


ENTRY = web.RequestKey("access_entry", Entry)


def begin(request: web.Request, method: str, route: str) -> Entry:
    """The line of an HTTP request, current in its task and in those that it starts."""
    given = request.headers.get(REQUEST_ID, "")
    entry = Entry(given if _VALID.fullmatch(given) else new_request_id(), method, route)
    entry.address = request.remote or "unknown"
    request[ENTRY] = entry
    enter(entry)
    return entry


def enter(entry: Entry) -> None:
    """Make a line the current one of this task, and of those that it starts."""
    _current.set(entry)


def current() -> Entry:
    """The line of what is being served; outside of any request one that nobody writes."""
    return _current.get(None) or Entry("", "", "")


def new_request_id() -> str:
    """An id for a request that brought none, or none that can be repeated."""
    return f"req_{uuid.uuid4().hex}"


async def name_answer(request: web.Request, answer: web.StreamResponse) -> None:
    """Signal `on_response_prepare`: every head says the request's id, an upgrade's and an error's too."""
    entry = request.get(ENTRY)
    if entry is not None:
        answer.headers[REQUEST_ID] = entry.request_id
        entry.answer_status = answer.status
