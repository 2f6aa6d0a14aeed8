"""The application: routes, the checks before and the errors after every request, start, drain and end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial

from aiohttp import web

from dspark_stream.engine.boundary import Engine, Tokenizer
from dspark_stream.errors import BusyError, ConfigError, DsparkError, EngineFailedError, NotFoundError, ShutdownError
from dspark_stream.server import access, cors, elsewhere, wire
from dspark_stream.server.connections import Connection
from dspark_stream.server.guard import OPEN_PATHS, Guard
from dspark_stream.server.handshake import VERSION, UpgradeRequiredError
from dspark_stream.server.heads import SERVER_NAME, UnsupportedTransferError, check_head
from dspark_stream.server.http import AnswerCutError, HttpApi, json_response
from dspark_stream.server.keys import KeyRing
from dspark_stream.server.listener import Listener, neighbourhood
from dspark_stream.server.pages import Pages
from dspark_stream.server.service import Service
from dspark_stream.server.settings import ServerConfig
from dspark_stream.server.websocket import SocketRegistry
from dspark_stream.stopping import stop_signals

log = logging.getLogger(__name__)

LAG_PERIOD_S = 0.05
_FLUSH_S = 5.0
"""After the engine has ended, how long HTTP answers may take to be written out."""
FAILURE_SHOWN_S = 5.0
"""How long a server whose engine has failed says so before it ends: for its clients' answers, and for probes."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SERVICE = web.AppKey("service", Service)
SOCKETS = web.AppKey("sockets", SocketRegistry)
_GUARD = web.AppKey("guard", Guard)
_KEYS = web.AppKey("keys", KeyRing)


class Server:
    """A running service: what `serve` runs, and what tests drive without signals."""

    def __init__(self, config: ServerConfig, engine: Engine, tokenizer: Tokenizer) -> None:
        self.config = config
        self.engine = engine
        self._tokenizer = tokenizer
        self._runner: web.AppRunner | None = None
        self._app: web.Application | None = None
        self._watch: asyncio.Task[None] | None = None
        self._listener: Listener | None = None
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
            # A client that goes away takes its handler with it, and so its stream.
            handler_cancellation=True,
            shutdown_timeout=_FLUSH_S,
        )
        await runner.setup()
        self._runner = runner
        assert runner.server is not None  # there since setup
        self._listener = Listener(self.config, runner.server, self.service.metrics)
        try:
            self.port = await self._listener.open()
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            self._runner = None
            raise ConfigError(
                f"cannot listen on {self.config.host}:{self.config.port}: {error}", param="port"
            ) from None
        self.engine.start(self.service.hub.sink)
        self._watch = asyncio.create_task(self.service.vitals.watch())

    async def stop(self) -> None:
        """Drain: refuse new work, let streams finish, close the sockets, end the engine."""
        if self._runner is None or self._app is None:
            return
        service = self.service
        service.admission.draining = True
        if self._watch is not None:  # an engine that ends now does as it is told
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if service.vitals.error is None:
            log.info("draining: %d streams have %g s", service.admission.in_flight, self.config.shutdown_timeout_s)
            await asyncio.get_running_loop().run_in_executor(None, self.engine.close, self.config.shutdown_timeout_s)
            service.vitals.look_back()
        # The engine's last events are on their way to the loop; then each stream's task ends by itself. Of an engine
        # that was stuck to the last there are none.
        late = wire.error_info(ShutdownError("the server shut down before the answer ended"))
        asyncio.get_running_loop().call_soon(service.hub.end_all, late)
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await service.idle.wait()
        await self.sockets.close_all()
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
        self._runner = None


