"""The middleware around vLLM's app: it makes the ``Request`` of a POST, and logs and counts it when it has ended."""

import asyncio
import logging
import re
import uuid

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.ingress.held_reply import HeldReply
from serve_app.ingress.replies import refusal, route_of
from serve_app.ingress.request import Request, current
from serve_app.observe.ingress_metrics import IngressMetrics
from serve_app.observe.trace import Trace
from serve_app.observe.tracing import Tracing

logger = logging.getLogger("ray.serve")


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


def clean_id(request_id: str) -> str:
    """Make a client's request id safe for engines and logs.

    NIXL joins ids by commas to renew leases of KV blocks. The lease of an id with a comma would not be renewed, and decode
    could read blocks that belong to another request by then.
    """
    return re.sub(r"[^A-Za-z0-9._:-]", "_", request_id)[:128]


class BodyTooLarge(HTTPException):
    """FastAPI makes a 400 of all but an HTTPException that ``receive`` raises."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(413, f"The request body is larger than the {limit_bytes} bytes that this server takes.")


class PipelineMiddleware:
    """Sets a request's id, credentials, deadline, body limit and span."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, metrics: IngressMetrics, tracing: Tracing) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = MutableHeaders(scope=scope)
        # Anthropic's clients send the key in a header that vLLM does not read.
        if (key := headers.get("x-api-key")) and "authorization" not in headers:
            headers["authorization"] = f"Bearer {key}"
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        path = route_of(scope)
        request_id = clean_id(headers.get("x-request-id") or "") or uuid.uuid4().hex
        headers["x-request-id"] = request_id  # vLLM reads it from there
        with self.tracing.request(f"POST {path}", headers) as span:
            request = Request(request_id, span, credentials=headers.get("authorization") or "")
            reply = HeldReply(send, request, path)
            try:
                with request.holds, request.sources.used():
                    await self._answer(scope, receive, reply, request)
            finally:
                self._ended(request.trace, reply.status or "failed")

    async def _answer(self, scope: Scope, receive: Receive, reply: HeldReply, request: Request) -> None:
        headers = Headers(scope=scope)
        timeout = headers.get("x-request-timeout-s")
        if timeout is not None:
            try:
                request.timeout_s = positive(timeout)
            except ValueError:
                message = f"The header x-request-timeout-s must be a positive number of seconds, not {timeout[:40]!r}."
                return await refusal(scope, 400, message)(scope, receive, reply)
        token = current.set(request)
        try:
            if int(headers.get("content-length") or 0) > self.max_body_bytes:
                raise BodyTooLarge(self.max_body_bytes)
            await self.app(scope, self._limited(receive, reply), reply)
        except BodyTooLarge as error:
            await refusal(scope, 413, error.detail, "RequestEntityTooLarge")(scope, receive, reply)
        except asyncio.CancelledError:
            reply.status = "cancelled"
            raise
        except Exception as error:
            if not await reply.abandoned(error):
                raise
        finally:
            current.reset(token)

    def _ended(self, trace: Trace, status: int | str) -> None:
        if trace.rendered is not None:
            logger.info(trace.line(status))
        self.metrics.finished(trace, status)
        if trace.error is not None:
            trace.span.fail(trace.error)
        trace.span.set(
            request_id=trace.request_id,
            status=str(status),
            items=trace.items.total(),
            prompt_tokens=trace.prompt_tokens,
            cached_tokens=trace.cached_tokens,
            output_tokens=trace.output_tokens,
        )

    def _limited(self, receive: Receive, reply: HeldReply) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.disconnect":
                reply.client_left()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise BodyTooLarge(self.max_body_bytes)
            return message

        return limited
