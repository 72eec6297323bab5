"""serve_app.openai_app: the middleware that holds the status line, over small hand-made apps."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from fastapi import Body, FastAPI
from fastapi.testclient import TestClient
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from serve_app import trace
from serve_app.errors import ConfigError
from serve_app.openai_app import SERVER_ARGS, PipelineMiddleware, check_api_args
from serve_app.trace import Trace

EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
JSON = (b"content-type", b"application/json")
LIMIT = 100


class Client:
    """One HTTP exchange with an ASGI app; ``sent`` is what has reached the client so far."""

    def __init__(self, *chunks: bytes, headers: Iterable[tuple[bytes, bytes]] = (), **scope: Any) -> None:
        self.scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": list(headers)} | scope
        self.sent: list[Message] = []
        body = chunks or (b"",)
        self._messages = [{"type": "http.request", "body": chunk, "more_body": chunk is not body[-1]} for chunk in body]

    async def receive(self) -> Message:
        return self._messages.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def ask(self, app: ASGIApp) -> "Client":
        await PipelineMiddleware(app, LIMIT)(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        (start,) = [m for m in self.sent if m["type"] == "http.response.start"]
        assert self.sent[0] is start
        return int(start["status"])

    @property
    def headers(self) -> Headers:
        return Headers(raw=self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.sent[1:])


def start(header: tuple[bytes, bytes] = EVENTS, status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [header, (b"x-kept", b"1")]}


def body(content: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def the_trace() -> Trace:
    record = trace.current.get()
    assert record is not None
    return record


def app_of(steps: Callable[[Send], Awaitable[None]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await steps(send)

    return app


def test_start_of_a_stream_waits_for_the_first_token() -> None:
    client = Client()

    async def steps(send: Send) -> None:
        await send(start())
        await send(body(b"role;"))
        assert client.sent == []
        the_trace().token(1)
        await send(body(b"one;"))
        assert client.body == b"role;one;"
        await send(body(b"two", more=False))

    asyncio.run(client.ask(app_of(steps)))
    assert client.status == 200
    assert client.body == b"role;one;two"
    assert client.headers["x-kept"] == "1"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (GracefulHTTPError("The decode stage is gone", 503), 503, "Service Unavailable"),  # type: ignore[arg-type]
        (GracefulHTTPError("too slow", 504), 504, "Gateway Timeout"),  # type: ignore[arg-type]
        (VLLMValidationError("too long"), 400, "BadRequestError"),
        (KeyError("ours"), 500, "InternalServerError"),
    ],
)
def test_failure_before_the_first_token_replaces_the_stream(error: Exception, status: int, kind: str) -> None:
    async def steps(send: Send) -> None:
        await send(start())
        the_trace().fail(error)
        await send(body(b"data: an error event"))
        await send(body(b"data: [DONE]", more=False))

    client = asyncio.run(Client().ask(app_of(steps)))
    assert client.status == status
    answer = json.loads(client.body)["error"]
    assert (answer["code"], answer["type"], answer["message"]) == (status, kind, str(error))
    assert client.headers["content-type"] == "application/json"
    assert int(client.headers["content-length"]) == len(client.body)
    assert client.headers["x-kept"] == "1"
    assert len(client.sent) == 2


def test_failure_after_the_first_token_passes_through() -> None:
    async def steps(send: Send) -> None:
        await send(start())
        the_trace().token(1)
        await send(body(b"one;"))
        the_trace().fail(KeyError("late"))
        await send(body(b"error event", more=False))

    client = asyncio.run(Client().ask(app_of(steps)))
    assert (client.status, client.body) == (200, b"one;error event")


@pytest.mark.xfail(strict=True, reason="_HeldReply holds only what starts before the trace is decided")
def test_failure_before_the_stream_starts_replaces_it_too() -> None:
    async def steps(send: Send) -> None:
        the_trace().fail(KeyError("early"))
        await send(start())
        await send(body(b"error event", more=False))

    assert asyncio.run(Client().ask(app_of(steps))).status == 500


def test_stream_that_ends_undecided_is_sent_as_it_is() -> None:
    async def steps(send: Send) -> None:
        await send(start())
        await send(body(b"nothing to say", more=False))

    client = asyncio.run(Client().ask(app_of(steps)))
    assert (client.status, client.body) == (200, b"nothing to say")


@pytest.mark.parametrize("failed", [False, True])
def test_answer_that_is_not_a_stream_is_never_held(failed: bool) -> None:
    client = Client()

    async def steps(send: Send) -> None:
        if failed:
            the_trace().fail(KeyError("x"))
        await send(start(JSON, 418))
        assert client.status == 418
        await send(body(b"{}", more=False))

    asyncio.run(client.ask(app_of(steps)))
    assert (client.status, client.body) == (418, b"{}")


async def echo_id(scope: Scope, receive: Receive, send: Send) -> None:
    seen = Headers(scope=scope)["x-request-id"]
    assert seen == the_trace().request_id
    await send(start(JSON))
    await send(body(seen.encode(), more=False))


def test_request_id_of_the_client_is_kept_and_echoed() -> None:
    client = asyncio.run(Client(headers=[(b"x-request-id", b"mine")]).ask(echo_id))
    assert (client.body, client.headers["x-request-id"]) == (b"mine", "mine")


def test_request_without_an_id_gets_one_of_its_own() -> None:
    first, second = (asyncio.run(Client().ask(echo_id)) for _ in range(2))
    assert first.headers["x-request-id"] == first.body.decode() != ""
    assert first.body != second.body


def test_request_id_is_on_an_error_that_replaced_a_stream() -> None:
    async def steps(send: Send) -> None:
        await send(start())
        the_trace().fail(KeyError("x"))
        await send(body(b"", more=False))

    client = asyncio.run(Client(headers=[(b"x-request-id", b"mine")]).ask(app_of(steps)))
    assert client.headers["x-request-id"] == "mine"


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive())["more_body"]:
        pass
    await send(start(JSON))
    await send(body(b"read", more=False))


def fastapi_app() -> FastAPI:
    app = FastAPI()

    @app.post("/")
    async def read(value: dict[str, Any] = Body()) -> str:  # noqa: B008
        return "read"

    return app


def refused(client: Client) -> None:
    assert client.status == 413
    assert json.loads(client.body)["error"]["code"] == 413
    assert f"{LIMIT} bytes" in json.loads(client.body)["error"]["message"]
    assert "x-request-id" in client.headers


@pytest.mark.parametrize(("length", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
def test_announced_body_beyond_the_limit_is_refused_unread(length: int, status: int) -> None:
    client = Client(b"x", headers=[(b"content-length", b"%d" % length)])
    asyncio.run(client.ask(read_all))
    assert client.status == status
    if status == 413:
        refused(client)
        assert len(client._messages) == 1


@pytest.mark.parametrize(("chunks", "status"), [([50, 50], 200), ([50, 50, 1], 413)])
def test_streamed_body_is_counted(chunks: list[int], status: int) -> None:
    client = asyncio.run(Client(*(b"x" * size for size in chunks)).ask(read_all))
    assert client.status == status
    if status == 413:
        refused(client)


@pytest.mark.xfail(strict=True, reason="FastAPI answers 400 to an exception of receive() that is no HTTPException")
def test_streamed_body_beyond_the_limit_is_refused_in_front_of_fastapi_too() -> None:
    chunks = (b'{"a": "', b"x" * LIMIT, b'"}')
    refused(asyncio.run(Client(*chunks, headers=[JSON], query_string=b"").ask(fastapi_app())))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ray.serve"]


@pytest.mark.parametrize(("rendered", "logged"), [(None, 0), (1.0, 1)])
def test_request_that_reached_a_stage_is_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture, rendered: float | None, logged: int
) -> None:
    async def steps(send: Send) -> None:
        the_trace().rendered = rendered
        await send(start(JSON, 418))
        await send(body(b"", more=False))

    with caplog.at_level(logging.INFO, "ray.serve"):
        asyncio.run(Client(headers=[(b"x-request-id", b"mine")]).ask(app_of(steps)))
    assert len(lines(caplog)) == logged
    assert all("request=mine status=418" in line for line in lines(caplog))


@pytest.mark.parametrize(
    ("error", "status"), [(asyncio.CancelledError(), "CancelledError"), (KeyError("x"), "KeyError")]
)
def test_client_that_leaves_or_an_app_that_fails_is_logged_and_passed_on(
    caplog: pytest.LogCaptureFixture, error: BaseException, status: str
) -> None:
    async def steps(send: Send) -> None:
        the_trace().rendered = 1.0
        raise error

    async def main() -> None:
        with pytest.raises(type(error)):
            await Client().ask(app_of(steps))
        assert trace.current.get() is None

    with caplog.at_level(logging.INFO, "ray.serve"):
        asyncio.run(main())
    assert len(lines(caplog)) == 1
    assert f"status={status} " in lines(caplog)[0]


@pytest.mark.parametrize(
    "scope",
    [{"type": "lifespan"}, {"type": "websocket"}, {"type": "http", "method": "GET"}],
    ids=["lifespan", "websocket", "GET"],
)
def test_other_scopes_pass_untouched(scope: dict[str, Any]) -> None:
    client = Client()
    client.scope = scope
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([scope, receive, send])

    asyncio.run(client.ask(app))
    assert seen == [scope, client.receive, client.send]


@pytest.mark.parametrize("key", sorted(SERVER_ARGS))
def test_argument_of_the_http_server_is_refused_naming_its_place_here(key: str) -> None:
    with pytest.raises(ConfigError, match=f"`api.{key}` is Ray Serve's here: set `http_options:`"):
        check_api_args({key: 1})


def test_unknown_api_argument_is_refused_and_known_ones_are_not() -> None:
    with pytest.raises(ConfigError, match="`api.chat_tempalte` is not an argument"):
        check_api_args({"chat_tempalte": "x"})
    check_api_args({"chat_template": "x", "api_key": "k", "tool_call_parser": "hermes", "lora_modules": []})


def test_middleware_serves_a_real_fastapi_app() -> None:
    client = TestClient(PipelineMiddleware(fastapi_app(), LIMIT))
    answer = client.post("/", json={"a": 1}, headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json(), answer.headers["x-request-id"]) == (200, "read", "mine")
