"""Requests for what is not there: which methods a path has, and which paths there are."""

from __future__ import annotations

from difflib import get_close_matches

from aiohttp import web

PATTERN = "/{path:.*}"
"""The last route: whatever no other one matches."""
_CANONICAL = "/{path}"


async def continue_later(request: web.Request) -> None:
    """For ``expect_handler``: who reads the body says "100 Continue"; aiohttp would before a key was shown."""


async def refuse_method(request: web.Request) -> None:
    """Raise if the path is there and only the method is not.

    Raises:
        HTTPMethodNotAllowed: with the methods that the path has.
    """
    allowed: set[str] = set()
    for resource in request.app.router.resources():
        if resource.canonical != _CANONICAL:
            allowed |= (await resource.resolve(request))[1]
    if allowed:
        raise web.HTTPMethodNotAllowed(request.method, allowed)


def what_exists(request: web.Request) -> str:
    """Says that there is nothing at the path, what may have been meant, and what there is."""
    paths = [resource.canonical for resource in request.app.router.resources() if resource.canonical != _CANONICAL]
    path = request.path[:200]
    near = get_close_matches(path.rstrip("/"), paths, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"there is nothing at {path!r}{hint} There are {', '.join(paths)}."
