"""A reply whose status line waits for the first token, so that an earlier failure is a 4xx or 5xx with an error body."""

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from serve_app.ingress.replies import of_route
from serve_app.ingress.request import Request

STAGE_OF = {
    "encode": "encoder",
    "ec_transfer": "prefill",
    "prefill": "prefill",
    "kv_transfer": "decode",
    "first_token": "decode",
}
"""The stage whose replicas a step is labelled with: for a transfer, the receiver."""

ITEMS_TOLD = 32
"""Limit of items in a header: many HTTP clients accept no more than 8 KiB of headers."""


class HeldReply:
    """``send`` of one response: it holds an event stream until the request has its first token or has failed.

    A streaming response starts before its generator has asked the engine for anything. A failure before the first token
    replaces it by an error response.
    """

    def __init__(self, send: Send, request: Request, path: str) -> None:
        self._send = send
        self._path = path
        self._request, self._trace = request, request.trace
        self._held: list[Message] = []
        self._streaming = False
        self._holding = False
        self._over = False
        """The reply has been sent, or the client has left."""
        self.status: int | str | None = None

    def client_left(self) -> None:
        if not self._over:
            self._over, self.status = True, "cancelled"

    async def __call__(self, message: Message) -> None:
        if self._over:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add_headers(message)
            content_type = Headers(raw=message["headers"]).get("content-type", "")
            self._streaming = content_type.startswith("text/event-stream")
            self._holding = self._streaming and not self._request.answered
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._streaming, self._over = False, True
        if not self._holding:
            return await self._send(message)
        self._held.append(message)
        if not self._request.decided.is_set() and not self._over:
            return
        self._holding = False
        if self._request.error is not None and not self._request.answered:
            return await self._replace()
        held, self._held = self._held, []
        self._add_headers(held[0])
        for earlier in held:
            await self._send(earlier)

    async def abandoned(self, error: Exception) -> bool:
        """End an event stream that the app gave up, as vLLM's ``/v1/responses`` does. False if none is open."""
        if not self._streaming:
            return False
        # Starlette raises a RuntimeError from an error that comes too late for its handlers.
        failure = self._request.error or (error.__cause__ if isinstance(error.__cause__, Exception) else error)
        self._request.fail(failure)
        if not self._request.answered:
            await self._replace()
        else:
            event = f"event: error\ndata: {create_error_response(failure).model_dump_json()}\n\n"
            for message in [*self._held, {"type": "http.response.body", "body": event.encode()}]:
                await self._send(message)
        return True

    def _add_headers(self, start: Message) -> None:
        """Add step times, cached tokens, fallbacks and ``retry-after``. The held start of a stream gets them again with its
        first token."""
        headers = MutableHeaders(raw=start["headers"])
        if times := self._trace.stage_times():
            steps = [f"{name};dur={seconds * 1000:.2f}{self._who(name)}" for name, seconds in times.items()]
            headers["server-timing"] = ", ".join(steps + self._items())
        # While a stream has its first token, the prompts of other choices may still be looked up in caches.
        if self._request.answered and (self._trace.choices == 1 or not self._streaming):
            headers["x-epd-cached-tokens"] = f"{self._trace.cached_tokens}/{self._trace.prompt_tokens}"
        if self._trace.rungs:
            headers["x-epd-rungs"] = self._trace.rungs_told()
        if self.status in (429, 503):
            headers["retry-after"] = "1"

    def _who(self, step: str) -> str:
        """The replicas of a step, in the header's format."""
        names = self._trace.replicas.get(STAGE_OF.get(step, ""))
        return f';desc="{" ".join(names)}"' if names else ""

    def _items(self) -> list[str]:
        """The encode time of each item, if there are several. They overlap, so their times do not add up."""
        items = sorted(self._trace.by_item.items())[:ITEMS_TOLD]
        if len(items) == 1:
            return []
        return [f'encode.{index + 1};dur={seconds * 1000:.2f};desc="{replica}"' for index, (seconds, replica) in items]

    async def _replace(self) -> None:
        """Answer with the failure's status instead of the held stream."""
        assert self._request.error is not None
        self._streaming, self._over = False, True
        error = create_error_response(self._request.error)
        self.status = error.error.code
        start = self._held[0]
        self._add_headers(start)
        kept = [(k, v) for k, v in start["headers"] if k.lower() not in (b"content-type", b"content-length")]
        reply = of_route(self._path, JSONResponse(error.model_dump()))
        await self._send({**start, "status": self.status, "headers": [*kept, *reply.raw_headers]})
        await self._send({"type": "http.response.body", "body": reply.body})
