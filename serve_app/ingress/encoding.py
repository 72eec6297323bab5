"""The encode stage as the ingress sees it.

An item goes to an encoder replica. When that fails it goes to another one, and then prefill encodes it. An item that
prefill encodes keeps its pixels; all others go on without. The answer for an item is remembered while the shared cache
surely has its embedding, and an item that is being encoded for one request is not sent again for another. An item whose
tokens prefill has in its prefix cache is not encoded, where that pays. Prompts are rendered around answers that are
remembered longer for this.
"""

import asyncio
import contextvars
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import msgspec

from serve_app.config import EncodeConfig
from serve_app.handoff import shaping
from serve_app.handoff.engine_input import ENCODE_PARAMS
from serve_app.handoff.errors import BadRequest, EPDError, HandoffLost, OtherVersion, StageError, StageTimeout
from serve_app.handoff.types import ANY, EncodeReply, Features, Item, Media, MediaRequest, Prompt, StageRequest, Version
from serve_app.ingress.encode_rule import Costs, Encodes, Savings, encode_at_prefill
from serve_app.observe.trace import Trace
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage

logger = logging.getLogger("ray.serve")

WAKE_S = 60.0


class Cached(NamedTuple):
    """What the replica that prefills a prompt is expected to have in its prefix cache."""

    tokens: int = 0
    """Of the prompt's beginning."""
    likely: float = 0.0
    """The probability that it has them."""


@dataclass(frozen=True)
class Encoded:
    """The encode stage's result for one prompt."""

    prompt: Prompt
    """The prompt for prefill and decode. Items that an encoder has encoded have no pixels."""
    ec_transfer_params: dict[str, Any] | None
    hashes: frozenset[str] = frozenset()
    """The items whose embeddings prefill and decode get through the EC connector."""
    version: Version = ANY
    """The version of the encoders that made them."""
    cached: frozenset[str] = frozenset()
    """The items that were not encoded, as their tokens are expected in a prefix cache."""
    cached_tokens: int = 0
    """Tokens of the prompt up to the end of the last of these."""


@dataclass(frozen=True)
class Job:
    """One item for an encoder."""

    key: str
    """The item's hash, or the key of its media while the hash is not known."""
    cost: int
    method: str
    """``encode`` or ``encode_media``."""
    call: StageRequest | MediaRequest
    """It has the id of the request. Each attempt gets an id of its own (``shaping.child_id``)."""
    index: int
    """The place of the item in its request."""
    hash: str | None
    """The hash that the answer has to name. None: the answer's own features name it."""


@dataclass
class _Flight:
    """An encode call that several requests may wait for."""

    task: asyncio.Task[EncodeReply]
    waiting: int = 0


Replies = dict[str, EncodeReply]
"""Answers by ``Job.key``. Prefill encodes an item that has none."""


