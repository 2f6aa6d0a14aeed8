"""The shell of one WebSocket: frames in and out, tasks for the session's commands, close codes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection, Iterable

from aiohttp import WebSocketError, WSCloseCode, WSMsgType, web

from dspark_stream import __version__
from dspark_stream.errors import DrainingError, DsparkError, InvalidRequestError, OverloadedError, RateLimitError
from dspark_stream.server import access, wire
from dspark_stream.server.admission import Held
from dspark_stream.server.bodies import Encoding, decode_envelope, decode_event
from dspark_stream.server.delivery import Delivery, SlowReaderError, bound_buffers
from dspark_stream.server.frames import may_be_sent
from dspark_stream.server.guard import offered_subprotocols
from dspark_stream.server.handshake import check_handshake, choose_subprotocol
from dspark_stream.server.plan import Plan
from dspark_stream.server.service import Service
from dspark_stream.server.session import Abandon, Cancel, Outcome, Session, SessionLimits, Start
from dspark_stream.types import EngineEvent, FinishedEvent, GenerationRequest

log = logging.getLogger(__name__)


class SocketShell:
    """Drives a `Session` over one socket: a reader (the request's own task), a writer, one task for each response."""

    def __init__(self, service: Service, client: str) -> None:
        self._service = service
        self.client = client
        """Whose limits it counts against."""
        self._entry = access.current()
        config = service.config
        self._session = Session(
            SessionLimits(
                max_lanes=config.max_lanes,
                max_lane_queue=config.max_lane_queue,
                max_responses=config.max_socket_queue,
            ),
            service.planner.response,
            lambda plan: service.hold(plan, client),
        )
        self._delivery = Delivery(self._write, engine=service.engine, config=config, metrics=service.metrics)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._encoding: Encoding = "json"
        self._transport: asyncio.Transport | None = None
        self._closer: asyncio.Task[None] | None = None
        self._close_code: int | None = None
        self._over = False

    @property
    def key_label(self) -> str:
        """Of the key with which it was opened; empty where keys have none."""
        return self._entry.key_label

    @property
    def pending_bytes(self) -> int:
        """About how much waits for the reader."""
        return self._delivery.outbox.pending_bytes

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        """Upgrade, then serve until either side closes."""
        config = self._service.config
        check_handshake(request)
        offered = offered_subprotocols(request)
        protocol = choose_subprotocol(offered)
        self._encoding = wire.PROTOCOLS.get(protocol or wire.JSON_PROTOCOL, "json")
        self._ws = web.WebSocketResponse(
            protocols=(protocol,) if protocol else (),
            heartbeat=config.heartbeat_s,
            timeout=config.close_timeout_s,
            autoclose=False,
            max_msg_size=config.max_message_bytes + 1,  # aiohttp refuses what is as long as this
            writer_limit=config.write_buffer_bytes // 4,
            # Compressed sizes tell what is being said, cost the loop's time, and let a small frame become a large one.
            compress=False,
        )
        if offered:
            # aiohttp logs offers that it does not know, and a browser's key is one.
            request = _offering(request, protocol)
        self._transport = request.transport
        metrics = self._service.metrics
        try:
            await self._ws.prepare(request)
        except (ConnectionError, asyncio.CancelledError):
            metrics.handshakes_aborted += 1
            raise
        if self._transport is not None:
            bound_buffers(self._transport, config)
        self._delivery.put(self._hello(wire.MSGPACK_PROTOCOL if self._encoding == "msgpack" else wire.JSON_PROTOCOL))
        metrics.sockets_open += 1
        metrics.sockets_total += 1
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._delivery.run())
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and isinstance(writer.exception(), SlowReaderError):
                log.info("closing a slow reader: %s", writer.exception())
                _cancel(self._tasks.values())
                await self._begin_close(WSCloseCode.TRY_AGAIN_LATER, "the reader is too slow")
        finally:
            # aiohttp cancels us when the connection is lost, perhaps in the middle of this: no await before
            # everything that still runs for this client, in whichever state it is, was told to stop.
            self._over = True
            left = [*self._tasks.values(), reader, writer]
            _cancel(left)
            metrics.sockets_open -= 1
            code = self._close_code or self._ws.close_code or WSCloseCode.ABNORMAL_CLOSURE
            metrics.sockets_closed[code] += 1
            metrics.merged_deltas += self._delivery.outbox.merged
            if self._closer is not None:
                left.append(self._closer)
            try:
                await _ended(left)
            finally:
                for response_id in self._session.waiting:
                    self._log_unbegun(response_id)
                self._session.close()
                self._service.store.forget(self)
                if self._closer is not None:  # perhaps made meanwhile
                    await _ended([self._closer])
        return self._ws

    async def close(self, code: int, reason: str) -> None:
        """Write what is pending, if the reader takes it, then close."""
        config = self._service.config
        try:
            async with asyncio.timeout(config.close_timeout_s):
                await self._delivery.flushed()
        except TimeoutError:
            log.info("closing a socket with %d events unread", len(self._delivery.outbox))
        await self._begin_close(code, reason)

    def shut(self, code: int, reason: str) -> None:
        """Close it at once; `serve` sees to the end of that."""
        self._begin_close(code, reason)

    # --- reading ----------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            message = await self._ws.receive()
            match message.type:
                case WSMsgType.TEXT | WSMsgType.BINARY:
                    self._receive(message.data)
                case WSMsgType.CLOSE:
                    await self._answer_close(message.data)
                    return
                case WSMsgType.ERROR if isinstance(message.data, WebSocketError):
                    self._close_code = message.data.code  # a frame that broke the protocol: aiohttp has answered it
                    return
                case _:
                    return  # closed or closing
            await self._delivery.room()

    async def _answer_close(self, code: int) -> None:
        if code and not may_be_sent(code):
            await self._begin_close(WSCloseCode.PROTOCOL_ERROR, "a reserved close code")
        elif not self._ws.closed:
            # Not drained: a peer that has said goodbye may not read any more.
            await self._ws.close(drain=False)

    def _receive(self, data: str | bytes) -> None:
        expected = "json" if isinstance(data, str) else "msgpack"
        if expected != self._encoding:
            kind = "text" if self._encoding == "json" else "binary"
            self._refuse(
                InvalidRequestError(f"this socket speaks {self._encoding}: send {kind} frames", code="wrong_frame_type")
            )
            return
        try:
            event = decode_event(data, self._encoding, self._service.most_values)
        except DsparkError as error:
            envelope = decode_envelope(data, self._encoding, self._service.most_values)
            self._refuse(error, envelope.event_id, envelope.stream_id)
            return
        self._apply(self._session.receive(event))

    def _refuse(self, error: DsparkError, event_id: object = None, stream_id: object = None) -> None:
        self._apply(self._session.refuse(error, event_id=event_id, stream_id=stream_id))

    # --- what the session wants -------------------------------------------------------------------------------

    def _apply(self, outcome: Outcome) -> None:
        for response_id, event in outcome.events:
            if isinstance(event, wire.ErrorEvent):
                self._service.metrics.refused[event.error.code] += 1
                self._log_refusal(event)
            elif isinstance(event, wire.Cancelled) and event.response.id not in self._tasks:
                self._log_unbegun(event.response.id)
            self._delivery.put(event, response_id)
        for command in outcome.commands:
            match command:
                case Start(plan=plan) if self._over:  # nobody would wait for its task
                    self._log_unbegun(plan.response_id)
                case Start(plan=plan, memory=memory):
                    self._spawn(plan, memory)
                case Abandon(response_id=response_id):
                    self._tasks[response_id].cancel()
                case Cancel(response_id=response_id):
                    self._service.engine.cancel(response_id)

    def _log_refusal(self, event: wire.ErrorEvent) -> None:
        line = access.current()
        if not line.of_socket:  # else it is the end of the response whose line this is
            line = self._entry.for_response("")
        line.error = event.error.code
        self._log(line, event.status)

    def _log_unbegun(self, response_id: str) -> None:
        """Of a response that ended while it waited for its turn."""
        line = self._entry.for_response(response_id)
        line.reason = "cancelled"
        self._log(line, 200)

    def _log(self, line: access.Entry, status: int) -> None:
        if self._service.config.access_log:
            line.write(status)

    def _spawn(self, plan: Plan, memory: Held) -> None:
        response_id = plan.response_id
        line = self._entry.for_response(response_id)
        task = asyncio.create_task(self._run(plan, memory, line))
        self._tasks[response_id] = task

        def over(task: asyncio.Task[None]) -> None:
            self._tasks.pop(response_id, None)
            if task.cancelled() and not line.reason:  # before the engine had it, perhaps before the task's first step
                line.reason = "cancelled"
            self._log(line, line.error_status or 200)

        task.add_done_callback(over)

    async def _run(self, plan: Plan, memory: Held, line: access.Entry) -> None:
        access.enter(line)
        try:
            listener = _Listener(self, plan.response_id)
            await self._service.run(plan, self.client, listener, owner=self, memory=memory)
        except DsparkError as error:
            line.error_status, line.error = error.status, error.code
            self._apply(self._session.refused(plan.response_id, error))
        except Exception as error:
            log.exception("starting %s failed", plan.response_id)
            ours = wire.as_dspark_error(error)
            line.error_status, line.error = ours.status, ours.code
            self._apply(self._session.refused(plan.response_id, ours))
        finally:
            self._delivery.remove_stream(plan.response_id)

    def started(self, response_id: str, taken: GenerationRequest | None) -> None:
        """`Listener.started` of one of this socket's responses."""
        self._delivery.add_stream(response_id)
        self._apply(self._session.started(response_id, taken))

    def engine_event(self, event: EngineEvent) -> None:
        """`Listener.engine_event` of one of this socket's responses."""
        if isinstance(event, FinishedEvent):
            self._delivery.remove_stream(event.request_id)
        self._apply(self._session.engine_event(event))

    # --- writing ------------------------------------------------------------------------------------------------

    async def _write(self, event: wire.ServerEvent) -> None:
        kind = WSMsgType.TEXT if self._encoding == "json" else WSMsgType.BINARY
        await self._ws.send_frame(wire.encode(event, self._encoding), kind)

    def _begin_close(self, code: int, reason: str) -> asyncio.Task[None]:
        if self._closer is None:
            self._close_code = code
            self._closer = asyncio.create_task(self._close(code, reason))
        return self._closer

    async def _close(self, code: int, reason: str) -> None:
        transport = self._transport
        try:
            async with asyncio.timeout(self._service.config.close_timeout_s * 2):
                await self._ws.close(code=code, message=reason.encode(), drain=False)
        except TimeoutError:
            log.debug("a socket did not close in time")
        finally:
            # A peer that does not read would keep the buffer, and us, for ever.
            if transport is not None and transport.get_write_buffer_size():
                transport.abort()

    def _hello(self, protocol: str) -> wire.Hello:
        info, config = self._service.info, self._service.config
        return wire.Hello(
            version=__version__,
            protocol=protocol,
            model=info.model,
            drafter=info.drafter,
            gamma=info.gamma,
            schedule=info.schedule,
            sampling=info.sampling,
            limits=wire.HelloLimits(
                max_model_len=info.max_model_len,
                max_num_seqs=info.max_num_seqs,
                max_queue=config.max_queue,
                max_message_bytes=config.max_message_bytes,
                max_lanes=config.max_lanes,
                max_lane_queue=config.max_lane_queue,
                max_streams_per_client=self._service.admission.most_alone(self.client),
            ),
        )


