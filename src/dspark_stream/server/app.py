"""The application: routes, the checks before and the errors after every request, start, drain and end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from aiohttp import web

from dspark_stream.engine.boundary import Engine, Tokenizer
from dspark_stream.errors import BusyError, ConfigError, DsparkError, InvalidRequestError
from dspark_stream.server import wire
from dspark_stream.server.guard import Guard
from dspark_stream.server.http import HttpApi, json_response
from dspark_stream.server.pages import Pages
from dspark_stream.server.service import Service
from dspark_stream.server.settings import ServerConfig
from dspark_stream.server.websocket import SocketRegistry

log = logging.getLogger(__name__)

LAG_PERIOD_S = 0.05
_FLUSH_S = 5.0
"""After the engine has ended, how long HTTP answers may take to be written out."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SERVICE = web.AppKey("service", Service)
SOCKETS = web.AppKey("sockets", SocketRegistry)
_GUARD = web.AppKey("guard", Guard)


class Server:
    """A running service: what `serve` runs, and what tests drive without signals."""

    def __init__(self, config: ServerConfig, engine: Engine, tokenizer: Tokenizer) -> None:
        self.config = config
        self.engine = engine
        self._tokenizer = tokenizer
        self._runner: web.AppRunner | None = None
        self._app: web.Application | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Where the page is."""
        host = self.config.host
        if host in ("0.0.0.0", "::", ""):
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    @property
    def service(self) -> Service:
        """What the handlers share; exists once started."""
        assert self._app is not None
        return self._app[SERVICE]

    @property
    def sockets(self) -> SocketRegistry:
        """The open sockets; exists once started."""
        assert self._app is not None
        return self._app[SOCKETS]

    async def start(self) -> None:
        """Listen, then let the engine begin.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self._app = build_app(self.config, self.engine, self._tokenizer)
        runner = web.AppRunner(
            self._app,
            access_log=None,
            # A client that goes away takes its handler with it, and so its stream.
            handler_cancellation=True,
            shutdown_timeout=_FLUSH_S,
        )
        await runner.setup()
        self._runner = runner
        try:
            site = web.TCPSite(runner, self.config.host.strip("[]"), self.config.port, backlog=1024)
            await site.start()
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            self._runner = None
            raise ConfigError(
                f"cannot listen on {self.config.host}:{self.config.port}: {error}", param="port"
            ) from None
        self.port = runner.addresses[0][1]
        self.engine.start(self.service.hub.sink)

    async def stop(self) -> None:
        """Drain: refuse new work, let streams finish, close the sockets, end the engine."""
        if self._runner is None or self._app is None:
            return
        service = self.service
        service.admission.draining = True
        log.info("draining: %d streams have %g s", service.admission.in_flight, self.config.shutdown_timeout_s)
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close, self.config.shutdown_timeout_s)
        # The engine's last events are on their way to the loop; then each stream's task ends by itself.
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await service.idle.wait()
        await self.sockets.close_all()
        await self._runner.cleanup()
        self._runner = None


