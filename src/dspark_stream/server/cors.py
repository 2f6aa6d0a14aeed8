"""CORS: what browsers must be told before a page of another, allowed origin may use the API."""

from __future__ import annotations

import re

from aiohttp import web
from multidict import CIMultiDict

MAX_AGE_S = 600
METHODS = "GET, HEAD, POST, OPTIONS"
EXPOSED = "Retry-After, X-Request-Id, X-Dspark-Warning"
"""Headers of answers that scripts may read."""

_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, \t-]{0,2048}")


def is_preflight(request: web.BaseRequest) -> bool:
    """Whether a browser asks on behalf of a page; such a request carries no key."""
    return request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers


def preflight(request: web.BaseRequest) -> web.Response:
    """The answer to the preflight of an allowed origin; `stamp` adds the origin."""
    headers = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": str(MAX_AGE_S)}
    # Whatever the page's client sends (SDKs have a dozen of their own): `*` would not cover Authorization.
    asked = request.headers.get("Access-Control-Request-Headers", "")
    if asked and _HEADER_NAMES.fullmatch(asked):
        headers["Access-Control-Allow-Headers"] = asked
    return web.Response(status=204, headers=headers)


def stamp(headers: CIMultiDict[str], origin: str | None) -> None:
    """Let the page of an allowed ``origin`` read an answer; None: no such page asked."""
    headers.add("Vary", "Origin")
    if origin is not None:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = EXPOSED