async def serve(
    config: ServerConfig,
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then drain. A second signal does not wait for running streams.

    Args:
        config: Where and for whom.
        engine: Not yet started; closed when this returns.
        tokenizer: The model's.
        ready: Called once, when the page can be opened.

    Raises:
        ConfigError: the address cannot be listened on.
        EngineFailedError: the engine has failed, and the service ended for it (``exit_on_engine_failure``), or was
            ending.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    server = Server(config, engine, tokenizer)
    hurry: asyncio.Future[None] | None = None

    def on_signal() -> None:
        nonlocal hurry
        if stopping.is_set() and hurry is None:
            hurry = loop.run_in_executor(None, engine.close, 0.0)
        stopping.set()

    handled = stop_signals()
    for number in handled:
        loop.add_signal_handler(number, on_signal)
    try:
        await server.start()
        if ready is not None:
            ready(server)
        error = await _until(stopping, server.service if config.exit_on_engine_failure else None)
    finally:
        try:
            await server.stop()
        finally:
            for number in handled:
                loop.remove_signal_handler(number)
            if hurry is not None:
                await hurry
    error = error or (server.service.vitals.error if config.exit_on_engine_failure else None)
    if error is not None:
        raise error


async def _until(stopping: asyncio.Event, service: Service | None) -> EngineFailedError | None:
    """Wait for a signal, or for an engine that fails and for what its clients are told; returns the failure."""
    if service is None:
        await stopping.wait()
        return None
    waits = [asyncio.create_task(event.wait()) for event in (stopping, service.vitals.failed)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if service.vitals.error is not None:
            await asyncio.wait(waits[:1], timeout=FAILURE_SHOWN_S)
        return service.vitals.error
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def build_app(config: ServerConfig, engine: Engine, tokenizer: Tokenizer) -> web.Application:
    """The aiohttp application. Call it on the loop that will run it; starting the engine is the caller's."""
    keys = KeyRing(config.api_key, config.api_key_file)
    service = Service(config, engine, tokenizer)
    service.admission.limits = keys.limits
    sockets = SocketRegistry(service)
    api = HttpApi(service)
    pages = Pages(service)
    app = web.Application(middlewares=[_errors_and_checks], client_max_size=config.max_message_bytes)
    app[SERVICE] = service
    app[SOCKETS] = sockets
    app[_KEYS] = keys
    app[_GUARD] = Guard(config, keys)

    async def responses(request: web.Request) -> web.StreamResponse:
        return await api.responses(request, request[access.ENTRY].client)

    async def chat(request: web.Request) -> web.StreamResponse:
        return await api.chat(request, request[access.ENTRY].client)

    async def completions(request: web.Request) -> web.StreamResponse:
        return await api.completions(request, request[access.ENTRY].client)

    async def upgrade(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise UpgradeRequiredError("GET speaks WebSocket here; for plain HTTP use POST")
        return await sockets.handle(request, request[access.ENTRY].client)

    async def anything_else(request: web.Request) -> web.StreamResponse:
        await elsewhere.refuse_method(request)
        if not pages.has(request):
            raise NotFoundError(elsewhere.what_exists(request))
        if request.method not in ("GET", "HEAD"):
            raise web.HTTPMethodNotAllowed(request.method, ["GET", "HEAD"])
        return await pages.file(request)

    get = partial(app.router.add_get, expect_handler=elsewhere.continue_later)
    post = partial(app.router.add_post, expect_handler=elsewhere.continue_later)
    get("/v1/responses", upgrade, allow_head=False)
    post("/v1/responses", responses)
    post("/v1/chat/completions", chat)
    post("/v1/completions", completions)
    get("/v1/models", pages.models)
    get("/v1/models/{name:.+}", pages.model)
    get("/health", pages.health)
    get("/ready", pages.ready)
    get("/props", pages.props)
    get("/metrics", pages.metrics)
    get("/openapi.json", pages.openapi)
    app.router.add_route("*", elsewhere.PATTERN, anything_else, expect_handler=elsewhere.continue_later)
    app.on_response_prepare.append(_stamp)
    app.on_response_prepare.append(access.name_answer)
    app.cleanup_ctx.append(_lag_sampler)
    app.cleanup_ctx.append(_key_watcher)
    app.on_cleanup.append(_close_service)
    return app


async def _stamp(request: web.Request, answer: web.StreamResponse) -> None:
    """Headers of every answer, streams and errors too."""
    answer.headers["Server"] = SERVER_NAME
    guard = request.app[_GUARD]
    if guard.any_foreign_page:
        cors.stamp(answer.headers, guard.allowed_origin(request))


# --- around every request -----------------------------------------------------------------------------------


@web.middleware
async def _errors_and_checks(request: web.Request, handler: Handler) -> web.StreamResponse:
    app = request.app
    service = app[SERVICE]
    entry = access.begin(request, _method(request), _route(request))
    status = 500
    try:
        if isinstance(request.protocol, Connection) and request.path not in OPEN_PATHS:
            request.protocol.refuse_if_limited()
        entry.key_label = app[_GUARD].check(request, _port(request))
        # Who shares a key shares its limits; without labels the address tells clients apart, as it does connections.
        entry.client = entry.key_label or neighbourhood((request.remote,) if request.remote else None)
        if cors.is_preflight(request) and app[_GUARD].allowed_origin(request) is not None:
            answer: web.StreamResponse = cors.preflight(request)
        else:
            check_head(request)
            answer = await handler(request)
        status = answer.status
        return answer
    except DsparkError as error:
        if not isinstance(error, AnswerCutError):  # that one was counted among the responses
            service.refused(error)
        status, entry.error = error.status, error.code
        return _error_answer(request, error)
    except web.HTTPException as error:
        status = error.status
        return json_response(
            {"error": wire.ErrorBody(type="invalid_request_error", code=_code(error), message=_reason(error))},
            status=status,
            headers={"Allow": error.headers["Allow"]} if "Allow" in error.headers else None,
        )
    except asyncio.CancelledError:
        # So ends a socket's handler whenever the connection goes before it, and an event stream's whose client closes
        # as soon as it has read the last event. Else, as nginx says it, the client left.
        over = entry.answer_status == 101 or entry.whole
        status = entry.answer_status if over and entry.answer_status is not None else 499
        raise
    except ConnectionError:
        status = 499
        return web.Response(status=status)  # nobody will see it
    except Exception as error:
        log.exception("%s %s failed", _method(request), _route(request))
        return _error_answer(request, wire.as_dspark_error(error))
    finally:
        service.metrics.http[entry.method, entry.route, status] += 1
        if service.config.access_log:
            entry.write(status)


def _error_answer(request: web.Request, error: DsparkError) -> web.Response:
    if request[access.ENTRY].answer_status is not None and request.transport is not None:
        request.transport.abort()  # a head is out: this would pass for a piece of the answer that it began
    headers: dict[str, str] = {}
    if isinstance(error, BusyError) and error.status in (429, 503):
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UpgradeRequiredError):
        headers |= {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": VERSION}
    answer = json_response({"error": wire.error_body(error)}, status=error.status, headers=headers)
    if not request.content.is_eof() or isinstance(error, UnsupportedTransferError):
        answer.force_close()  # nothing that follows on this connection can be trusted to be a head, or is worth reading
    return answer


def _code(error: web.HTTPException) -> str:
    known = {404: "not_found", 405: "method_not_allowed"}
    return known.get(error.status, "bad_request")


def _reason(error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"the method is {error.method}; possible here: {', '.join(sorted(error.allowed_methods))}"
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


async def _key_watcher(app: web.Application) -> AsyncIterator[None]:
    def changed(gone: frozenset[str]) -> None:
        app[SERVICE].admission.limits = app[_KEYS].limits
        app[SOCKETS].shut_out(gone)

    task = asyncio.create_task(app[_KEYS].watch(changed, app[SERVICE].config.key_poll_s))
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _close_service(app: web.Application) -> None:
    app[SERVICE].close()
