"""Heads of requests: what they may not ask for, and what a client is told whose request could not even be parsed."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import (
    BadHttpMessage,
    BadHttpMethod,
    BadStatusLine,
    InvalidHeader,
    InvalidURLError,
    LineTooLong,
    PayloadEncodingError,
)

from dspark_stream.errors import DsparkError, InvalidRequestError
from dspark_stream.server import access, wire

SERVER_NAME = "dspark-stream"
"""The whole of the ``Server`` header: versions tell strangers which faults to try."""


class RequestTimeoutError(DsparkError):
    """The head, or the body, did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class HeadTooLargeError(InvalidRequestError):
    """A line of the head, or the whole of it, is too long."""

    status = 431
    code = "head_too_large"


_REFUSALS: tuple[tuple[type[BaseException], str, str], ...] = (
    (BadHttpMethod, "invalid_method", "the request does not begin with a method of HTTP (TLS on a plain port?)"),
    (BadStatusLine, "invalid_request_line", "the request line is malformed, or of another version than HTTP/1.1"),
    (InvalidURLError, "invalid_url", "the request's target is malformed"),
    (InvalidHeader, "invalid_header", "a header of the request is malformed"),
    (PayloadEncodingError, "invalid_body", "the request's body is not framed as its head says"),
)


class UnsupportedEncodingError(InvalidRequestError):
    """A compressed body."""

    status = 415
    code = "unsupported_content_encoding"


class UnsupportedTransferError(InvalidRequestError):
    """A transfer coding other than plain ``chunked``."""

    status = 501
    code = "unsupported_transfer_encoding"


class ExpectationError(InvalidRequestError):
    """An ``Expect`` other than ``100-continue``."""

    status = 417
    code = "expectation_failed"


def check_head(request: web.BaseRequest) -> None:
    """Raise if the head asks for what we do not do with bodies; the body has not been touched.

    Raises:
        UnsupportedEncodingError: the body is compressed.
        UnsupportedTransferError: the body has a transfer coding other than ``chunked``.
        ExpectationError: an expectation that nobody knows.
    """
    headers = request.headers
    if not _all_in(headers.getall("Content-Encoding", []), {"", "identity"}):
        raise UnsupportedEncodingError(
            "bodies are taken as they are: leave the header `Content-Encoding` out, or say `identity`"
        )
    if "Transfer-Encoding" in headers and (
        request.version < HttpVersion11 or headers["Transfer-Encoding"].strip().lower() != "chunked"
    ):
        raise UnsupportedTransferError("the header `Transfer-Encoding` may only say `chunked`, and in HTTP/1.1")
    if not _all_in(headers.getall("Expect", []), {"100-continue"}):
        raise ExpectationError("the header `Expect` may only say `100-continue`")


def _all_in(values: Iterable[str], known: set[str]) -> bool:
    return all(part.strip().lower() in known for value in values for part in value.split(","))


def refusal(error: BaseException) -> InvalidRequestError:
    """The parser's error in our words: which rule was broken, without the bytes that broke it. They may be a key."""
    if isinstance(error, LineTooLong):
        return HeadTooLargeError("the request line or a header is longer than 8190 bytes")
    for kind, code, message in _REFUSALS:
        if isinstance(error, kind):
            return InvalidRequestError(message, code=code)
    # llhttp's own words come first, then what it was about.
    reason, found, _ = error.message.partition(":\n\n") if type(error) is BadHttpMessage else ("", "", "")
    detail = f": {reason}" if found and reason.isascii() else ""
    return InvalidRequestError(f"the request is not valid HTTP/1.1{detail}", code="invalid_http")


def error_response(error: DsparkError) -> web.Response:
    """An answer outside of the application; the connection ends with it."""
    answer = web.Response(
        body=wire.encode({"error": wire.error_body(error)}),
        status=error.status,
        content_type="application/json",
        headers={"Server": SERVER_NAME, "Cache-Control": "no-store", access.REQUEST_ID: access.new_request_id()},
    )
    answer.force_close()
    return answer


def whole_answer(error: DsparkError) -> bytes:
    """The same as bytes, for a connection on which there is no request to answer."""
    body = wire.encode({"error": wire.error_body(error)})
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nServer: {SERVER_NAME}\r\n"
        f"{access.REQUEST_ID}: {access.new_request_id()}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
