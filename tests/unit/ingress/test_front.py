"""A real uvicorn on a loopback port, a small app behind it, and clients that behave or do not."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from serve_app.handoff.errors import CannotStart
from serve_app.ingress import front
from serve_app.ingress.door import FULL, Door
from serve_app.ingress.front import DRAINING, Address, Front

HOST = "127.0.0.1"
SOON_S = 5.0


@pytest.fixture(autouse=True)
def ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test ends a server; only those of its end connect as it closes."""
    monkeypatch.setattr(front, "LAST_S", 0.05)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def wrapped() -> None:
        async def main() -> None:
            async with asyncio.timeout(30):
                await test()

        asyncio.run(main())

    wrapped.__name__ = test.__name__
    return wrapped


class App:
    """``/stream`` sends a word at a time and ``/whole`` everything at once, both when they are let."""

    def __init__(self, prefix: str = "") -> None:
        self.goes_on = asyncio.Event()
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.started.set()
        self.after: Callable[[], Awaitable[None]] | None = None
        self.life = "none"
        self.body_bytes = 0
        ways = {
            "/stream": self.stream,
            "/whole": self.whole,
            "/read": self.read,
            "/echo": self.echo,
            "/pour": self.pour,
            "/vllm": self.vllm,
        }
        routes = [Route(path, way, methods=["GET", "POST"]) for path, way in ways.items()]
        self.asgi = Starlette(routes=routes, lifespan=self._life)

    @asynccontextmanager
    async def _life(self, _: Any) -> AsyncIterator[None]:
        await self.started.wait()
        self.life = "lives"
        yield
        self.life = "over"

    async def _until_let(self) -> None:
        self.begun.set()
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def whole(self, _: Request) -> Response:
        await self._until_let()
        return PlainTextResponse("whole", background=BackgroundTask(self.after) if self.after else None)

    async def read(self, request: Request) -> Response:
        self.body_bytes = len(await request.body())
        return await self.whole(request)

    async def vllm(self, request: Request) -> Response:
        """As vLLM's routes whose answers come as a whole."""
        await request.body()
        answer: Any = with_cancellation(self._as_vllm)
        return await answer({}, request) or Response()

    async def _as_vllm(self, _: Any, raw_request: Request) -> Response:
        return await self.whole(raw_request)

    async def stream(self, _: Request) -> Response:
        async def words() -> AsyncIterator[str]:
            yield "first "
            await self._until_let()
            yield "last"

        return StreamingResponse(words())

    async def pour(self, _: Request) -> Response:
        async def without_end() -> AsyncIterator[bytes]:
            self.begun.set()
            try:
                while True:
                    yield bytes(1 << 16)
                    await asyncio.sleep(0)  # as for an engine
            finally:
                self.cancelled.set()

        return StreamingResponse(without_end())

    async def echo(self, request: Request) -> Response:
        async for piece in request.stream():
            self.body_bytes += len(piece)
            self.begun.set()
        scope = {key: request.scope[key] for key in ("path", "root_path")}
        return JSONResponse(scope | {"bytes": self.body_bytes, "id": request.headers["x-request-id"]})


@asynccontextmanager
async def serving(
    app: Any, limit: int = 100, address: Address | None = None, **bounds: float
) -> AsyncIterator[tuple[Front, LifespanOn]]:
    """A front as Ray Serve has it in a replica: an app whose life it begins and ends."""
    bounds = {"body_s": 20, "drain_s": 5} | bounds
    at = Front(Door(app, limit), address or Address(HOST, 0, "epd"), **bounds)
    at.bind()
    life = LifespanOn(Config(at, lifespan="on", log_config=None))
    await life.startup()
    assert not life.should_exit
    try:
        yield at, life
    finally:
        await life.shutdown()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""
    again: bool = False
    """It ended as its head said it would."""


