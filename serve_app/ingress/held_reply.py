"""A reply whose status line waits for the first token: what fails before it is a real 4xx or 5xx with an error body."""

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
"""Whose replicas work on a step; of a transfer those that receive."""

ITEMS_TOLD = 32
"""Of a request, in a header: many HTTP clients take no more than 8 KiB of them."""


class HeldReply:
    """``send`` of one response: holds the start of an event stream, and what follows, until it is decided.

    A streaming response starts before its generator has asked the engine for anything. By the first token its start goes
    out as it is; by a failure it is replaced by that error's own response.
    """

    def __init__(self, send: Send, request: Request, path: str) -> None:
        self._send = send
        self._path = path
        self._request, self._trace = request, request.trace
        self._held: list[Message] = []
        self._streaming = False
        self._holding = False
        self._replaced = False
        self._over = False
        """It has been sent, or nobody is there to send it to."""
        self.status: int | str | None = None

    def client_left(self) -> None:
        if not self._over:
            self._over, self.status = True, "cancelled"

    async def __call__(self, message: Message) -> None:
        if self._replaced or self._over:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._tell(MutableHeaders(raw=message["headers"]), message["status"])
            content_type = Headers(raw=message["headers"]).get("content-type", "")
            self._streaming = content_type.startswith("text/event-stream")
            self._holding = self._streaming and not self._request.answered
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._streaming, self._over = False, True
        if self._holding:
            self._held.append(message)
            if not self._request.decided.is_set() and not self._over:
                return
            self._holding = False
            if self._request.error is not None and not self._request.answered:
                return await self._replace()
            held, self._held = self._held, []
            self._tell(MutableHeaders(raw=held[0]["headers"]), held[0]["status"])
            for earlier in held:
                await self._send(earlier)
            return
        await self._send(message)

    async def abandoned(self, error: Exception) -> bool:
        """The app gave up an event stream midway, as vLLM's ``/v1/responses`` does whatever fails: end it with the failure.
        False where there is nothing to end."""
        if not self._streaming:
            return False
        # Starlette raises a RuntimeError from what it has no answer for any more.
        failure = self._request.error or (error.__cause__ if isinstance(error.__cause__, Exception) else error)
        self._request.fail(failure)
        if not self._request.answered:
            await self._replace()
        else:
            event = f"event: error\ndata: {create_error_response(failure).model_dump_json()}\n\n"
            for message in [*self._held, {"type": "http.response.body", "body": event.encode()}]:
                await self._send(message)
        return True

    def _tell(self, headers: MutableHeaders, status: int) -> None:
        """Where the time went, which rungs of the failure ladder ran, and when to come again. Called again when more is
        known: the start of a stream is held until its first token."""
        if times := self._trace.stage_times():
            headers["server-timing"] = ", ".join(
                [f"{name};dur={seconds * 1000:.2f}" + self._who(name) for name, seconds in times.items()]
                + self._items()
            )
        if self._trace.rungs:
            headers["x-epd-rungs"] = self._trace.rungs_told()
        if status in (429, 503):
            headers["retry-after"] = "1"

    def _who(self, step: str) -> str:
        """The replicas that worked on a step, as the header writes it."""
        names = self._trace.replicas.get(STAGE_OF.get(step, ""))
        return f';desc="{" ".join(names)}"' if names else ""

    def _items(self) -> list[str]:
        """``encode`` item by item, where there are several: all at the same time, so no steps that add up."""
        items = sorted(self._trace.by_item.items())[:ITEMS_TOLD]
        if len(items) == 1:
            return []
        return [f'encode.{index + 1};dur={seconds * 1000:.2f};desc="{replica}"' for index, (seconds, replica) in items]

    async def _replace(self) -> None:
        """Answer with the failure's own status instead of the stream that had not begun."""
        assert self._request.error is not None
        self._replaced = True
        error = create_error_response(self._request.error)
        self.status = error.error.code
        start = next(message for message in self._held if message["type"] == "http.response.start")
        self._tell(MutableHeaders(raw=start["headers"]), error.error.code)
        kept = [(k, v) for k, v in start["headers"] if k.lower() not in (b"content-type", b"content-length")]
        content = of_route(self._path, JSONResponse(error.model_dump())).body
        await self._send(
            {
                "type": "http.response.start",
                "status": error.error.code,
                "headers": [*kept, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))],
            }
        )
        await self._send({"type": "http.response.body", "body": content})
