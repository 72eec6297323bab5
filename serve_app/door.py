"""The door of an ingress replica: of a server that ends, it lets out whom it let in, and lets nobody else in."""

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.openai_app import error_response, of_route, route_of

CLOSED = "The server is ending and takes no more requests."


class Door:
    """Outermost around the app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._closed = False
        self._inside = 0

    def close(self) -> int:
        """From now on requests are answered 503. How many are still under way."""
        self._closed = True
        return self._inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # as long as the app's
            return await self._app(scope, receive, send)
        if self._closed and scope["type"] == "http":
            closed = of_route(route_of(scope), error_response(503, CLOSED, "ServiceUnavailableError"))
            return await closed(scope, receive, send)
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1