@dataclass
class Client:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    answers: list[Answer] = field(default_factory=list)

    @classmethod
    async def of(cls, at: Front | int, **options: Any) -> "Client":
        port = at if isinstance(at, int) else at.port
        return cls(*await asyncio.open_connection(HOST, port, **options))

    async def send(self, path: str, *headers: str, body: bytes = b"", method: str = "POST") -> None:
        head = [f"{method} {path} HTTP/1.1", "host: here", *headers]
        if not any(header.startswith("content-length") for header in headers):
            head.append(f"content-length: {len(body)}")
        self.writer.write("\r\n".join([*head, "", ""]).encode() + body)
        await self.writer.drain()

    async def head(self) -> Answer:
        status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        return Answer(int(status.split()[1]), dict(line.split(": ", 1) for line in lines))

    async def answer(self) -> Answer:
        answer = await self.head()
        if (length := answer.headers.get("content-length")) is not None:
            answer.body = await self.reader.readexactly(int(length))
            return answer
        while size := int(await self.reader.readline(), 16):
            answer.body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
        return answer

    async def ask(self, path: str, *headers: str, body: bytes = b"", method: str = "POST") -> Answer:
        await self.send(path, *headers, body=body, method=method)
        return await self.answer()

    async def is_closed(self) -> bool:
        """Awaits it. False: it was reset."""
        try:
            async with asyncio.timeout(SOON_S):
                return await self.reader.read() == b""
        except ConnectionError:
            return False

    @property
    def is_over(self) -> bool:
        return self.reader.at_eof() or self.reader.exception() is not None

    def leave(self) -> None:
        self.writer.transport.abort()


async def ask(at: Front | int, path: str, *headers: str, method: str = "POST", body: bytes = b"") -> Answer:
    client = await Client.of(at)
    answer = await client.ask(path, *headers, method=method, body=body)
    client.leave()
    return answer


async def soon(condition: Callable[[], Any | Awaitable[Any]]) -> None:
    async with asyncio.timeout(SOON_S):
        while True:
            holds = condition()
            if await holds if isinstance(holds, Awaitable) else holds:
                return
            await asyncio.sleep(0.01)


async def is_refused(port: int) -> bool:
    try:
        (await Client.of(port)).leave()
        return False
    except ConnectionRefusedError:
        return True


# ---- where and when it listens


@run
async def test_it_listens_when_the_app_has_started_and_no_sooner() -> None:
    app = App()
    app.started.clear()
    at = Front(Door(app.asgi), Address(HOST, 0, "epd"), body_s=20, drain_s=5)
    at.bind()
    port = at.port
    assert await is_refused(port)
    life = LifespanOn(Config(at, lifespan="on", log_config=None))
    starting = asyncio.create_task(life.startup())
    await asyncio.sleep(0)
    assert await is_refused(port)
    app.started.set()
    await starting
    assert (await ask(at, "/-/healthz", method="GET")).status == 200
    await life.shutdown()
    assert app.life == "over"
    assert await is_refused(port)


@run
async def test_it_listens_on_its_host_and_nowhere_else() -> None:
    def listens() -> set[Any]:
        return {tuple(c.laddr) for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}

    before = listens()
    async with serving(App().asgi) as (at, _):
        assert listens() - before == {(HOST, at.port)}


def test_port_that_another_program_has_is_told_in_a_sentence() -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        at = Front(Door(App().asgi), Address(HOST, port), body_s=1, drain_s=1)
        with pytest.raises(
            CannotStart, match=rf"cannot listen on {HOST}:{port} \(Address already in use\).*`http_options:`"
        ):
            at.bind()


@run
async def test_two_replicas_share_a_port_and_one_that_goes_leaves_it_to_the_other() -> None:
    apps = [App(), App()]
    for app in apps:
        app.goes_on.set()
    async with serving(apps[0].asgi) as (first, life):
        async with serving(apps[1].asgi, address=Address(HOST, first.port)) as (second, _):
            for _ in range(200):
                assert (await ask(first.port, "/whole")).body == b"whole"
                if all(app.begun.is_set() for app in apps):
                    break
            assert all(app.begun.is_set() for app in apps), "one got nothing of 200 connections"
            await life.shutdown()
            apps[1].begun.clear()
            for _ in range(20):
                assert (await ask(second.port, "/whole")).status == 200
        life.should_exit = True


# ---- what Serve's proxy answers


