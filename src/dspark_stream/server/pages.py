"""What is neither a response nor a completion: models, probes, figures, and the demo page's files."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from aiohttp import web

from dspark_stream import __version__
from dspark_stream.errors import NotFoundError
from dspark_stream.server import access, openapi, wire
from dspark_stream.server.exposition import OPEN_METRICS, TEXT
from dspark_stream.server.http import json_response
from dspark_stream.server.service import Service

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


_CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}
"""Not the system's table: it differs from machine to machine, and under nosniff a wrong type is a broken page."""


class Pages:
    """Handlers of everything that costs no tokens."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._root = service.config.web_dir.resolve() if service.config.web_dir is not None else None

    async def models(self, request: web.Request) -> web.Response:
        """``GET /v1/models``."""
        return json_response({"object": "list", "data": [self._model(name) for name in self._names()]})

    async def model(self, request: web.Request) -> web.Response:
        """``GET /v1/models/{id}``; names may contain slashes."""
        name = request.match_info["name"]
        if name not in self._names():
            raise NotFoundError(f"the model `{name[:200]}` does not exist", param="model", code="model_not_found")
        return json_response(self._model(name))

    async def health(self, request: web.Request) -> web.Response:
        """``GET /health``: the process lives and is worth keeping alive; 503 once its engine has failed."""
        self._service.vitals.status()
        error = self._service.vitals.error
        if error is None:
            return json_response({"status": "ok"})
        return json_response({"status": "engine failed", "reason": error.message}, status=503)

    async def ready(self, request: web.Request) -> web.Response:
        """``GET /ready``: new work would be taken and done."""
        engine = self._service.vitals.status()
        status = engine if engine == "engine failed" or not self._service.draining else "draining"
        return json_response({"status": status or "ready"}, status=503 if status else 200)

    async def props(self, request: web.Request) -> web.Response:
        """``GET /props``: model, drafter, limits, versions."""
        service = self._service
        config, info = service.config, service.info
        return json_response(
            {
                "version": __version__,
                "model": info,
                "limits": {
                    "max_model_len": info.max_model_len,
                    "max_num_seqs": info.max_num_seqs,
                    "max_queue": config.max_queue,
                    "max_streams_per_client": service.admission.most_alone(request[access.ENTRY].client),
                    "max_message_bytes": config.max_message_bytes,
                    "max_lanes": config.max_lanes,
                    "max_lane_queue": config.max_lane_queue,
                    "default_max_output_tokens": config.default_max_output_tokens,
                },
                "subprotocols": list(wire.PROTOCOLS),
                "uptime_s": round(time.time() - service.started_at, 1),
            }
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """``GET /metrics`` for Prometheus, in the format that it asks for."""
        service = self._service
        modern = "application/openmetrics-text" in request.headers.get("Accept", "")
        text = service.metrics.render(
            service.engine.snapshot(), service.info, service.admission.in_flight, open_metrics=modern
        )
        return web.Response(body=text.encode(), headers={"Content-Type": OPEN_METRICS if modern else TEXT})

    async def openapi(self, request: web.Request) -> web.Response:
        """``GET /openapi.json``: what can be asked for, in OpenAPI's words."""
        return web.Response(body=await asyncio.to_thread(openapi.document), content_type="application/json")

    async def file(self, request: web.Request) -> web.StreamResponse:
        """The demo page and what it is made of; nothing outside its folder."""
        name = request.match_info.get("path", "") or "index.html"
        found = self._find(name)
        if found is None:
            raise NotFoundError(f"there is nothing at {request.path[:200]!r}")
        answer = web.FileResponse(found, headers=_SECURITY_HEADERS)
        answer.headers["Content-Type"] = _CONTENT_TYPES.get(found.suffix.lower(), "application/octet-stream")
        host = request.headers["Host"]  # the guard has seen that it is a plain host name
        answer.headers["Content-Security-Policy"] = (
            "default-src 'self'; "
            # Not every browser lets 'self' stand for a socket to the same place.
            f"connect-src 'self' ws://{host} wss://{host}; "
            "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        # Kept, but asked about each time: a page must not run with modules of another version.
        answer.headers["Cache-Control"] = "no-cache"
        return answer

    def has(self, request: web.Request) -> bool:
        """Whether `file` would find something."""
        return self._find(request.match_info.get("path", "") or "index.html") is not None

    def _find(self, name: str) -> Path | None:
        if self._root is None or "\0" in name:
            return None
        try:
            path = (self._root / name).resolve()
            inside = path.is_relative_to(self._root)
            hidden = any(part.startswith(".") for part in path.relative_to(self._root).parts) if inside else True
            return path if inside and not hidden and path.is_file() else None
        except (OSError, ValueError):
            return None  # a name that no file can have

    def _names(self) -> list[str]:
        return [self._service.info.model, *self._service.config.served_names]

    def _model(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": int(self._service.started_at),
            "owned_by": "dspark-stream",
            "root": self._service.info.model,
            "max_model_len": self._service.info.max_model_len,
        }
