"""HTTP at the ingress: each replica listens on the public port itself (``http: replicas``).

Serve's proxy costs as much CPU as everything else around an engine: one more process, an actor call for the body, a pickled
message per chunk. With SO_REUSEPORT the kernel gives each new connection to one of the replicas of its node, and uvicorn
serves it on the replica's own loop. The front also does the proxy's other work (``/-/healthz``, ``/-/routes``,
``route_prefix``, request id, draining) and sets the limits that uvicorn lacks for slow clients.

It listens from the end of the app's start-up, when every stage is ready, until Ray Serve shuts the app down.
"""

import asyncio
import socket
import uuid
from asyncio import Task, TimerHandle
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import uvicorn
from fastapi import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve_app.channel.wire import tell_when_gone
from serve_app.handoff.errors import CannotStart
from serve_app.ingress.door import Door
from serve_app.ingress.replies import route_of

HEAD_S = 20.0
"""Seconds from the opening of a connection, or the first byte of a later request, to the end of the request's head."""

HEAD_BYTES = 64 << 10

PIECE_S = 30.0
"""Seconds between two pieces of a body."""

STUCK_S = 60.0
"""Seconds until a client must read some of its answer, once the buffers are full."""

SILENT_S = 60
"""Seconds until the connection of a client whose machine has died is closed."""

LEFT_S = 1.0
"""Seconds until a request is cancelled after it has been told that its client has left. vLLM's `with_cancellation` ends its
handler when it is told; cancelled before that, it would leave the handler running."""

LAST_S = 0.5
"""Seconds for the request of the last accepted connection to arrive."""

FLUSH_S = 2.0
"""Seconds for the last bytes of answers after their requests are cancelled, or after the server is closed."""

CONNECTIONS_PER_REQUEST = 4
"""Limit of a replica's open connections, per request that it takes."""

DRAINING = "This node is being drained."
"""The text of Serve's proxy."""

HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

CONNECTION = "epd.connection"
"""Key in an ASGI scope: the connection of the request."""