@run
async def test_balancers_and_probes_get_what_serves_proxy_tells_them() -> None:
    address = Address(HOST, 0, "epd", prefix="/epd")
    async with serving(App().asgi, address=address) as (at, _):
        healthz, routes = [await ask(at, path, method="GET") for path in ("/-/healthz", "/-/routes")]
        assert (healthz.status, healthz.body) == (200, b"success")
        assert (routes.status, json.loads(routes.body)) == (200, {"/epd": "epd"})
    async with serving(App().asgi) as (at, _):
        assert json.loads((await ask(at, "/-/routes", method="GET")).body) == {"/": "epd"}


@pytest.mark.parametrize(
    ("prefix", "root_path", "asked", "path", "root"),
    [
        ("", "", "/echo", "/echo", ""),
        ("/epd", "", "/epd/echo", "/epd/echo", "/epd"),
        ("/epd", "/api", "/epd/echo", "/api/epd/echo", "/api/epd"),
    ],
)
def test_app_is_below_its_prefix(prefix: str, root_path: str, asked: str, path: str, root: str) -> None:
    async def test() -> None:
        address = Address(HOST, 0, "epd", prefix=prefix, root_path=root_path)
        async with serving(App().asgi, address=address) as (at, _):
            told = json.loads((await ask(at, asked)).body)
            assert (told["path"], told["root_path"]) == (path, root)
            assert (await ask(at, "/-/healthz")).status == 200
            for other in ("/epdecho", "/other/echo"):
                assert (await ask(at, other)).status == 404

    run(test)()


@run
async def test_request_id_of_the_client_or_a_new_one_reaches_the_app_and_comes_back() -> None:
    async with serving(App().asgi) as (at, _):
        mine, made = await ask(at, "/echo", "X-Request-ID: mine"), await ask(at, "/echo")
        assert (json.loads(mine.body)["id"], mine.headers["x-request-id"]) == ("mine", "mine")
        assert json.loads(made.body)["id"] == made.headers["x-request-id"] != ""


# ---- the end of a replica, and of the server


@run
async def test_replica_that_goes_lets_end_what_is_under_way_and_takes_no_more() -> None:
    app = App()
    async with serving(app.asgi) as (at, life):
        port, idle, under_way, unasked = at.port, await Client.of(at), await Client.of(at), await Client.of(at)
        assert (await idle.ask("/echo")).status == 200
        await under_way.send("/stream")
        await app.begun.wait()
        ending = asyncio.create_task(life.shutdown())
        assert await idle.is_closed() and await unasked.is_closed()
        assert await is_refused(port)
        assert not ending.done() and app.life == "lives"
        app.goes_on.set()
        answer = await under_way.answer()
        assert answer.body == b"first last"
        assert await under_way.is_closed()
        await ending
        assert app.life == "over"


def test_clients_that_connect_as_it_closes_are_answered() -> None:
    """None is reset. Each connects while the loop is busy, and has not asked when there are no more connections."""

    async def test() -> None:
        app = App()
        app.goes_on.set()
        async with serving(app.asgi) as (at, life):
            kept, port = [], at.port
            ending = asyncio.create_task(life.shutdown())
            await soon(lambda: at._is_draining)
            with suppress(ConnectionRefusedError):
                while True:
                    kept.append(socket.create_connection((HOST, port)))  # in the kernel, past the loop
                    await asyncio.sleep(0.002)
            assert len(kept) > 5
            for connection in kept:
                connection.setblocking(False)
                client = Client(*await asyncio.open_connection(sock=connection))
                assert (await client.ask("/whole")).body == b"whole"
            await ending

    patched("LAST_S", 3.0, test)


@run
async def test_replica_that_goes_first_tells_balancers_and_still_takes_what_they_send() -> None:
    app = App()
    app.goes_on.set()
    async with serving(app.asgi, notice_s=0.5) as (at, life):
        client, port = await Client.of(at), at.port
        ending = asyncio.create_task(life.shutdown())
        await soon(lambda: at._is_draining)
        told = await ask(port, "/-/healthz", method="GET")
        assert (told.status, told.body) == (503, DRAINING.encode())
        answer = await client.ask("/whole")
        assert (answer.body, answer.headers["connection"]) == (b"whole", "close")
        assert await client.is_closed()
        await ending
        assert await is_refused(port)