@dataclass
class EncodeStage:
    """The encoders, as one ingress replica sees them."""

    handle: StageHandle
    config: EncodeConfig
    timeout_s: float
    """An attempt may take so long."""
    shareable: bool
    """Whether an answer serves every request that waits for it. It does not where an embedding is sent to one consumer."""
    declared: Callable[[str], frozenset[str]]
    """The fields that the model declares as placeholder metadata of a modality."""
    features: Callable[[Media], Awaitable[Features]] | None = None
    """It processes an item that came as media, for prefill to encode it. None: all items come as features."""
    version: Version = ANY
    """The version of this ingress replica. Encoders that are asked while a prompt is rendered must have it."""
    clock: Callable[[], float] = time.monotonic
    state: Encodes = field(default_factory=Encodes)
    costs: Costs = field(default_factory=Costs)
    leaves_cached: bool = False
    """Whether items may be left to prefix caches: the EC connector fails a request whose item is not there after all."""
    savings: Savings = field(default_factory=Savings)
    _flights: dict[tuple[str, Version], _Flight] = field(default_factory=dict)
    _waking: asyncio.Task[None] | None = None
    _known: OrderedDict[str, tuple[float, EncodeReply]] = field(default_factory=OrderedDict)

    async def encode(
        self, request: StageRequest, trace: Trace, first: bool = True, cached: Callable[[], Cached] = Cached
    ) -> Encoded:
        """Encode the items of a prompt at the same time, by encoders of one version: the version that the request asks for,
        or else the one of most encoders that answered.

        ``first``: answers that came while the prompt was rendered still hold. Otherwise encoders are asked again.
        ``cached`` is asked where an item may need no encoder; by default nothing is.
        """
        items, version = request.prompt.items, request.version
        if together := shaping.interleaved(items):
            trace.rung("encode-at-prefill(interleaved)")
        indices = [index for index in shaping.distinct(items).values() if index not in together]
        sources = {index: source for index in indices if first and (source := items[index].source) is not None}
        replies = {index: source.reply for index, source in sources.items() if source.reply is not None}
        # Of a remembered item the embedding may be gone.
        replies = {index: reply for index, reply in replies.items() if reply.ec_transfer_params}
        decided = replies.keys() | {index for index, source in sources.items() if source.reply is None}
        left = self._left_to_cache(items, [index for index in indices if index not in decided], cached)
        replies |= await self._asked(request, [i for i in indices if i not in decided and i not in left], trace)
        if replies and not version.weights:
            version = version.after(Counter(reply.version for reply in replies.values()).most_common(1)[0][0])
        if others := [index for index, reply in replies.items() if not reply.version.fits(version)]:
            replies = {index: reply for index, reply in replies.items() if index not in others}
            replies |= await self._asked(msgspec.structs.replace(request, version=version), others, trace)
        try:
            params = shaping.merge_ec_params(replies, request.prompt)
        except ValueError as error:
            raise HandoffLost(Stage.ENCODER, f"gave an unusable answer: {error}") from error
        hashes, unencoded = (frozenset(items[index].hash for index in those) for those in (replies, left))
        trace.unencoded_items += len(unencoded)
        bare = hashes | unencoded
        prompt = await self._with_pixels(shaping.without_pixels(request.prompt, self.declared, bare), bare)
        last = max((item.offset + item.length for item in items if item.hash in unencoded), default=0)
        return Encoded(prompt, params or None, hashes, version if hashes else ANY, unencoded, last)

    def _left_to_cache(self, items: tuple[Item, ...], indices: list[int], cached: Callable[[], Cached]) -> list[int]:
        """Those of the items, by index, that need no encoder: all their tokens are cached, wherever they stand."""
        if not (self.leaves_cached and indices):
            return []
        tokens, likely = cached()
        beyond = {item.hash for item in items if item.offset + item.length > tokens}
        left = [index for index in indices if items[index].hash not in beyond]
        seconds = sum(self._encode_s(items[index]) for index in left)
        return left if self.savings.pays(seconds, likely) else []

    def _encode_s(self, item: Item) -> float:
        """Seconds that an encoder worked on an item; on any, where that is not remembered."""
        entry = self._known.get(item.source.media.key if item.source is not None else item.hash)
        return entry[1].ran_s if entry is not None else self.savings.item_s

    async def _asked(self, request: StageRequest, indices: list[int], trace: Trace) -> dict[int, EncodeReply]:
        """The encoders' answers for items of a prompt, by index."""
        jobs = {index: self._job(request, index) for index in indices}
        answers = await self.run(list(jobs.values()), trace)
        return {index: answers[job.key] for index, job in jobs.items() if job.key in answers}

    async def at_prefill(self, prompt: Prompt) -> Encoded:
        """The prompt with the pixels of all items. No encoder is asked."""
        return Encoded(await self._with_pixels(prompt, frozenset()), None)

    async def encode_media(self, media: list[Media], request_id: str, trace: Trace, priority: int = 0) -> Replies:
        """Encode the distinct items of a prompt, in their order, before it is rendered around them."""
        options = {"priority": priority}
        jobs = [self._media_job(each, request_id, index, options, self.version) for index, each in enumerate(media)]
        known = {job.key: reply for job in jobs if (reply := self._features_of(job)) is not None}
        return known | await self.run([job for job in jobs if job.key not in known], trace)

    def _features_of(self, job: Job) -> EncodeReply | None:
        """An earlier answer without its key: the prompt is rendered around it, and then it shows whether an encoder is
        needed. None: there is no such answer, or its key is still good."""
        entry = self._known.get(job.key) if self.leaves_cached else None
        if entry is None or self._remembered(job) is not None or not entry[1].version.fits(job.call.version):
            return None
        self._known.move_to_end(job.key)
        return msgspec.structs.replace(entry[1], ec_transfer_params={})

    async def run(self, jobs: list[Job], trace: Trace) -> Replies:
        """Ask encoders for items, all at the same time. An item that fails cancels the others."""
        if not jobs:
            return {}
        began = self.clock()
        for_encoders, probe = self._for_encoders(jobs, trace)
        # Each has a context of its own. Serve gives calls of one context one internal id, by which the router knows them.
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    job.key: group.create_task(self._answer(job, trace), context=contextvars.Context())
                    for job in for_encoders
                }
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        except asyncio.CancelledError:
            if probe:  # another item becomes the probe, before this one's time is over
                self.state.probe_at = self.clock() + self.config.retry_encoders_after_s
            raise
        trace.took("encode", self.clock() - began)
        return {key: reply for key, task in tasks.items() if (reply := task.result()) is not None}

    def _for_encoders(self, jobs: list[Job], trace: Trace) -> tuple[list[Job], bool]:
        """The jobs that go to encoders, largest first, and whether one of them probes encoders that were down."""
        for_encoders, cost, probe = [], 0, False
        for job in sorted(jobs, key=lambda job: -job.cost):
            if self.shareable and (self._remembered(job) or (job.key, job.call.version) in self._flights):
                for_encoders.append(job)  # it costs the encoders nothing
                continue
            now = self.clock()
            seen = replace(self.state, outstanding=self.state.outstanding + cost, absent=self.handle.absent)
            reason = encode_at_prefill(job.cost, seen, self.config, now)
            if reason is not None:
                if seen.absent:
                    self._wake()
                logger.info(f"request={job.call.request_id} encode-at-prefill({reason}) cost={job.cost} {seen}")
                trace.rung(f"encode-at-prefill({reason})")
                continue
            for_encoders.append(job)
            cost += job.cost
            if self.state.down:
                probe, self.state.probe_at = True, now + self.timeout_s * self.config.attempts
        return for_encoders, probe

    def forget(self, hashes: frozenset[str]) -> None:
        """Send these items again: the cache may have lost them."""
        for key in [key for key, (_, reply) in self._known.items() if not hashes.isdisjoint(reply.ec_transfer_params)]:
            del self._known[key]

    def forget_version(self, version: Version) -> None:
        """Send the items of these weights again: no prefill or decode replica has the weights any more."""
        for key in [key for key, (_, reply) in self._known.items() if reply.version.weights == version.weights]:
            del self._known[key]

    def _job(self, request: StageRequest, index: int) -> Job:
        item, options = request.prompt.items[index], request.options
        passed = {"priority": options.get("priority", 0)}  # a LoRA adapter changes nothing in a tower
        if item.source is not None:
            job = self._media_job(item.source.media, request.request_id, index, passed, request.version)
            return replace(job, hash=item.hash)
        prompt = shaping.for_encoder(request.prompt, index)
        call = StageRequest(request.request_id, prompt, ENCODE_PARAMS, passed, version=request.version)
        return Job(item.hash, item.num_embeds, "encode", call, index, item.hash)

    def _media_job(self, media: Media, request_id: str, index: int, options: dict[str, Any], version: Version) -> Job:
        cost = self.costs.of(media)
        call = MediaRequest(request_id, media, cost, options, version)
        return Job(media.key, cost, "encode_media", call, index, None)

    async def _with_pixels(self, prompt: Prompt, encoded: frozenset[str]) -> Prompt:
        """The prompt for prefill and decode. An item that may still have to be encoded gets its pixels."""

        async def whole(item: Item) -> Item:
            if not item.bare or item.hash in encoded:
                return item
            assert self.features is not None and item.source is not None
            features = await self.features(item.source.media)
            if features.item.hash != item.hash:
                raise HandoffLost(Stage.ENCODER, f"named an item {item.hash} that is {features.item.hash} here")
            return msgspec.structs.replace(item, data=features.item.data)

        items = await asyncio.gather(*map(whole, prompt.items))
        return shaping.without_sources(msgspec.structs.replace(prompt, items=tuple(items)))

    async def _answer(self, job: Job, trace: Trace) -> EncodeReply | None:
        """Try encoder replicas for one item, one after another. None: prefill encodes it."""
        for attempt in range(self.config.attempts):
            began = self.clock()
            try:
                reply = self._remembered(job) if self.shareable else None
                ran_s = 0.0
                if reply is not None:
                    trace.remembered_items += 1
                else:
                    with trace.span.child("encode", item=job.index, attempt=attempt + 1, embeds=job.cost) as span:
                        traced = replace(job, call=shaping.traced(job.call, span.headers))
                        reply = await (self._shared(traced) if self.shareable else self._call(traced))
                        span.set(replica=reply.replica, ran_s=reply.ran_s)
                    ran_s = reply.ran_s
                    trace.called(Stage.ENCODER, self.clock() - began, ran_s)
                trace.saw(Stage.ENCODER, reply.replica)
                trace.encoded(job.index, min(ran_s, self.clock() - began), reply.replica)
                return reply
            except OtherVersion:  # encoders are up, and none has the weights that the request began with
                trace.rung("encode-at-prefill(other version)")
                return None
            except StageError as error:
                logger.warning(f"request={job.call.request_id} item={job.index} attempt={attempt + 1}: {error}")
                if attempt + 1 == self.config.attempts or self.handle.absent:
                    trace.rung("encode-at-prefill(failed)")
                    break
                trace.rung("encode-again")
        self.state.down, self.state.probe_at = True, self.clock() + self.config.retry_encoders_after_s
        return None

    def _wake(self) -> None:
        """Have a call wait for an encoder, so that the autoscaler starts one. Prefill encodes the items meanwhile."""

        async def wake() -> None:
            with suppress(EPDError, TimeoutError):
                async with asyncio.timeout(WAKE_S):
                    await self.handle.call("check_health")

        if self._waking is None or self._waking.done():
            self._waking = asyncio.get_running_loop().create_task(wake(), context=contextvars.Context())

    def _remembered(self, job: Job) -> EncodeReply | None:
        known = self._known.get(job.key)
        if known is None or self.clock() > known[0] or not known[1].version.fits(job.call.version):
            return None
        self._known.move_to_end(job.key)
        return known[1]

    async def _shared(self, job: Job) -> EncodeReply:
        """The answer for an item, from one call for all requests that wait for it.

        The call has a context of its own, because Serve would cancel it with the request that came first. It is cancelled
        when the last request that waits for it has gone.
        """
        key = job.key, job.call.version
        flight = self._flights.get(key)
        if flight is None:
            call = self._call(job)
            flight = _Flight(asyncio.get_running_loop().create_task(call, context=contextvars.Context()))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda _: self._landed(key, flight))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._landed(key, flight)
                flight.task.cancel()

    def _landed(self, key: tuple[str, Version], flight: _Flight | None) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _call(self, job: Job) -> EncodeReply:
        call = msgspec.structs.replace(job.call, request_id=shaping.child_id(job.call.request_id, job.index))
        self.state.outstanding += job.cost
        try:
            async with asyncio.timeout(self.timeout_s):
                reply: EncodeReply = await self.handle.call(job.method, call)
        except TimeoutError:
            raise StageTimeout(Stage.ENCODER, f"did not answer within {self.timeout_s:g} s") from None
        except (BadRequest, OtherVersion):
            self.state.down = False  # an encoder is up, and refuses the item
            raise
        finally:
            self.state.outstanding -= job.cost
        expected = job.hash or (reply.features.item.hash if reply.features else None)
        if set(reply.ec_transfer_params) != {expected}:
            raise HandoffLost(Stage.ENCODER, f"answered for {sorted(reply.ec_transfer_params)}, not for {expected}")
        self.state.down = False
        if isinstance(job.call, MediaRequest) and reply.features is not None:
            self.costs.learn(job.call.media, reply.features.item.num_embeds)
        self.savings.encoded(reply.ran_s)
        if (self.shareable and self.config.remember_s) or self.leaves_cached:
            self._known[job.key] = (self.clock() + self.config.remember_s, reply)
            self._known.move_to_end(job.key)
            while len(self._known) > self.config.remember_items:
                self._known.popitem(last=False)
        return reply
