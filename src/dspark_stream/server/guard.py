"""Who may speak to the service at all: Host, Origin and key, checked before anything else is read."""

from __future__ import annotations

import re
from collections.abc import Iterable

from aiohttp import web

from dspark_stream.errors import AuthenticationError, InvalidRequestError, PermissionDeniedError
from dspark_stream.server.cors import is_preflight
from dspark_stream.server.keys import KeyRing, digest_of
from dspark_stream.server.settings import LOOPBACK_NAMES, ServerConfig

KEY_SUBPROTOCOL = "openai-insecure-api-key."
OPEN_PATHS = frozenset({"/health", "/ready"})
"""Probes: they come by address, without a key, and learn nothing."""

# A host name or address with an optional port; anything else has no business in a header that we repeat.
_HOST = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?P<port>:\d{1,5})?$")


class Guard:
    """The checks of one bind address."""

    def __init__(self, config: ServerConfig, keys: KeyRing) -> None:
        bind = f"[{config.host}]" if ":" in config.host else config.host
        hosts = {host.lower() for host in config.allowed_hosts}
        # A rebound DNS name reaches only what needs no key, and off loopback everything does. The names under
        # which such a server is known cannot be guessed here.
        self._any_host = "*" in hosts or not (config.is_loopback or hosts)
        self._hosts = hosts | {*LOOPBACK_NAMES, bind.lower()}
        self._origin_names = {*LOOPBACK_NAMES, bind.lower()}
        self._origins = frozenset(config.allowed_origins)
        self._keys = keys
        self._open_metrics = config.open_metrics
        self._metrics_digest = digest_of(config.metrics_key.encode()) if config.metrics_key else None

    def check(self, request: web.Request, port: int) -> str:
        """Raise if the request must not be served; ``port`` is the one that the service listens on.

        Returns the label of the key that was shown; empty where none is needed or it has none.

        Raises:
            InvalidRequestError: a Host header that is none.
            PermissionDeniedError: a foreign Host or Origin.
            AuthenticationError: no key, or a wrong one.
        """
        if request.path in OPEN_PATHS:
            return ""
        self._check_host(request)
        self._check_origin(request, port)
        if is_preflight(request) and self.allowed_origin(request) is not None:
            return ""
        if request.path == "/metrics":
            return self._check_metrics_key(request)
        if request.path.startswith("/v1/") or request.path == "/props":
            return self._check_key(request)
        return ""

    def allowed_origin(self, request: web.BaseRequest) -> str | None:
        """The foreign page on whose behalf a browser asks, if it is one that may."""
        origin = request.headers.get("Origin")
        return origin if origin in self._origins else None

    @property
    def any_foreign_page(self) -> bool:
        """Whether answers depend on the page that asks."""
        return bool(self._origins)

    def _check_host(self, request: web.Request) -> None:
        found = _HOST.match(request.headers.get("Host", ""))
        if found is None:
            raise InvalidRequestError("the Host header is missing or malformed", code="invalid_host")
        host = found[0].lower()
        if not (self._any_host or host in self._hosts or found["name"].lower() in self._hosts):
            raise PermissionDeniedError(
                "this Host is not on the allow-list; see --allowed-host", code="host_not_allowed"
            )

    def _check_origin(self, request: web.Request, port: int) -> None:
        # Browsers name the page that asks; nobody else sends this header. CORS does not cover WebSockets, nor
        # requests that a form can make.
        origin = request.headers.get("Origin")
        if origin is None or origin in self._origins:
            return
        own = {f"http://{name}:{port}" for name in self._origin_names}
        if self._keys.asked_for or not self._any_host:
            # Our own page under whichever allowed name it was opened: browsers cannot make up a Host.
            host = request.headers["Host"].lower()
            own |= {f"http://{host}", f"https://{host}"}
        if origin not in own:
            raise PermissionDeniedError(
                "this Origin is not on the allow-list; see --allowed-origin", code="origin_not_allowed"
            )

    def _check_key(self, request: web.Request) -> str:
        if not self._keys.asked_for:
            return ""
        key = self._keys.find(_shown_keys(request))
        if key is None:
            raise AuthenticationError(
                "a valid key is needed: `Authorization: Bearer KEY`, or in browsers the subprotocol "
                f"`{KEY_SUBPROTOCOL}KEY`"
            )
        return key.label

    def _check_metrics_key(self, request: web.Request) -> str:
        """A key of its own opens the figures and nothing else."""
        if self._open_metrics:
            return ""
        if any(digest_of(key) == self._metrics_digest for key in _shown_keys(request)):
            return "metrics"
        if self._metrics_digest is not None and not self._keys.asked_for:
            raise AuthenticationError("the key of the metrics is needed: `Authorization: Bearer KEY`")
        return self._check_key(request)


def _shown_keys(request: web.Request) -> Iterable[bytes]:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        yield token.strip().encode("utf-8", "surrogateescape")
    for offered in offered_subprotocols(request)[:8]:
        if offered.startswith(KEY_SUBPROTOCOL):
            yield offered.removeprefix(KEY_SUBPROTOCOL).encode("utf-8", "surrogateescape")


def offered_subprotocols(request: web.Request) -> list[str]:
    """What the client listed in ``Sec-WebSocket-Protocol``."""
    values = request.headers.getall("Sec-WebSocket-Protocol", [])
    return [part.strip() for value in values for part in value.split(",")]
