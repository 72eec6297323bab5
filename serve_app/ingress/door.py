"""The door of an ingress replica: it lets in as many as it may; of a server that ends, it lets out whom it let in, and lets
nobody else in."""

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.ingress.replies import refusal

CLOSED = "The server is ending and takes no more requests."
FULL = "This replica of the server has as many requests as it takes. Try again."


class Door:
    """Outermost around the app. ``limit``: requests that are inside at a time."""

    def __init__(self, app: ASGIApp, limit: int = 1024) -> None:
        self._app = app
        self.limit = limit
        self.closed = False
        self.inside = 0

    def close(self) -> int:
        """From now on requests are answered 503. How many are still under way."""
        self.closed = True
        return self.inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # as long as the app's
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
