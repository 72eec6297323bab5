"""One HTTP exchange with an ASGI app behind ``PipelineMiddleware``, message by message."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.ingress.middleware import PipelineMiddleware
from serve_app.ingress.request import Request, current
from serve_app.observe.ingress_metrics import IngressMetrics
from serve_app.observe.tracing import Tracing

EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
JSON = (b"content-type", b"application/json")
LIMIT = 100


class Client:
    """One HTTP exchange with an ASGI app; ``sent`` is what has reached the client so far."""

    def __init__(self, *chunks: bytes, headers: Iterable[tuple[bytes, bytes]] = (), **scope: Any) -> None:
        self.scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": list(headers)} | scope
        self.tracing = Tracing()
        self.sent: list[Message] = []
        body = chunks or (b"",)
        self._messages = [{"type": "http.request", "body": chunk, "more_body": chunk is not body[-1]} for chunk in body]

    async def receive(self) -> Message:
        return self._messages.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def ask(self, app: ASGIApp) -> "Client":
        await PipelineMiddleware(app, LIMIT, IngressMetrics(), self.tracing)(self.scope, self.receive, self.send)
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


def the_request() -> Request:
    request = current.get()
    assert request is not None
    return request


def app_of(steps: Callable[[Send], Awaitable[None]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await steps(send)

    return app
