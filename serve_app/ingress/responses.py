"""The store behind ``/v1/responses``: it is bounded, and every ingress replica finds what another has stored.

vLLM keeps responses, their messages and the events of background streams in its process forever. This store drops the least
recently used, and its routes also ask the other replicas to retrieve, stream, cancel or continue a response. What a replica
has stored ends with it.
"""

import asyncio
import logging
import pickle
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from http import HTTPStatus
from itertools import islice
from typing import Any

from openai.types.responses import ResponseErrorEvent
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from serve_app.ingress.peers import Answer, Peers
from serve_app.ingress.request import current

logger = logging.getLogger("ray.serve")

DEFAULT_BYTES = 256 << 20
"""The limit if only vLLM's own switch, ``VLLM_ENABLE_RESPONSES_API_STORE``, turns the store on."""

EVENT_S = 2.0
"""Seconds that a call for events waits for the next one before it is made again. Less than ``peers.ANSWER_S``."""

UNFINISHED = ("queued", "in_progress")


class Responses:
    """Wraps vLLM's serving for its routes of ``/v1/responses``.

    ``max_bytes``: limit of what is stored of ended responses; 0 stores nothing, None follows vLLM's switch.
    """

    def __init__(self, serving: OpenAIServingResponses, peers: Peers, max_bytes: int | None) -> None:
        self._serving = serving
        self._max_bytes = (DEFAULT_BYTES if serving.enable_store else 0) if max_bytes is None else max_bytes
        serving.enable_store = self._max_bytes > 0
        self._bytes: OrderedDict[str, int] = OrderedDict()
        """Size of each stored response by id, the least recently used first."""
        self._stored = 0
        self._peers = peers
        self._own: dict[str, Answer] = {
            "response": self._response,
            "response to go on from": self._previous,
            "cancelled response": self._cancel,
            "response's events": self._events,
        }
        for what, answer in (self._own | {"response's events": self._events_together}).items():
            peers.offer(what, answer)

    async def create_responses(
        self, request: ResponsesRequest, raw_request: Any = None
    ) -> AsyncGenerator[Any] | ResponsesResponse | ErrorResponse:
        if request.previous_response_id is not None:
            refusal = await self._continue_from(request.previous_response_id)
            if refusal is not None:
                return refusal
        response_id = request.request_id
        try:
            made = await self._serving.create_responses(request, raw_request)
        finally:
            self._keep(response_id)
        if isinstance(made, ErrorResponse):
            return made
        if request.background:
            task = self._serving.background_tasks[response_id]
            task.add_done_callback(lambda task: self._ended(response_id, task))
            if (asked := current.get()) is not None:
                asked.sources.use_until(task)
            if request.stream:
                await asyncio.sleep(0)  # the task's first step makes the list of its events
                return self._stream(response_id, 0)
        elif not isinstance(made, ResponsesResponse):
            return self._kept_at_its_end(response_id, made)
        return made

    async def retrieve_responses(
        self, response_id: str, starting_after: int | None, stream: bool | None
    ) -> AsyncGenerator[Any] | ResponsesResponse | ErrorResponse:
        response: ResponsesResponse | None = await self._find("response", response_id)
        if response is None:
            return self._not_found(response_id)
        if not stream:
            return response
        start = 0 if starting_after is None else max(starting_after + 1, 0)
        if await self._find("response's events", response_id, start) is None:
            return self._refused(
                f"Response '{response_id}' has no events: only one that is made with `background` and `stream` keeps them."
            )
        return self._stream(response_id, start)

    async def cancel_responses(self, response_id: str) -> ResponsesResponse | ErrorResponse:
        found: ResponsesResponse | ErrorResponse | None = await self._find("cancelled response", response_id)
        return self._not_found(response_id) if found is None else found

    async def _find(self, what: str, response_id: str, *args: Any) -> Any | None:
        """Look in this replica, then in the others."""
        found = await self._own[what](response_id, *args)
        if found is None and self._max_bytes:
            found = await self._peers.find(what, response_id, *args)
        return found

    async def _response(self, response_id: str) -> ResponsesResponse | None:
        if response_id in self._bytes:
            self._bytes.move_to_end(response_id)
        return self._serving.response_store.get(response_id)

    async def _previous(self, response_id: str) -> tuple[ResponsesResponse, Any] | None:
        """A response and the messages before it."""
        response = await self._response(response_id)
        return None if response is None else (response, self._serving.msg_store.get(response_id))

    async def _cancel(self, response_id: str) -> ResponsesResponse | ErrorResponse | None:
        if response_id not in self._serving.response_store:
            return None
        return await self._serving.cancel_responses(response_id)

    async def _events(self, response_id: str, start: int) -> tuple[list[Any], bool] | None:
        """The events of a background stream from ``start`` on, and whether they are the last. Waits up to ``EVENT_S`` for
        the first."""
        if response_id not in self._serving.event_store:
            return None
        events, new = self._serving.event_store[response_id]
        if len(events) <= start and response_id in self._serving.background_tasks:
            new.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(EVENT_S):
                    await new.wait()
        return list(islice(events, start, None)), response_id not in self._serving.background_tasks

    async def _events_together(self, response_id: str, start: int) -> tuple[list[Any], bool] | None:
        """The events for a peer, which gets those that come soon after the first in the same answer."""
        found = await self._events(response_id, start)
        if found is None or found[1] or not found[0]:
            return found
        await asyncio.sleep(0.05)
        return await self._events(response_id, start)

    async def _continue_from(self, response_id: str) -> ErrorResponse | None:
        """Copy a previous response into this replica's store, where vLLM looks for it. Returns an error if it cannot."""
        previous = await self._find("response to go on from", response_id)
        if previous is None:
            return self._not_found(response_id)
        response, messages = previous
        if response.status in UNFINISHED:
            return self._refused(
                f"Response '{response_id}' is still {response.status}: go on from it once it has ended."
            )
        if response_id not in self._serving.response_store:  # a copy: it does not change any more
            self._serving.response_store[response_id] = response
            if messages is not None:
                self._serving.msg_store[response_id] = messages
            self._keep(response_id)
        return None

    async def _stream(self, response_id: str, start: int) -> AsyncGenerator[Any]:
        """The events of a background stream as they come, from whichever replica makes it."""
        while (found := await self._find("response's events", response_id, start)) is not None:
            events, ended = found
            for event in events:
                yield event
            start += len(events)
            if ended:
                return
        yield error_event(f"Response '{response_id}' is lost: the ingress replica that made it is gone.", start)

    async def _kept_at_its_end(self, response_id: str, events: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        try:
            async with aclosing(events):
                async for event in events:
                    yield event
        finally:
            self._keep(response_id)

    def _ended(self, response_id: str, task: asyncio.Task[Any]) -> None:
        """Mark a response that failed in the background. vLLM would leave it queued, and its streams waiting."""
        events, new = self._serving.event_store.get(response_id, (None, None))
        response = self._serving.response_store.get(response_id)
        if response is not None and response.status in UNFINISHED:
            response.status = "failed"
        if not task.cancelled() and (error := task.exception()) is not None:
            reason = create_error_response(error).error.message if isinstance(error, Exception) else str(error)
            logger.warning(f"Response {response_id}, made in the background, failed: {reason}")
            if events is not None:
                events.append(error_event(reason, len(events)))
        if new is not None:
            new.set()
        self._keep(response_id)

    def _keep(self, response_id: str) -> None:
        """Measure what is stored of a response, and drop the least recently used while the store is too large."""
        serving = self._serving
        events = serving.event_store.get(response_id, ((),))[0]
        parts = (serving.response_store.get(response_id), serving.msg_store.get(response_id), tuple(events))
        self._stored -= self._bytes.pop(response_id, 0)
        if any(parts):
            self._bytes[response_id] = len(pickle.dumps(parts))
            self._stored += self._bytes[response_id]
        while self._stored > self._max_bytes:
            oldest = next((each for each in self._bytes if each not in serving.background_tasks), None)
            if oldest is None:
                break
            self._stored -= self._bytes.pop(oldest)
            for store in (serving.response_store, serving.msg_store, serving.event_store):
                store.pop(oldest, None)

    def _not_found(self, response_id: str) -> ErrorResponse:
        why = (
            "no ingress replica has it. One that is not used makes room for others, and goes with the replica that stored it"
            if self._max_bytes
            else "this server stores none. `advanced.answers.response_store_bytes` in its configuration has it do so"
        )
        return self._refused(f"Response with id '{response_id}' not found: {why}.", HTTPStatus.NOT_FOUND)

    def _refused(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> ErrorResponse:
        """An error like those of vLLM's serving."""
        return self._serving.create_error_response(
            message=message, err_type="invalid_request_error", status_code=status, param="response_id"
        )


def error_event(message: str, number: int) -> ResponseErrorEvent:
    return ResponseErrorEvent(type="error", code="server_error", message=message, sequence_number=number)
