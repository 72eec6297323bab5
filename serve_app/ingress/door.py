"""The outermost limit of an ingress replica's app."""

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.ingress.replies import refusal

CLOSED = "The server is ending and takes no more requests."
FULL = "This replica of the server has as many requests as it takes. Try again."


class Door:
    """Answers 503 to requests over ``limit`` at a time, and to all new ones once it is closed."""

    def __init__(self, app: ASGIApp, limit: int = 1024) -> None:
        self._app = app
        self.limit = limit
        self.closed = False
        self.inside = 0
        """Requests under way."""

    def close(self) -> int:
        """Refuse new requests from now on. Returns how many are still under way."""
        self.closed = True
        return self.inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if (self.closed or self.inside >= self.limit) and scope["type"] == "http":
            refused = refusal(scope, 503, CLOSED if self.closed else FULL, "ServiceUnavailableError")
            refused.headers["retry-after"] = "1"
            return await refused(scope, receive, send)
        self.inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.inside -= 1