class _Listener:
    def __init__(self, shell: SocketShell, response_id: str) -> None:
        self._shell = shell
        self._response_id = response_id

    def started(self, taken: GenerationRequest | None) -> None:
        self._shell.started(self._response_id, taken)

    def engine_event(self, event: EngineEvent) -> None:
        self._shell.engine_event(event)


class SocketRegistry:
    """The open sockets of an application: how many there may be, and how they are closed when it ends."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.open: set[SocketShell] = set()

    async def handle(self, request: web.Request, client: str) -> web.WebSocketResponse:
        """Serve one upgrade request to its end.

        Raises:
            DrainingError: the server is shutting down.
            OverloadedError: there are as many sockets as there may be.
            RateLimitError: this client has its share of them: no more than are free, as with places for streams.
        """
        if self._service.draining:
            raise DrainingError("the server is shutting down; try again in a moment", retry_after_s=5)
        most = self._service.config.max_sockets
        free = most - len(self.open)
        if free <= 0:
            raise OverloadedError(f"all {most} sockets are open; try again in a moment", retry_after_s=5)
        mine = sum(shell.client == client for shell in self.open)
        if self._service.admission.shared and mine >= free:
            raise RateLimitError(
                f"this client (key or address) already has {mine} of the server's {most} sockets, and what is left is "
                "for others; a socket carries many responses at once",
                retry_after_s=5,
            )
        shell = SocketShell(self._service, client)
        self.open.add(shell)
        try:
            return await shell.serve(request)
        finally:
            self.open.discard(shell)

    def shut_out(self, labels: Collection[str]) -> None:
        """Close every socket that was opened with a key of these labels: it is no longer one."""
        for shell in self.open:
            if shell.key_label in labels:
                shell.shut(WSCloseCode.POLICY_VIOLATION, "the key is no longer valid")

    async def close_all(self) -> None:
        """Close every socket with 1012: the service goes down, and may come back."""
        # One that is ending by itself meanwhile must not keep the others from being closed.
        await _ended(shell.close(WSCloseCode.SERVICE_RESTART, "the server is shutting down") for shell in self.open)


def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


async def _ended(tasks: Iterable[Awaitable[None]]) -> None:
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception) and not isinstance(result, ConnectionError | SlowReaderError):
            log.error("a socket's task failed", exc_info=result)


def _offering(request: web.Request, protocol: str | None) -> web.Request:
    headers = request.headers.copy()
    headers.popall("Sec-WebSocket-Protocol", None)
    if protocol is not None:
        headers["Sec-WebSocket-Protocol"] = protocol
    clone = request.clone(headers=headers)
    assert isinstance(clone, web.Request)  # aiohttp names the base class
    return clone
