"""Middleware of Serve's HTTP proxy: it sends a request whose ingress replica died to another replica.

Any ingress can serve any request, so the client does not notice if nothing of the answer was sent. Without it the proxy
answers 500. Serve takes it from ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` in the environment of the cluster when it
starts a proxy. Imports stay light, because it runs in the proxy's process.
"""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ATTEMPTS = 2
"""A request that kills an ingress must not kill them all."""


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
            again = list(received)

            async def next_message() -> Message:
                if again:
                    return again.pop(0)
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
        text = "The ingress lost the replica that worked on the request"
        error = {"message": text, "type": "service_unavailable", "code": 503}
        await JSONResponse({"error": error}, 503, {"retry-after": "1"})(scope, receive, send)