@run
async def test_request_that_does_not_end_is_cut_when_its_time_is_over() -> None:
    app = App()
    async with serving(app.asgi, drain_s=0.3) as (at, life):
        client = await Client.of(at)
        await client.send("/stream")
        await app.begun.wait()
        await life.shutdown()
        assert app.cancelled.is_set() and app.life == "over"
        await client.head()
        client.leave()


@run
async def test_server_that_ends_answers_503_on_connections_that_it_has_and_opens_no_more() -> None:
    app = App()
    async with serving(app.asgi) as (at, _):
        port, under_way = at.port, await Client.of(at)
        await under_way.send("/stream")
        await app.begun.wait()
        at.close()
        await under_way.send("/echo")  # behind the first, by pipelining
        await soon(lambda: is_refused(port))
        app.goes_on.set()
        assert (await under_way.answer()).body == b"first last"


def test_server_whose_time_to_end_is_over_does_not_wait_again() -> None:
    async def test() -> None:
        app, loop = App(), asyncio.get_running_loop()
        async with serving(app.asgi) as (at, life):
            client = await Client.of(at)
            await client.send("/whole")
            await app.begun.wait()
            at.close()
            began = loop.time()
            await life.shutdown()
            assert app.cancelled.is_set() and loop.time() - began < 2, "of the 5 s for a drain"

    patched("FLUSH_S", 0.5, test)


# ---- limits


@run
async def test_more_requests_than_it_takes_are_refused_in_openais_shape() -> None:
    app = App()
    async with serving(app.asgi, limit=1) as (at, _):
        client = await Client.of(at)
        await client.send("/whole")
        await app.begun.wait()
        refused = await ask(at, "/whole")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert json.loads(refused.body)["error"]["message"] == FULL
        assert (await ask(at, "/-/healthz", method="GET")).status == 200
        app.goes_on.set()
        assert (await client.answer()).body == b"whole"
        assert (await ask(at, "/whole")).status == 200


@run
async def test_more_connections_than_it_holds_are_closed() -> None:
    async with serving(App().asgi, limit=1) as (at, _):
        held = [await Client.of(at) for _ in range(front.CONNECTIONS_PER_REQUEST)]
        assert (await held[-1].ask("/echo")).status == 200
        more = await Client.of(at)
        with suppress(ConnectionError):
            assert await more.reader.read() == b""
        assert (await held[0].ask("/echo")).status == 200


@run
async def test_body_that_nobody_reads_is_not_taken() -> None:
    """uvicorn stops to read; what the client can send is what the kernel's buffers hold."""
    app, block = App(), bytes(1 << 20)
    async with serving(app.asgi) as (at, _):
        client = await Client.of(at)
        await client.send("/whole", f"content-length: {256 << 20}")
        await app.begun.wait()
        sent = 0
        with suppress(TimeoutError):
            while sent < 64 << 20:
                client.writer.write(block)
                async with asyncio.timeout(0.5):
                    await client.writer.drain()
                sent += len(block)
        assert sent < 32 << 20
        client.leave()
        app.goes_on.set()  # as long as it does not read, uvicorn does not see that the client has left


def patched(name: str, value: float, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front, name, value)
        run(test)()


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"POST /echo HTT", b"POST /echo HTTP/1.1\r\nhost: here\r\n"])
def test_client_without_a_request_is_hung_up_on(sent: bytes) -> None:
    async def test() -> None:
        async with serving(App().asgi) as (at, _):
            client = await Client.of(at)
            client.writer.write(sent)
            assert await client.is_closed()

    patched("HEAD_S", 0.2, test)


def test_head_that_dribbles_is_given_up_also_after_a_request() -> None:
    async def test() -> None:
        async with serving(App().asgi) as (at, _):
            client = await Client.of(at)
            assert (await client.ask("/echo")).status == 200
            loop = asyncio.get_running_loop()
            began = loop.time()
            with suppress(ConnectionError):
                client.writer.write(b"POST /echo HTTP/1.1\r\nx: ")
                while not client.is_over:
                    client.writer.write(b"a")
                    await asyncio.sleep(0.05)
            assert loop.time() - began < SOON_S

    patched("HEAD_S", 0.3, test)


