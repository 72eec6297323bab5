"""HTTP at the ingress: each replica listens on the public port itself (``http: replicas``).

Serve's proxy costs as much CPU as all else around an engine: a process more, an actor call for the body, a pickled message
per chunk. With SO_REUSEPORT the kernel gives each new connection to one of the replicas of its node, and uvicorn serves it
on the replica's own loop. What the proxy does besides is here: ``/-/healthz`` and ``/-/routes``, ``route_prefix``, the
request id, the drain; so is a bound for what uvicorn lets a client do without end.

It listens as long as the app lives: from the end of its start-up, when every stage is ready, to its shutdown, with which
Ray Serve ends a replica that goes away. It first lets end what is under way.
"""

import asyncio
import socket
import uuid
from asyncio import Task, TimerHandle
from contextlib import suppress
from functools import partial
from typing import Any, cast

import uvicorn
from fastapi import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve_app.channel.wire import tell_when_gone
from serve_app.handoff.errors import CannotStart
from serve_app.ingress.address import Address
from serve_app.ingress.door import Door
from serve_app.ingress.replies import route_of

HEAD_S = 20.0
"""From the opening of a connection, or the first byte of a later request, to the end of the request's head."""

HEAD_BYTES = 64 << 10

PIECE_S = 30.0
"""Between two pieces of a body."""

STUCK_S = 60.0
"""For a client to take something of its answer, once what it has not taken fills the buffers."""

SILENT_S = 60
"""Until a client whose machine is gone without a word is hung up on."""

LEFT_S = 1.0
"""For a request to end by itself when it is told that its client has left: then it is cancelled. At once it must not be:
vLLM's `with_cancellation` cancels its handler when it is told, and leaves it running when it is itself cancelled."""

LAST_S = 0.5
"""For the request of a connection that was made just before there were no more."""

FLUSH_S = 2.0
"""For the last answers, when nobody waits for them any more."""

CONNECTIONS_PER_REQUEST = 4
"""Connections that a replica holds at most, per request that it takes."""

HEALTHZ, ROUTES = "/-/healthz", "/-/routes"
DRAINING = "This node is being drained."
"""What Serve's proxy says then."""

HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

CONNECTION = "epd.connection"
"""Key of an ASGI scope: the connection that the request came by."""


class TooSlow(HTTPException):
    """An HTTPException, because FastAPI makes a 400 of whatever else ``receive`` raises."""

    STATUS = 408

    def __init__(self) -> None:
        super().__init__(self.STATUS, "The request body did not arrive in time.")


