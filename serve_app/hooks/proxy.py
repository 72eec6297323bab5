"""Middleware of Serve's HTTP proxy: a request whose ingress replica died is asked again, of another replica.

An ingress keeps nothing of a request that another needs, so as long as nothing of the answer was sent the client need not
notice. By itself the proxy answers 500. Serve takes the middleware from ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` in
the environment of the cluster when it starts a proxy. It runs in the proxy's process: nothing heavy is imported here.
"""

import json

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ATTEMPTS = 2
"""No more: a request that kills an ingress must not get to kill them all."""

GONE = {
    "message": "The ingress lost the replica that worked on the request",
    "type": "service_unavailable",
    "code": 503,
}


def middlewares() -> list[Middleware]:
    return [Middleware(AskAgain)]


class AskAgain:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received: list[Message] = []
        answered = False

        def replay() -> Receive:
            again = iter(tuple(received))

            async def next_message() -> Message:
                if (message := next(again, None)) is not None:
                    return message
                message = await receive()
                if not answered:
                    received.append(message)
                return message

            return next_message

        async def answer(message: Message) -> None:
            nonlocal answered
            if not answered:
                answered = True
                received.clear()
            await send(message)

        for _ in range(ATTEMPTS):
            await self._app(dict(scope), replay(), answer)
            if answered or any(message["type"] == "http.disconnect" for message in received):
                return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": GONE}).encode()})
