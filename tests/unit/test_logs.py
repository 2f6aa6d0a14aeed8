"""The log's formats, and that nothing is told over and over."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from dspark_stream import logs


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards."""
    logger = logging.getLogger()
    handlers, level = logger.handlers, logger.level
    yield logger
    logger.handlers = handlers
    logger.setLevel(level)


def told(form: logs.Format, level: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    logs.configure(form, level, stream)
    return logging.getLogger("dspark_stream.test"), stream


def test_json_is_one_object_a_line(root):
    """Guards against lines that a collector cannot read: tracebacks, quotes, breaks."""
    log, stream = told("json")
    log.info("a %s\nbreak", '"quoted"')
    log.info("request", extra={"fields": {"request_id": 'x" y', "status": 200, "tau": 2.5}})
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("it failed")
    first, second, third = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == 'a "quoted"\nbreak'
    assert (first["level"], first["logger"]) == ("info", "dspark_stream.test")
    assert first["time"].endswith("Z")
    assert (second["request_id"], second["status"], second["tau"]) == ('x" y', 200, 2.5)
    assert "ValueError: why" in third["traceback"]


def test_text_keeps_values_apart(root):
    """Guards against an id that passes for other fields, or for a line."""
    log, stream = told("text")
    log.info("request", extra={"fields": {"request_id": "a status=200", "client": "127.0.0.1", "ms": 1.5}})
    line = stream.getvalue()
    assert line.endswith('INFO dspark_stream.test: request request_id="a status=200" client=127.0.0.1 ms=1.5\n')


def test_levels(root):
    """Guards against a level that is not obeyed, and against libraries that tell every step."""
    log, stream = told("text", "warning")
    log.info("no")
    assert not stream.getvalue()
    log, stream = told("text", "debug")
    log.debug("yes")
    logging.getLogger("httpx").info("HTTP Request: GET")
    assert stream.getvalue().count("\n") == 1


def test_a_warning_is_told_once_in_a_while():
    """Guards against the same sentence 25 times in 40 minutes, and against a silence for ever."""
    now = 0.0
    filter_ = logs.Repeats(600.0, lambda: now)

    def record(message: str, level: int = logging.WARNING, **extra: object) -> logging.LogRecord:
        made = logging.LogRecord("x", level, __file__, 1, message, (), None)
        vars(made).update(extra)
        return made

    assert filter_.filter(record("rounds take 2.1 times"))
    for i in range(25):
        now = 20.0 * i
        assert not filter_.filter(record(f"rounds take {i}.1 times"))
    assert filter_.filter(record("something else"))
    for _ in range(3):
        assert filter_.filter(record("request", logging.WARNING, fields={}))
        assert filter_.filter(record("a step", logging.INFO))
    now = 601.0
    again = record("rounds take 3.3 times")
    assert filter_.filter(again)
    assert again.repeated == 25  # type: ignore[attr-defined]
    assert "(and 25 times since it was last told)" in logs.TextFormatter().format(again)


def test_errors_that_differ_are_all_told(root):
    """Guards against the second of two faults swallowed since its words are the first one's."""
    log, stream = told("text")

    def fail(error: Exception) -> None:
        try:
            raise error
        except Exception:
            log.exception("%s failed", "POST")

    for number in (3, 7, 7):
        log.error("the key file cannot be used: %s", f"line {number}")
    for error in (ValueError("first"), ValueError("again"), KeyError("second")):
        fail(error)
    text = stream.getvalue()
    assert [text.count(words) for words in ("line 3", "line 7", "first", "again", "second")] == [1, 1, 1, 0, 1]


def test_the_hubs_client_has_no_handler_of_its_own(root):
    """Guards against its messages told twice, one of them in another format."""
    _, stream = told("json")
    logging.getLogger("huggingface_hub.file_download").warning("once")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["once"]
    assert not logging.getLogger("huggingface_hub").handlers


def test_lines_become_records(root):
    """Guards against JSON with plain lines in between."""
    log, stream = told("json")
    lines = logs.LogStream(log)
    lines.write("loading ")
    lines.write("…\n\nready\n")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["loading …", "ready"]