@run
async def test_head_without_end_is_refused() -> None:
    async with serving(App().asgi) as (at, _):
        client = await Client.of(at)
        client.writer.write(b"POST /echo HTTP/1.1\r\nx: " + b"a" * (2 * front.HEAD_BYTES))
        assert (await client.head()).status == 431
        client.leave()


def test_body_that_stops_is_answered_408_and_its_connection_closed() -> None:
    async def test() -> None:
        app = App()
        async with serving(app.asgi) as (at, _):
            client = await Client.of(at)
            await client.send("/echo", "content-length: 1000", body=b"a little")
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            assert app.body_bytes == len(b"a little")
            assert await client.is_closed()

    patched("PIECE_S", 0.2, test)


@run
async def test_body_that_dribbles_has_its_time_as_a_whole() -> None:
    async with serving(App().asgi, body_s=0.5) as (at, _):
        client = await Client.of(at)
        await client.send("/echo", "content-length: 1000", body=b"a")

        async def dribble() -> None:
            while True:
                client.writer.write(b"a")
                await asyncio.sleep(0.05)

        dribbling = asyncio.create_task(dribble())
        assert (await client.answer()).status == 408
        dribbling.cancel()
        client.leave()


def test_rest_of_a_body_that_was_answered_holds_no_connection() -> None:
    async def test() -> None:
        app = App()
        app.goes_on.set()
        async with serving(app.asgi) as (at, _):
            client = await Client.of(at)
            await client.send("/whole", "content-length: 1000000", body=b"a")
            assert (await client.answer()).body == b"whole"
            with suppress(ConnectionError):
                while not client.is_over:
                    client.writer.write(b"a")
                    await asyncio.sleep(0.02)

    patched("HEAD_S", 0.3, test)


def test_client_that_takes_nothing_of_its_answer_is_hung_up_on() -> None:
    async def test() -> None:
        app = App()
        async with serving(app.asgi) as (at, _):
            client = await Client.of(at, limit=1)
            await client.send("/pour")
            await app.begun.wait()
            async with asyncio.timeout(SOON_S):
                await app.cancelled.wait()
            await soon(lambda: at._door.inside == 0)
            client.leave()

    patched("STUCK_S", 0.3, test)


@run
async def test_idle_connection_closes_cleanly() -> None:
    async with serving(App().asgi, address=Address(HOST, 0, keep_alive_s=1)) as (at, _):
        client = await Client.of(at)
        assert [(await client.ask("/echo")).status for _ in range(2)] == [200, 200]
        assert await client.is_closed()


# ---- clients that leave


@pytest.mark.parametrize("path", ["/stream", "/whole", "/read", "/vllm"])
def test_client_that_leaves_takes_its_request_along(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        app = App()
        async with serving(app.asgi) as (at, _):
            client = await Client.of(at)
            await client.send(path, body=bytes(1 << 20) if path == "/read" else b"")
            await app.begun.wait()
            assert at._door.inside == 1
            client.leave()
            async with asyncio.timeout(SOON_S):
                await app.cancelled.wait()
            await soon(lambda: at._door.inside == 0)

    run(test)()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@run
async def test_client_that_leaves_in_the_midst_of_its_body_leaves_nothing_behind() -> None:
    app = App()
    async with serving(app.asgi) as (at, _):
        client = await Client.of(at)
        await client.send("/echo", "content-length: 1000", body=b"half")
        await app.begun.wait()
        client.leave()
        await soon(lambda: at._door.inside == 0)


@run
async def test_client_that_leaves_with_its_answer_does_not_cut_what_the_app_does_after_it() -> None:
    app, goes_on, done = App(), asyncio.Event(), asyncio.Event()

    async def after() -> None:
        await goes_on.wait()
        done.set()

    app.after = after
    app.goes_on.set()
    async with serving(app.asgi) as (at, _):
        client = await Client.of(at)
        assert (await client.ask("/whole")).body == b"whole"
        client.leave()
        await soon(lambda: not at._server.server_state.connections)  # type: ignore[union-attr]
        goes_on.set()
        await done.wait()
