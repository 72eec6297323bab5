"""The encode stage as the ingress sees it: which items go to an encoder, each of them once, and what happens when one fails.

Per item: an encoder replica → another one → encode at prefill. An item that prefill encodes keeps its pixels; all others go
on without. What an encoder answered is remembered while the shared cache surely has it, and an item that is being encoded
for one request is not sent again for another.
"""

import asyncio
import contextvars
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app import handoff
from serve_app.config import EncodeConfig, Stage
from serve_app.engine import ENCODE_PARAMS
from serve_app.errors import HandoffLost, StageError, StageTimeout
from serve_app.handoff import EncodeReply, Prompt, StageRequest
from serve_app.routing import StageHandle
from serve_app.trace import Trace

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Encoded:
    """The encode stage's result for one prompt."""

    prompt: Prompt
    """The prompt for the engines behind: items without pixels where an encoder has encoded them."""
    ec_transfer_params: dict[str, Any] | None
    hashes: frozenset[str] = frozenset()
    """Items whose embeddings the engines behind have to get through the EC connector."""


@dataclass
class Encodes:
    """What the rule below is decided on, besides the item: the encoders as this ingress replica sees them."""

    outstanding: int = 0
    """Embeddings (visual or audio tokens) asked for and not answered yet."""
    down: bool = False
    """All attempts for an item failed, and none has succeeded since."""
    probe_at: float = 0.0
    """While down: ``time.monotonic`` from which one item may try an encoder again."""


def encode_at_prefill(cost: int, encodes: Encodes, config: EncodeConfig, now: float) -> str | None:
    """The rule: why an item of ``cost`` embeddings is encoded by prefill itself; None: an encoder does it."""
    if cost < config.min_embeds:
        return "small"
    if encodes.down and now < encodes.probe_at:
        return "encoders down"
    if config.max_outstanding_embeds and encodes.outstanding + cost > config.max_outstanding_embeds:
        return "encoders full"
    return None


@dataclass
class _Flight:
    """An encode call that several requests may wait for."""

    task: asyncio.Task[EncodeReply]
    waiting: int = 0


@dataclass
class EncodeStage:
    """The encoders, for one ingress replica."""

    handle: StageHandle
    config: EncodeConfig
    shareable: bool
    """Whether an answer serves every request that waits for it: not where an embedding is sent to one consumer."""
    declared: Callable[[str], frozenset[str]]
    """Fields that the model declares as placeholder metadata of a modality."""
    clock: Callable[[], float] = time.monotonic
    state: Encodes = field(default_factory=Encodes)
    _flights: dict[str, _Flight] = field(default_factory=dict)
    _known: OrderedDict[str, tuple[float, EncodeReply]] = field(default_factory=OrderedDict)

    async def encode(self, request: StageRequest, record: Trace) -> Encoded:
        """Encode the items of a prompt, largest first, all at the same time."""
        prompt = request.prompt
        items = prompt.items
        order = sorted(handoff.distinct(items).values(), key=lambda index: -items[index].num_embeds)
        at_encoder, taken = [], 0
        for index in order:
            item, now = items[index], self.clock()
            if self.shareable and (self._remembered(item.hash) or item.hash in self._flights):
                at_encoder.append(index)  # costs the encoders nothing
                continue
            seen = replace(self.state, outstanding=self.state.outstanding + taken)
            reason = encode_at_prefill(item.num_embeds, seen, self.config, now)
            if reason is not None:
                record.rung(f"encode-at-prefill({reason})")
                continue
            at_encoder.append(index)
            taken += item.num_embeds
            if self.state.down:  # this item is the probe
                self.state.probe_at = now + self.config.timeout_s * self.config.attempts
        async with asyncio.TaskGroup() as group:
            tasks = {index: group.create_task(self._item(request, index, record)) for index in at_encoder}
        replies = {index: reply for index, task in tasks.items() if (reply := task.result()) is not None}
        hashes = frozenset(items[index].hash for index in replies)
        try:
            params = handoff.merge_ec_params(replies, prompt)
        except ValueError as error:
            raise HandoffLost(Stage.ENCODER, f"gave an unusable answer: {error}") from error
        if items:
            record.encoded = time.perf_counter()
        return Encoded(handoff.without_pixels(prompt, self.declared, hashes), params or None, hashes)

    def forget(self, hashes: frozenset[str]) -> None:
        """The cache may have lost these items: the next request that has one sends it again."""
        for item_hash in hashes:
            self._known.pop(item_hash, None)

    async def _item(self, request: StageRequest, index: int, record: Trace) -> EncodeReply | None:
        """The ladder of one item. None: prefill encodes it."""
        item = request.prompt.items[index]
        for attempt in range(self.config.attempts):
            try:
                if self.shareable:
                    reply = self._remembered(item.hash) or await self._shared(item.hash, request, index)
                else:
                    reply = await self._call(request, index)
                record.saw(Stage.ENCODER, reply.replica)
                return reply
            except StageError as error:
                logger.warning(f"request={record.request_id} item={index} attempt={attempt + 1}: {error}")
                record.rung("encode-again" if attempt + 1 < self.config.attempts else "encode-at-prefill(failed)")
        self.state.down, self.state.probe_at = True, self.clock() + self.config.retry_encoders_after_s
        return None

    def _remembered(self, item_hash: str) -> EncodeReply | None:
        known = self._known.get(item_hash)
        if known is None or self.clock() > known[0]:
            return None
        self._known.move_to_end(item_hash)
        return known[1]

    async def _shared(self, item_hash: str, request: StageRequest, index: int) -> EncodeReply:
        """The answer for an item, from one call for all requests that want it now.

        The call has a context of its own: Serve would cancel it with the request that happened to come first, and gives
        calls of one request one internal id. It is cancelled when the last request that waits for it has gone.
        """
        flight = self._flights.get(item_hash)
        if flight is None:
            call = self._call(request, index)
            flight = _Flight(asyncio.get_running_loop().create_task(call, context=contextvars.Context()))
            self._flights[item_hash] = flight
            flight.task.add_done_callback(lambda _: self._landed(item_hash, flight))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._landed(item_hash, flight)
                flight.task.cancel()

    def _landed(self, item_hash: str, flight: _Flight | None) -> None:
        if self._flights.get(item_hash) is flight:
            del self._flights[item_hash]

    async def _call(self, request: StageRequest, index: int) -> EncodeReply:
        item = request.prompt.items[index]
        call = StageRequest(
            handoff.child_id(request.request_id, index),
            handoff.for_encoder(request.prompt, index),
            ENCODE_PARAMS,
            {"lora_request": request.options.get("lora_request"), "priority": request.options.get("priority", 0)},
        )
        self.state.outstanding += item.num_embeds
        try:
            async with asyncio.timeout(self.config.timeout_s):
                reply: EncodeReply = await self.handle.call("encode", call)
        except TimeoutError:
            raise StageTimeout(Stage.ENCODER, f"did not answer within {self.config.timeout_s:g} s") from None
        finally:
            self.state.outstanding -= item.num_embeds
        if set(reply.ec_transfer_params) != {item.hash}:
            raise HandoffLost(Stage.ENCODER, f"answered for {sorted(reply.ec_transfer_params)}, not for {item.hash}")
        self.state.down = False
        if self.shareable and self.config.remember_s:
            self._known[item.hash] = (self.clock() + self.config.remember_s, reply)
            self._known.move_to_end(item.hash)
            while len(self._known) > self.config.remember_items:
                self._known.popitem(last=False)
        return reply