@dataclass(frozen=True)
class Address:
    """The public address of one application, from Serve's ``http_options``."""

    host: str
    port: int
    app_name: str = ""
    prefix: str = ""
    """``route_prefix`` without a final slash."""
    root_path: str = ""
    keep_alive_s: int = 90
    tls: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of uvicorn."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits for slow clients. When a client leaves, its request is cancelled."""

    def __init__(self, limit: int, *args: Any, **kwargs: Any) -> None:
        """``limit``: connections that this replica may have open."""
        super().__init__(*args, **kwargs)
        self.task: Task[Any] | None = None
        """The task that answers the current request."""
        self.is_lost = False
        self._limit = limit
        self._timers: dict[str, TimerHandle] = {}
        """Timers that close the connection unless the client sends (``head``) or reads (``answer``)."""
        self._head_bytes: int | None = None
        """Size of the head so far; None between heads."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limit:
            transport.abort()
        else:
            self._timers["head"] = self.loop.call_later(HEAD_S, transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[CONNECTION] = self
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                if not is_answering:
                    self.transport.write(HEAD_TOO_LARGE)
                self.transport.close()
        if is_answering:
            self._stop_timer("head")
        elif "head" not in self._timers:  # the next head, or the rest of a body that was answered before its end
            self._timers["head"] = self.loop.call_later(HEAD_S, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._timers["answer"] = self.loop.call_later(STUCK_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_timer("answer")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer("head")
        self._stop_timer("answer")
        self.is_lost = True
        if self.task is not None:
            self.loop.call_later(LEFT_S, self._cancel_task)

    def _cancel_task(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def _stop_timer(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


class Front:
    """The outermost ASGI app: it serves the app behind ``door`` on the public port."""

    def __init__(self, door: Door, address: Address, *, body_s: float, drain_s: float, notice_s: float = 0.0) -> None:
        """``body_s``: limit for a whole body to arrive. ``drain_s``: limit for requests to end when the replica shuts down.
        For ``notice_s`` before that, load balancers learn of it and requests are still accepted."""
        self._door = door
        self._address = address
        self._body_s = body_s
        self._drain_s = drain_s
        self._notice_s = notice_s
        self._is_draining = False
        """Clients are told to connect elsewhere."""
        self._socket: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._serving: Task[None] | None = None

    def bind(self) -> None:
        """Take the port, without listening yet. Raises ``CannotStart``."""
        host, port = self._address.host, self._address.port
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        tell_when_gone(bound, SILENT_S)
        try:
            bound.bind((host, port))
        except OSError as error:
            bound.close()
            raise CannotStart(
                f"it cannot listen on {host}:{port} ({error.strerror or error}): another program has the "
                "port, or this node has no such address. Set `http_options:` in the Serve config"
            ) from None
        self._socket = bound

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
            root_path=self._address.root_path,
            timeout_keep_alive=self._address.keep_alive_s,
            log_config=None,
            access_log=False,  # the ingress logs `Trace.line`
            **self._address.tls,
        )
        config.load()
        server = self._server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        # uvicorn's `serve` would take the signals of this process.
        await server.startup(sockets=[self._socket])
        self._serving = asyncio.create_task(self._serve(server, self._socket), name="epd-front")

    async def _serve(self, server: uvicorn.Server, listening: socket.socket) -> None:
        await server.main_loop()
        # The kernel would reset connections that nobody has accepted when the socket closes.
        connected = []
        listening.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                connected.append(listening.accept()[0])
        for each in server.servers:
            each.close()
        protocol: Any = server.config.http_protocol_class
        make = partial(protocol, server.config, server.server_state, server.lifespan.state)
        for connection in connected:
            connection.setblocking(False)
            with suppress(OSError):  # the client has left
                await asyncio.get_running_loop().connect_accepted_socket(make, connection, ssl=server.config.ssl)
        await asyncio.sleep(LAST_S)
        await server.shutdown(sockets=[listening])

    @property
    def inside(self) -> int:
        """Requests under way."""
        return self._door.inside

    def close(self) -> int:
        """Take no more connections and requests, because the whole server ends. Returns how many requests are under way. The
        caller waits for them; the shutdown that follows does not."""
        self._is_draining = True
        if self._server is not None:
            self._server.should_exit = True
        return self._door.close()

    async def drain(self) -> None:
        """Take no more connections, because this replica shuts down, and return when the requests under way have ended."""
        if self._server is None or self._serving is None:
            return
        self._is_draining = True
        if not self._door.closed:
            await asyncio.sleep(self._notice_s)
        self._server.should_exit = True
        await asyncio.wait([self._serving], timeout=FLUSH_S if self._door.closed else self._drain_s)
        if self._serving.done():
            return
        if tasks := list(self._server.server_state.tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=FLUSH_S)
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        self._server.force_exit = True
        await asyncio.wait([self._serving], timeout=FLUSH_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            connection: Connection | None = scope.pop(CONNECTION, None)
            await self._answer(connection, scope, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def drain_first() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.drain()
            return message

        async def listen_first(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self.listen()
            await send(message)

        await self._door(scope, drain_first, listen_first)

    async def _answer(self, connection: Connection | None, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        if request_id is None:
            request_id = str(uuid.uuid4()).encode()
            scope["headers"].append((b"x-request-id", request_id))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-request-id", request_id)]
                if self._is_draining or message["status"] == 408:
                    headers.append((b"connection", b"close"))
                return await send({**message, "headers": headers})
            await send(message)
            if connection is not None and not message.get("more_body", False):
                connection.task = None

        app = self._app_of(scope)
        if connection is not None:
            connection.task = asyncio.current_task()
        try:
            await app(scope, self._timed(connection, receive), answer)
        except asyncio.CancelledError:
            if connection is None or not connection.is_lost:
                raise
        finally:
            if connection is not None:
                connection.task = None

    def _app_of(self, scope: Scope) -> ASGIApp:
        """The app, with its prefix moved to the root path as by Serve's proxy, or the proxy's answer for other paths."""
        route, prefix = route_of(scope), self._address.prefix
        if route in ("/-/healthz", "/-/routes"):
            if self._is_draining:
                return PlainTextResponse(DRAINING, 503)
            is_ping = route == "/-/healthz"
            return PlainTextResponse("success") if is_ping else JSONResponse({prefix or "/": self._address.app_name})
        if not (route + "/").startswith(prefix + "/"):
            return PlainTextResponse(f"Path '{route}' not found. Ping http://.../-/routes for available routes.", 404)
        scope["root_path"] = scope.get("root_path", "") + prefix
        return self._door

    def _timed(self, connection: Connection | None, receive: Receive) -> Receive:
        """``receive`` that raises a 408 for a slow body. FastAPI makes a 400 of all but an HTTPException."""
        loop = asyncio.get_running_loop()
        until, is_whole = loop.time() + self._body_s, False

        async def timed() -> Message:
            nonlocal is_whole
            if is_whole:  # the next message says that the client has left
                return await receive()
            try:
                async with asyncio.timeout_at(min(until, loop.time() + PIECE_S)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "The request body did not arrive in time.") from None
            is_whole = not message.get("more_body", False)
            if is_whole and connection is not None:
                connection.flow.resume_reading()  # else uvicorn notices only at the next `receive` that the client leaves
            return message

        return timed
