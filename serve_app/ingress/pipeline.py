"""A request goes through the stages: each choice is encoded, prefilled and decoded, and tried again while that may help.

``decisions.py`` decides what follows a failure; ``encoding.py`` has items encoded.
"""

import asyncio
import contextvars
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from serve_app.channel.wire import First
from serve_app.config import EPDConfig
from serve_app.handoff import shaping
from serve_app.handoff.errors import BadRequest, EPDError, HandoffLost, OtherVersion, StageError
from serve_app.handoff.types import Media, PrefillReply, StageRequest, Version
from serve_app.handoff.waits import HandOffs
from serve_app.ingress.admission import Admission
from serve_app.ingress.answers import JOIN_S, Answer, Answers
from serve_app.ingress.choice import Choice, choices_of, number_of
from serve_app.ingress.decisions import UNSTRUCTURABLE, Attempts, Next
from serve_app.ingress.encoding import Cached, Encoded, EncodeStage, Replies
from serve_app.ingress.request import Deadline, Request
from serve_app.ingress.retry import Retries
from serve_app.ingress.vllm_errors import fails_as_vllm
from serve_app.observe.trace import Trace
from serve_app.routing import rules
from serve_app.routing.handles import Call, StageHandle
from serve_app.routing.prefix import Prefix, prefix_of
from serve_app.stage import Stage

T = TypeVar("T")
LET_END_S = 1.0


class Plan(NamedTuple):
    """What one attempt at a choice does."""

    call: StageRequest
    """The rest of the answer that is asked for, and the weights that make it."""
    encoders: bool
    """Whether encoders may be asked."""
    prefill: bool
    decode_prefills: str | None
    """The reason why decode prefills although there is a prefill stage."""
    prefix: Prefix | None
    """By which the replica is chosen that prefills."""