async def serve(
    config: ServerConfig,
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal does not wait for running streams.

    Args:
        config: Where and for whom.
        engine: Not yet started; closed when this returns.
        tokenizer: The model's.
        ready: Called once, when the page can be opened.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    server = Server(config, engine, tokenizer)

    def on_signal() -> None:
        if stopping.is_set():
            loop.run_in_executor(None, engine.close, 0.0)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await server.start()
        if ready is not None:
            ready(server)
        await stopping.wait()
    finally:
        try:
            await server.stop()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


def build_app(config: ServerConfig, engine: Engine, tokenizer: Tokenizer) -> web.Application:
    """The aiohttp application. Call it on the loop that will run it; starting the engine is the caller's."""
    service = Service(config, engine, tokenizer)
    sockets = SocketRegistry(service)
    api = HttpApi(service)
    pages = Pages(service)
    app = web.Application(middlewares=[_errors_and_checks], client_max_size=config.max_message_bytes)
    app[SERVICE] = service
    app[SOCKETS] = sockets
    app[_GUARD] = Guard(config)

    async def responses(request: web.Request) -> web.StreamResponse:
        return await api.responses(request, _client(request))

    async def chat(request: web.Request) -> web.StreamResponse:
        return await api.chat(request, _client(request))

    async def completions(request: web.Request) -> web.StreamResponse:
        return await api.completions(request, _client(request))

    async def upgrade(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise UpgradeRequiredError("GET speaks WebSocket here; for plain HTTP use POST")
        return await sockets.handle(request, _client(request))

    app.router.add_get("/v1/responses", upgrade, allow_head=False)
    app.router.add_post("/v1/responses", responses)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/chat/completions", _only_post)
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/completions", _only_post)
    app.router.add_get("/v1/models", pages.models)
    app.router.add_get("/v1/models/{name:.+}", pages.model)
    app.router.add_get("/health", pages.health)
    app.router.add_get("/ready", pages.ready)
    app.router.add_get("/props", pages.props)
    app.router.add_get("/metrics", pages.metrics)
    app.router.add_get("/{path:.*}", pages.file)
    app.cleanup_ctx.append(_lag_sampler)
    app.on_cleanup.append(_close_service)
    return app


async def _only_post(request: web.Request) -> web.StreamResponse:
    # Else the page's files would answer that there is nothing here.
    raise web.HTTPMethodNotAllowed(request.method, ["POST"])


def _client(request: web.Request) -> str:
    """Whose limit a request counts against. There is one key, so the address tells clients apart."""
    return request.remote or "unknown"


class UpgradeRequiredError(InvalidRequestError):
    """A plain GET where only a socket makes sense."""

    status = 426
    code = "upgrade_required"


# --- around every request -----------------------------------------------------------------------------------


@web.middleware
async def _errors_and_checks(request: web.Request, handler: Handler) -> web.StreamResponse:
    app = request.app
    service = app[SERVICE]
    status = 500
    try:
        app[_GUARD].check(request, _port(request))
        answer = await handler(request)
        status = answer.status
        return answer
    except DsparkError as error:
        service.refused(error)
        status = error.status
        return _error_answer(request, error)
    except web.HTTPException as error:
        status = error.status
        return json_response(
            {"error": wire.ErrorBody(type="invalid_request_error", code=_code(error), message=_reason(error))},
            status=status,
            headers={"Allow": error.headers["Allow"]} if "Allow" in error.headers else None,
        )
    except asyncio.CancelledError:
        status = 499  # as nginx says it: the client has gone
        raise
    except Exception as error:
        log.exception("%s %s failed", request.method, request.path)
        return _error_answer(request, wire.as_dspark_error(error))
    finally:
        service.metrics.http[_method(request), _route(request), status] += 1


def _error_answer(request: web.Request, error: DsparkError) -> web.Response:
    headers: dict[str, str] = {}
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response({"error": wire.error_body(error)}, status=error.status, headers=headers)


def _code(error: web.HTTPException) -> str:
    known = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    return known.get(error.status, "bad_request")


def _reason(error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return "the request's body is too large"
    return error.text or error.reason


def _port(request: web.Request) -> int:
    name = request.transport.get_extra_info("sockname") if request.transport is not None else None
    return int(name[1]) if isinstance(name, tuple) else 0


def _route(request: web.Request) -> str:
    """The route's pattern, not the path: paths are the clients' to make up, and each would be a new series."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "none"


def _method(request: web.Request) -> str:
    return request.method if request.method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS") else "other"


# --- background ---------------------------------------------------------------------------------------------


async def _lag_sampler(app: web.Application) -> AsyncIterator[None]:
    async def sample() -> None:
        loop = asyncio.get_running_loop()
        lag = app[SERVICE].metrics.loop_lag
        while True:
            due = loop.time() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            lag.observe(max(0.0, loop.time() - due))

    task = asyncio.create_task(sample())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _close_service(app: web.Application) -> None:
    app[SERVICE].close()