class Connection(HttpToolsProtocol):
    """uvicorn's, with bounds for slow clients. A client that goes takes its request along, as behind Serve's proxy."""

    def __init__(self, most: int, *of_uvicorn: Any, **named: Any) -> None:
        """``most``: connections of this replica."""
        super().__init__(*of_uvicorn, **named)
        self.asks: Task[Any] | None = None
        """The request that is being answered."""
        self.gone = False
        self._most = most
        self._late: TimerHandle | None = None
        self._stuck: TimerHandle | None = None
        self._head_bytes: int | None = None
        """Of a head that has not ended."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._late = self.loop.call_later(HEAD_S, transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[CONNECTION] = self
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_asking = self.cycle is not None and not self.cycle.response_complete
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                if not is_asking:
                    self.transport.write(HEAD_TOO_LARGE)
                self.transport.close()
        if is_asking:
            self._came()
        elif self._late is None:  # the next head, or what is left of a body that was answered before its end
            self._late = self.loop.call_later(HEAD_S, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(STUCK_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._took()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._came()
        self._took()
        self.gone = True
        if self.asks is not None:
            self.loop.call_later(LEFT_S, self._left)

    def _left(self) -> None:
        if self.asks is not None:
            self.asks.cancel()

    def _came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _took(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


class Front:
    """Outermost around the app, in front of its ``Door``."""

    def __init__(self, door: Door, address: Address, *, body_s: float, drain_s: float, notice_s: float = 0.0) -> None:
        """``body_s``: for a whole body to arrive. ``drain_s``: for what is under way to end when the replica goes away, and
        before that ``notice_s``, in which load balancers learn of it and requests are still taken."""
        self._door = door
        self._at = address
        self._body_s = body_s
        self._drain_s = drain_s
        self._notice_s = notice_s
        self._leaving = False
        """It takes no new connections, or will soon take none."""
        self._socket: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._serving: Task[None] | None = None

    # ---- its life

    def bind(self) -> None:
        """Take the port, without listening yet. Raises ``CannotStart``."""
        taken = socket.socket(socket.AF_INET6 if ":" in self._at.host else socket.AF_INET)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        tell_when_gone(taken, SILENT_S)
        try:
            taken.bind((self._at.host, self._at.port))
        except OSError as error:
            taken.close()
            raise CannotStart(
                f"it cannot listen on {self._at.host}:{self._at.port} ({error.strerror or error}): another program has the "
                "port, or this node has no such address. Set `http_options:` in the Serve config"
            ) from None
        self._socket = taken

    @property
    def port(self) -> int:
        assert self._socket is not None
        return int(self._socket.getsockname()[1])

    async def listen(self) -> None:
        assert self._socket is not None
        config = uvicorn.Config(
            self,
            http=cast(Any, partial(Connection, CONNECTIONS_PER_REQUEST * self._door.limit)),
            ws="none",
            lifespan="off",  # Serve runs it
            root_path=self._at.root_path,
            timeout_keep_alive=self._at.keep_alive_s,
            log_config=None,
            access_log=False,  # `Trace.line` is ours
            **self._at.tls,
        )
        config.load()
        server = self._server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        # uvicorn's `serve` would take the signals of this process.
        await server.startup(sockets=[self._socket])
        self._serving = asyncio.create_task(self._serve(server, self._socket), name="epd-front")

    async def _serve(self, server: uvicorn.Server, listening: socket.socket) -> None:
        await server.main_loop()
        await self._stop_listening(server, listening)
        await asyncio.sleep(LAST_S)
        await server.shutdown(sockets=[listening])

    async def _stop_listening(self, server: uvicorn.Server, listening: socket.socket) -> None:
        """Those who have connected since the loop last looked are taken: by closing, the kernel would reset them."""
        connected = []
        listening.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                connected.append(listening.accept()[0])
        for each in server.servers:
            each.close()
        config, loop = server.config, asyncio.get_running_loop()
        protocol: Any = config.http_protocol_class
        make = partial(protocol, config, server.server_state, server.lifespan.state)
        for connection in connected:
            connection.setblocking(False)
            with suppress(OSError):  # it has left
                await loop.connect_accepted_socket(make, connection, ssl=config.ssl)

    def close(self) -> None:
        """The whole server ends: no new connection, and no new request by those that are there. Whoever calls it waits for
        what is under way; the shutdown that follows does not."""
        self._leaving = True
        self._door.close()
        if self._server is not None:
            self._server.should_exit = True

    async def drain(self) -> None:
        """This replica goes away: take no more connections, and return when what is under way has ended."""
        if self._server is None or self._serving is None:
            return
        self._leaving = True
        if not self._door.closed:
            await asyncio.sleep(self._notice_s)
        self._server.should_exit = True
        await asyncio.wait([self._serving], timeout=FLUSH_S if self._door.closed else self._drain_s)
        if not self._serving.done():
            await self._cut(self._server)

    async def _cut(self, server: uvicorn.Server) -> None:
        under_way = list(server.server_state.tasks)
        for task in under_way:
            task.cancel()
        if under_way:
            await asyncio.wait(under_way, timeout=FLUSH_S)
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        server.force_exit = True
        if self._serving is not None:
            await asyncio.wait([self._serving], timeout=FLUSH_S)

    # ---- as an app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http":
            connection: Connection | None = scope.pop(CONNECTION, None)
            await self._answer(connection, scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def drained() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.drain()
            return message

        async def listening(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self.listen()
            await send(message)

        await self._door(scope, drained, listening)

    async def _answer(self, connection: Connection | None, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        if request_id is None:
            request_id = str(uuid.uuid4()).encode()
            scope["headers"].append((b"x-request-id", request_id))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-request-id", request_id)]
                if self._leaving or message["status"] == TooSlow.STATUS:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
                await send(message)
            else:
                await send(message)
                if connection is not None and not message.get("more_body", False):
                    connection.asks = None

        app = self._app_of(scope)
        if connection is not None:
            connection.asks = asyncio.current_task()
        try:
            await app(scope, self._in_time(connection, receive), answer)
        except asyncio.CancelledError:
            if connection is None or not connection.gone:
                raise
        finally:
            if connection is not None:
                connection.asks = None

    def _app_of(self, scope: Scope) -> ASGIApp:
        """The application below its prefix, which then is part of the root path as behind Serve's proxy, or an answer."""
        route = route_of(scope)
        if route in (HEALTHZ, ROUTES):
            return self._told(route)
        prefix = self._at.prefix
        if not (route + "/").startswith(prefix + "/"):
            return PlainTextResponse(f"Path '{route}' not found. Ping http://.../-/routes for available routes.", 404)
        scope["root_path"] = scope.get("root_path", "") + prefix
        return self._door

    def _told(self, route: str) -> Response:
        if self._leaving:
            return PlainTextResponse(DRAINING, 503)
        return (
            PlainTextResponse("success")
            if route == HEALTHZ
            else JSONResponse({self._at.prefix or "/": self._at.app_name})
        )

    def _in_time(self, connection: Connection | None, receive: Receive) -> Receive:
        """Raises ``TooSlow`` for a body that does not come to its end."""
        loop = asyncio.get_running_loop()
        until, is_whole = loop.time() + self._body_s, False

        async def in_time() -> Message:
            nonlocal is_whole
            if is_whole:  # what comes now is that the client has left
                return await receive()
            try:
                async with asyncio.timeout_at(min(until, loop.time() + PIECE_S)):
                    message = await receive()
            except TimeoutError:
                raise TooSlow from None
            is_whole = not message.get("more_body", False)
            if is_whole and connection is not None:
                connection.flow.resume_reading()  # uvicorn would not see that the client leaves, before it is asked again
            return message

        return in_time