class Pipeline:
    """The stages, as one ingress replica sees them."""

    def __init__(
        self,
        config: EPDConfig,
        stages: Mapping[Stage, StageHandle],
        encoders: EncodeStage | None,
        admission: Admission,
        processor: OutputProcessor,
        engines_resume: bool,
    ) -> None:
        """``engines_resume``: whether an engine makes the rest of an answer from its prompt and output tokens alone."""
        self.stages = stages
        self.encoders = encoders
        self.admission = admission
        self.answers = Answers(processor)
        self.retries = Retries(config.advanced.retry)
        self.background: set[asyncio.Task[Any]] = set()
        self._config = config
        self._processor = processor
        self._engines_resume = engines_resume
        prefill = stages.get(Stage.PREFILL)
        leased = prefill if config.kv_has_leases else None
        self._leases = leases(leased, config.advanced.kv.lease_s) if leased is not None else None

    async def encode_media(self, request: Request, media: list[Media]) -> Replies:
        """Encode items while their prompt is rendered. Raises vLLM's own exceptions."""
        assert self.encoders is not None
        with fails_as_vllm(request), self.admission.admit_media(media):
            deadline = request.deadline(self._config.timeouts.request_s)
            work = self.encoders.encode_media(media, request.id, request.trace, request.priority)
            return await deadline.within(Stage.ENCODER, work)

    @asynccontextmanager
    async def answering(
        self, call: StageRequest, core: EngineCoreRequest, text: str | None, request: Request
    ) -> AsyncIterator[RequestOutputCollector]:
        """Make all choices of a prompt at the same time. Their outputs come by the queue, and so does the first failure.

        At its end it aborts what runs on any stage and gives back KV blocks that nobody will pull. Raises ``Overloaded``.
        """
        prompt, number = call.prompt, number_of(core)
        with self.admission.admit(prompt.items):
            self.retries.accepted()
            request.choices += number
            request.trace.generates(prompt, number)
            queue = RequestOutputCollector(core.params.output_kind, core.request_id)
            choices = choices_of(self._processor, core, text, queue)
            deadline = request.deadline(self._config.timeouts.request_s)
            tasks = [asyncio.create_task(self._into(queue, call, choice, deadline, request)) for choice in choices]
            try:
                yield queue
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._processor.abort_requests([core.request_id], internal=True)

    async def _into(
        self,
        queue: RequestOutputCollector,
        call: StageRequest,
        choice: Choice,
        deadline: Deadline,
        request: Request,
    ) -> None:
        """Make one choice. Its failure is the request's."""
        try:
            await self.complete(msgspec.structs.replace(call, params=choice.params), choice, deadline, request)
        except Exception as error:
            queue.put(error)

    async def complete(self, call: StageRequest, choice: Choice, deadline: Deadline, request: Request) -> None:
        """Encode, prefill and decode one choice, and try again while that may help. Each attempt has its own hand-offs:
        ``kv_transfer_params`` are used once. An answer that resumes gets a new deadline.

        Raises ``StageError`` and ``BadRequest``.
        """
        attempts = Attempts(
            structured=shaping.generates(choice.params) and choice.params.structured_outputs is not None,
            buffered=not choice.streamed,
            resumable=self._engines_resume and shaping.can_resume(choice.params),
        )
        for number in itertools.count(1):
            plan = self._plan(shaping.resumed(call, choice.output_tokens), attempts, request)
            encoded = Encoded(plan.call.prompt, None)
            began = time.perf_counter()
            try:
                # Encoders' answers that came while the prompt was rendered serve all choices, or the first alone.
                first = number == 1 and (choice.index == 0 or self._config.ec.shareable)
                cached = partial(self._cached, plan) if number == 1 else Cached
                encoded = await deadline.within(Stage.ENCODER, self._encode(plan, request.trace, first, cached))
                return await self._attempt(plan, encoded, choice, deadline, request)
            except StageError as error:
                if choice.finished:  # the replica was lost after its last token
                    return
                self._forget(error, encoded, time.perf_counter() - began)
                tokens, allow = len(choice.output_tokens), partial(self.retries.allow, error, number)
                of_encoders, missed = bool(encoded.hashes), bool(encoded.cached) and isinstance(error, HandoffLost)
                following = attempts.after(error, of_encoders, bool(tokens), deadline.is_over, allow, missed)
                if not (choice.streamed or following is Next.RESUME):
                    request.trace.dropped(tokens)
                match following:
                    case Next.GIVE_UP if attempts.cannot_be_structured:
                        raise BadRequest(UNSTRUCTURABLE) from error
                    case Next.GIVE_UP:
                        raise
                    case Next.RESUME:
                        deadline = deadline.anew()
                    case Next.RESTART:
                        choice.restart()
                        if request.choices == 1:  # other choices have tokens of these weights
                            request.weights = ""
                request.trace.rung("encode-after-all" if missed else f"{error.stage}-again")
                await deadline.within(error.stage, self.retries.pause(number))

    def _plan(self, call: StageRequest, attempts: Attempts, request: Request) -> Plan:
        way = rules.way({stage: handle.weights for stage, handle in self.stages.items()}, request.weights)
        call = msgspec.structs.replace(call, version=call.version._replace(weights=way.weights))
        encoders = not (attempts.without_encoders or Stage.ENCODER in way.without)
        if Stage.PREFILL not in self.stages:
            return Plan(call, encoders, False, None, self._prefix(Stage.DECODE, call, request))
        why = None
        if len(call.prompt.token_ids) < self._config.advanced.kv.min_prompt_tokens:
            why = "short"
        elif attempts.without_prefill:
            why = "failed"
        elif Stage.PREFILL in way.without:
            why = "other version"
        prefills = Stage.PREFILL if why is None else Stage.DECODE
        return Plan(call, encoders, why is None, why, self._prefix(prefills, call, request))

    def _prefix(self, prefills: Stage, call: StageRequest, request: Request) -> Prefix | None:
        """None: the replica is chosen without, or reads no prefix cache for this request."""
        if self.stages[prefills].affinity is None or call.params.skip_reading_prefix_cache:
            return None
        adapter = call.options.get("lora_request")
        return prefix_of(call.prompt, request.session, adapter.lora_name if adapter is not None else "")

    def _cached(self, plan: Plan) -> Cached:
        """What the replica that prefills is expected to have in its prefix cache."""
        if plan.prefix is None:
            return Cached()
        return Cached(*self.stages[Stage.PREFILL if plan.prefill else Stage.DECODE].expected(plan.prefix))

    def _forget(self, error: StageError, encoded: Encoded, took_s: float) -> None:
        """Drop the encoders' answers that are of no use after this failure."""
        if self.encoders is None:
            return
        if isinstance(error, HandoffLost):
            self.encoders.forget(encoded.hashes)
            if encoded.cached:
                self.encoders.savings.failed(took_s)
        if isinstance(error, OtherVersion) and encoded.version.weights:
            self.encoders.forget_version(encoded.version)

    async def _encode(self, plan: Plan, trace: Trace, first: bool, cached: Callable[[], Cached]) -> Encoded:
        """The prompt for prefill and decode. It stays as it is where no encoder is needed."""
        if self.encoders is None or not plan.call.prompt.items:
            return Encoded(plan.call.prompt, None)
        if not plan.encoders:
            return await self.encoders.at_prefill(plan.call.prompt)
        return await self.encoders.encode(plan.call, trace, first, cached)

    async def _attempt(
        self, plan: Plan, encoded: Encoded, choice: Choice, deadline: Deadline, request: Request
    ) -> None:
        """Prefill, unless decode does that too, and decode."""
        if plan.decode_prefills is not None:
            request.trace.rung(f"prefill-at-decode({plan.decode_prefills})")
        call, prefilled = plan.call, None
        version = call.version.after(encoded.version)
        if plan.prefill:
            prefilled = await deadline.within(Stage.PREFILL, self._prefill(plan, encoded, version, request.trace))
            version = version.after(prefilled.version)
        kv = prefilled.kv_transfer_params if prefilled else None
        params = shaping.decode_params(call.params, kv, encoded.ec_transfer_params)
        key = shaping.unique_id(call.request_id)
        call = StageRequest(key, encoded.prompt, params, call.options, version)
        under_way = Call(prefilled.node) if prefilled else Call(prefix=plan.prefix, needs=encoded.cached_tokens)
        await self._decode(call, under_way, prefilled, choice, deadline, request)

    async def _decode(
        self,
        call: StageRequest,
        under_way: Call,
        prefilled: PrefillReply | None,
        choice: Choice,
        deadline: Deadline,
        request: Request,
    ) -> None:
        """Have a choice decoded. Blocks that decode did not pull are given back."""
        stage, trace, began = self.stages[Stage.DECODE], request.trace, time.perf_counter()

        def accept(first: First) -> None:
            request.goes_on_with(first.version.weights)
            stage.learn(first.replica, first.version)
            trace.saw(Stage.DECODE, first.replica)
            trace.called(Stage.DECODE, time.perf_counter() - began, first.ran_s)
            trace.moved("kv_transfer", first.kv_s)

        def came(output: EngineCoreOutput) -> None:
            under_way.heard()
            request.token(len(output.new_token_ids))
            if output.prefill_stats is not None:
                cached = output.prefill_stats.num_cached_tokens
                if choice.counts_cached:
                    trace.cached_tokens += cached
                    choice.counts_cached = False
                if under_way.prefix is not None:
                    stage.began(call.request_id, under_way, cached)
                    trace.found(Stage.DECODE, under_way.expected_tokens, cached)

        with trace.span.child("decode", choice=choice.index) as span:
            answer = Answer(call.request_id, choice.id, prefilled, accept, came)
            self.answers.expect(answer)
            work = stage.call("decode", shaping.traced(call, span.headers), self.answers.inlet.reply_to, call=under_way)
            # The call has a context of its own. It ends by itself after its last token, and not with the request.
            ending = self._in_background(work)
            ending.add_done_callback(answer.ended)
            try:
                # Only the first token has a deadline. From then on the client sees what comes.
                first = await deadline.within(Stage.DECODE, self._leased(prefilled, answer.first))
                span.set(replica=first.replica, first_token_ran_s=first.ran_s)
                span.event("first token")
                await answer.whole
            finally:
                self.answers.forget(answer)
                if answer.complete:
                    asyncio.get_running_loop().call_later(JOIN_S, ending.cancel)
                else:
                    ending.cancel()
                if prefilled is not None and not answer.heard:
                    self._release(prefilled, call.version)

    def _leased(self, prefilled: PrefillReply | None, first: Awaitable[T]) -> Awaitable[T]:
        """The first token of decode. The lease of the blocks that it waits for is renewed meanwhile."""
        hand_off = shaping.hand_off_id(prefilled.kv_transfer_params) if prefilled else None
        return self._leases.wait(hand_off, first) if self._leases is not None else first

    async def _prefill(self, plan: Plan, encoded: Encoded, version: Version, trace: Trace) -> PrefillReply:
        asked = plan.call
        params = shaping.prefill_params(asked.params, encoded.ec_transfer_params)
        key = shaping.unique_id(asked.request_id)
        call = StageRequest(key, encoded.prompt, params, asked.options, version)
        began = time.perf_counter()
        with trace.span.child("prefill", prompt_tokens=len(encoded.prompt.token_ids)) as span:
            under_way = Call(prefix=plan.prefix, needs=encoded.cached_tokens)
            work = self.stages[Stage.PREFILL].call("prefill", shaping.traced(call, span.headers), call=under_way)
            # The call has a context of its own. Serve would cancel it with the request, and lose a reply on its way.
            task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
            try:
                reply: PrefillReply = await asyncio.shield(task)
            except asyncio.CancelledError:
                self._in_background(self._let_end(task))
                raise
            span.set(replica=reply.replica, ran_s=reply.ran_s, cached_tokens=reply.num_cached_tokens)
        trace.saw(Stage.PREFILL, reply.replica)
        if plan.prefix is not None:
            trace.found(Stage.PREFILL, under_way.expected_tokens, reply.num_cached_tokens or 0)
        took = time.perf_counter() - began
        trace.took("prefill", took)
        trace.moved("ec_transfer", reply.ec_s)
        trace.called(Stage.PREFILL, took, reply.ran_s)
        return reply

    def _release(self, prefilled: PrefillReply, version: Version) -> None:
        """Give back, in the background, the blocks of a prefill that no decode engine pulled."""
        kv = prefilled.kv_transfer_params
        release = self.stages[Stage.DECODE].call("release", shaping.unique_id("release"), kv, version)
        self._in_background(_quietly(release))

    async def _let_end(self, prefill: asyncio.Task[PrefillReply]) -> None:
        """Let a prefill end whose client has left, and give back its blocks. If it were cancelled in the moment it is done,
        nobody would know of the blocks until their lease ends."""
        try:
            async with asyncio.timeout(LET_END_S):
                reply = await prefill
        except (EPDError, TimeoutError):  # the timeout has cancelled it
            return
        self._release(reply, reply.version)

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """In a context of its own, because Serve cancels the calls of a request's context with the request."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        return task


def leases(prefill: StageHandle, lease_s: float) -> HandOffs[str]:
    """Waits for a place at decode, by prefill's ids of the requests. Prefill renews the leases of their KV blocks."""

    async def lost(waiting: list[str]) -> set[str]:
        replies = await prefill.broadcast("renew", waiting, timeout_s=lease_s / 3)
        return {request for ended in replies if not isinstance(ended, Exception) for request in ended}

    return HandOffs(lease_s / 6, lease_s / 3, lost, "waited for a place until the lease of its KV blocks was over")


async def _quietly(call: Any) -> None:
    """Await a clean-up. Its failure changes nothing, because the lease ends by itself."""
    try:
        async with asyncio.timeout(10):
            await call
    except (EPDError, TimeoutError):
        pass
