"""The service's log: one format for people and one for machines, and nothing said over and over. A leaf.

A record may carry ``fields`` (``extra={"fields": {...}}``): words of their own in JSON, ``name=value`` in text.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]
QUIET_S = 600.0
"""What was said is said again after so long at the earliest, with how often it was left out."""
_LIBRARIES = ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "aiohttp", "websockets")
"""They tell every step; what is worth a person's time is a warning there."""
_PLAIN = re.compile(r"[A-Za-z0-9_.:/{}*+-]+")


def configure(form: Format = "text", level: str = "info", stream: TextIO | None = None) -> None:
    """Send everything that is logged to ``stream`` (stderr), once; handlers that were there are taken away."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(Repeats())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    # The hub's client adds a handler of its own when it is imported, and passes its records on all the same.
    from huggingface_hub.utils import logging as _  # noqa: F401

    logging.getLogger("huggingface_hub").handlers.clear()


class Repeats(logging.Filter):
    """Lets a message through once in `QUIET_S`: a warning whatever stands in the places of its words, an error as it
    reads, an exception by its type and by where it was raised.

    What passes always: records with ``fields``, which are events of their own, those that are ``counted``, since
    who counts has limited them already, and what is for debugging.
    """

    def __init__(self, quiet_s: float = QUIET_S, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._quiet_s, self._clock = quiet_s, clock
        self._told: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is to be told."""
        if record.levelno < logging.WARNING or hasattr(record, "fields") or hasattr(record, "counted"):
            return True
        key = (record.name, record.levelno, *_sameness(record))
        now = self._clock()
        told, left_out = self._told.get(key, (None, 0))
        if told is not None and now - told < self._quiet_s:
            self._told[key] = (told, left_out + 1)
            return False
        if len(self._told) > 1000:
            self._told.clear()
        self._told[key] = (now, 0)
        if left_out:
            record.repeated = left_out
        return True


def _sameness(record: logging.LogRecord) -> tuple[object, ...]:
    """What two records have in common of which the second says nothing new."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None and record.levelno >= logging.ERROR:
        return (record.getMessage()[:1000],)
    # Libraries that put their words together beforehand still repeat themselves but for the numbers.
    words = re.sub(r"\d+", "0", str(record.msg))[:200]
    if error is None:
        return (words,)
    frames = list(traceback.walk_tb(error.__traceback__))
    place = (frames[-1][0].f_code.co_filename, frames[-1][1]) if frames else None
    return words, type(error), place


class TextFormatter(logging.Formatter):
    """A line for people: time, level, logger, message, then ``name=value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own name)
        """The line without a traceback."""
        parts = [super().formatMessage(record), *(f"{name}={_word(value)}" for name, value in _fields(record).items())]
        if left_out := getattr(record, "repeated", 0):
            parts.append(f"(and {left_out} times since it was last told)")
        return " ".join(parts)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if left_out := getattr(record, "repeated", 0):
            line["repeated"] = left_out
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LogStream(io.TextIOBase):
    """A text stream whose lines are records of a logger: for what is told by writing lines."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._logger = logger
        self._open = ""

    def write(self, text: str) -> int:
        """Log the lines that are whole."""
        *lines, self._open = (self._open + text).split("\n")
        for line in filter(str.strip, lines):
            self._logger.info("%s", line)
        return len(text)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _word(value: Any) -> str:
    """A value that cannot be taken for two, nor for a line of its own."""
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
