"""The opening handshake of a WebSocket: what it must say, and which of the offered subprotocols is taken."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence

from aiohttp import web

from dspark_stream.errors import InvalidRequestError
from dspark_stream.server import wire
from dspark_stream.server.guard import KEY_SUBPROTOCOL

VERSION = "13"
_OTHER_NAMES = ("realtime",)
"""What OpenAI's own browser clients offer beside the key; our JSON events are meant."""


_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class UpgradeRequiredError(InvalidRequestError):
    """A plain GET where only a socket makes sense, or another version of the protocol than ours."""

    status = 426
    code = "upgrade_required"


def check_handshake(request: web.BaseRequest) -> None:
    """Raise if this is no handshake of RFC 6455.

    Raises:
        UpgradeRequiredError: it is for another version of the protocol.
        InvalidRequestError: a header is missing or malformed.
    """
    headers = request.headers
    if "upgrade" not in {part.strip().lower() for part in headers.get("Connection", "").split(",")}:
        raise InvalidRequestError("the header `Connection` must say `Upgrade`", code="invalid_handshake")
    if headers.get("Sec-WebSocket-Version", "") != VERSION:
        raise UpgradeRequiredError(f"the header `Sec-WebSocket-Version` must say {VERSION}")
    try:
        key = base64.b64decode(headers.get("Sec-WebSocket-Key", ""), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 16:
        raise InvalidRequestError("the header `Sec-WebSocket-Key` must be 16 bytes in base64", code="invalid_handshake")


def choose_subprotocol(offered: Sequence[str]) -> str | None:
    """Which of the offered subprotocols the answer names.

    A browser that offers some and hears of none drops the connection. So one is taken wherever a key came as a
    subprotocol, the key's own only if nothing else was offered: it then goes back to where it came from.
    """
    for known in (wire.PROTOCOLS, _OTHER_NAMES):
        for name in offered:
            if name in known:
                return name
    keys = [name for name in offered if name.startswith(KEY_SUBPROTOCOL)]
    others = [name for name in offered if not name.startswith(KEY_SUBPROTOCOL)]
    return next(filter(_TOKEN.fullmatch, others + keys), None) if keys else None
