"""One choice of a request: encode → prefill → decode over the stages' handles, and again while a retry may help."""

import asyncio
import contextvars
import itertools
import time
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from serve_app.channel.wire import First
from serve_app.config import EPDConfig
from serve_app.handoff import shaping
from serve_app.handoff.errors import BadRequest, EPDError, HandoffLost, OtherVersion, StageError, StageTimeout
from serve_app.handoff.types import PrefillReply, Prompt, StageRequest, Version
from serve_app.handoff.waits import leases
from serve_app.ingress.answers import JOIN_S, Answer, Answers
from serve_app.ingress.encoding import Encoded, EncodeStage
from serve_app.ingress.retry import Ladder, Retries
from serve_app.observe.trace import Trace
from serve_app.routing import overlap
from serve_app.routing.handles import Call, StageHandle
from serve_app.stage import Stage

T = TypeVar("T")
LET_END_S = 1.0


@dataclass(frozen=True)
class Deadline:
    """By when a request has its first token: a time of the event loop, and the seconds it had from the start."""

    at: float
    seconds: float

    async def within(self, stage: Stage, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(self.at):
                return await work
        except TimeoutError:
            raise StageTimeout(stage, f"did not answer within {self.seconds:g} s") from None

    def anew(self) -> "Deadline":
        return Deadline(asyncio.get_running_loop().time() + self.seconds, self.seconds)


class Choice:
    """One choice of a request in vLLM's ``OutputProcessor``, which makes its text, logprobs and outputs. That outlives a
    decode replica: tokens of the next one go on from there."""

    def __init__(
        self,
        processor: OutputProcessor,
        core: EngineCoreRequest,
        text: str | None,
        parent: ParentRequest | None,
        index: int,
        queue: RequestOutputCollector,
    ) -> None:
        self.id = core.request_id
        self.index = index
        self.params: Any = core.sampling_params
        self.counts_cached = index == 0
        """Until it is known what of the prompt was in a cache: of the first choice, once."""
        self._processor = processor
        self._args = core, text, parent, index, queue
        processor.add_request(*self._args)

    @property
    def streamed(self) -> bool:
        return shaping.is_streamed(self.params)

    @property
    def finished(self) -> bool:
        return self.id not in self._processor.request_states

    @property
    def said(self) -> list[int]:
        """The tokens so far of one that has not finished."""
        detokenizer = self._processor.request_states[self.id].detokenizer
        assert detokenizer is not None
        return list(detokenizer.output_token_ids)

    def restart(self) -> None:
        """Forget what was said, of which the client has seen nothing."""
        self._processor._finish_request(self._processor.request_states[self.id])
        self._processor.add_request(*self._args)


class Pipeline:
    """The stages, for one ingress replica."""

    def __init__(
        self,
        config: EPDConfig,
        stages: Mapping[Stage, StageHandle],
        encoders: EncodeStage | None,
        answers: Answers,
        engines_go_on: bool,
    ) -> None:
        """``engines_go_on``: whether an engine makes the rest of an answer from its prompt and tokens alone."""
        self.stages = stages
        self.retries = Retries(config.retry)
        self._config = config
        self._encoders = encoders
        self._answers = answers
        self._engines_go_on = engines_go_on
        prefill = stages.get(Stage.PREFILL)
        self._leases = leases(prefill, config.kv.lease_s) if prefill is not None and config.kv.has_leases else None
        self.background: set[asyncio.Task[Any]] = set()

    async def complete(self, request: StageRequest, choice: Choice, deadline: Deadline, record: Trace) -> None:
        """Encode, prefill and decode one choice, and again while a retry may help: down the ``Ladder``, and each time with
        hand-offs of its own, as ``kv_transfer_params`` are used once.

        What was said goes on from there, with a deadline of its own, where its tokens tell all (``handoff.can_go_on``). Else
        a choice that is not streamed, and so held back to its end, is made anew within the deadline.

        Raises ``StageError`` and ``BadRequest``.
        """
        ladder = Ladder(structured=choice.params.structured_outputs is not None)
        for attempt in itertools.count(1):
            said = choice.said
            way = overlap.way({stage: handle.weights for stage, handle in self.stages.items()}, record.weights)
            version = request.version._replace(weights=way.weights)
            rest = msgspec.structs.replace(shaping.rest_of(request, said), version=version)
            at_decode = self._prefill_at_decode(rest.prompt, ladder.without_prefill)
            if at_decode is None and Stage.PREFILL in way.without:
                at_decode = "other version"
            without_encoders = ladder.without_encoders or Stage.ENCODER in way.without
            # An answer that came while the prompt was rendered serves all choices, or the first alone.
            first = attempt == 1 and (choice.index == 0 or self._config.ec.shareable)
            encoded = Encoded(rest.prompt, None)
            try:
                encoded = await deadline.within(Stage.ENCODER, self._encode(rest, record, first, without_encoders))
                if at_decode is not None:
                    record.rung(f"prefill-at-decode({at_decode})")
                prefill = Stage.PREFILL in self.stages and at_decode is None
                return await self._attempt(rest, encoded, choice, prefill, deadline, record)
            except StageError as error:
                if choice.finished:  # the replica went after its last word
                    return
                said = choice.said
                ladder.failed(error, encoded=bool(encoded.hashes), said=bool(said))
                if ladder.cannot_be_structured:
                    raise BadRequest(
                        "The structure asked for cannot be decoded: its grammar does not compile, or leaves no token "
                        "that the other parameters allow."
                    ) from error
                if isinstance(error, HandoffLost) and self._encoders is not None:
                    self._encoders.forget(encoded.hashes)
                if isinstance(error, OtherVersion) and self._encoders is not None and encoded.version.weights:
                    self._encoders.forget_version(encoded.version)
                # Nobody goes on from tokens whose weights no decode replica has.
                no_more = isinstance(error, OtherVersion) and error.stage is Stage.DECODE
                begun = bool(said) and not no_more and self._engines_go_on and shaping.can_go_on(choice.params)
                late = asyncio.get_running_loop().time() > deadline.at
                too_late = bool(said) and not begun and (choice.streamed or late)
                again = not (too_late or ladder.deadly) and self.retries.allow(error, attempt, begun)
                if not choice.streamed and not (again and begun):
                    record.output_tokens -= len(said)
                if not again:
                    raise
                if begun:
                    deadline = deadline.anew()
                elif said:
                    choice.restart()
                    if record.choices == 1:  # else there are others whose tokens this one has to go with
                        record.weights = ""
                record.rung(f"{error.stage}-again")
                await deadline.within(error.stage, self.retries.pause(attempt))

    async def _encode(self, request: StageRequest, record: Trace, first: bool, without_encoders: bool) -> Encoded:
        """Where no encoder is needed the prompt goes on as it is."""
        if self._encoders is None or not request.prompt.items:
            return Encoded(request.prompt, None)
        if without_encoders:
            return await self._encoders.at_prefill(request.prompt)
        return await first_failure(self._encoders.encode(request, record, first))

    async def _attempt(
        self, request: StageRequest, encoded: Encoded, choice: Choice, prefill: bool, deadline: Deadline, record: Trace
    ) -> None:
        """One prefill, where decode does not do it too, and one decode."""
        prefilled = None
        version = request.version.after(encoded.version)
        if prefill:
            prefilled = await deadline.within(Stage.PREFILL, self._prefill(request, encoded, version, record))
            version = version.after(prefilled.version)
        kv = prefilled.kv_transfer_params if prefilled else None
        params = shaping.decode_params(request.params, kv, encoded.ec_transfer_params)
        key = shaping.unique_id(request.request_id)
        call = StageRequest(key, encoded.prompt, params, request.options, version)
        await self._decode(call, prefilled, choice, deadline, record)

    async def _decode(
        self, request: StageRequest, prefilled: PrefillReply | None, choice: Choice, deadline: Deadline, record: Trace
    ) -> None:
        """Blocks that were not pulled are given back."""
        stage, began = self.stages[Stage.DECODE], time.perf_counter()
        call = Call(prefilled.node if prefilled else "")

        def accept(first: First) -> None:
            """Raises ``OtherVersion`` where another choice has tokens of other weights."""
            record.weights = one_version(record.weights, first.version.weights)
            stage.learn(first.replica, first.version)
            record.saw(Stage.DECODE, first.replica)
            record.called(Stage.DECODE, time.perf_counter() - began, first.ran_s)
            record.moved("kv_transfer", first.kv_s)

        def came(output: EngineCoreOutput) -> None:
            call.heard()
            record.token(len(output.new_token_ids))
            if output.prefill_stats is not None and choice.counts_cached:
                record.cached_tokens += output.prefill_stats.num_cached_tokens
                choice.counts_cached = False

        with record.span.child("decode", choice=choice.index) as span:
            answer = Answer(request.request_id, choice.id, prefilled, accept, came)
            self._answers.expect(answer)
            work = stage.call("decode", shaping.traced(request, span.headers), self._answers.inlet.reply_to, call=call)
            # In a context of its own: it ends by itself, after its last token, and not with the request.
            ending = self._in_background(work)
            ending.add_done_callback(answer.ended)
            try:
                # Only the first token has a deadline: from then on the client sees what comes.
                first = await deadline.within(Stage.DECODE, self._leased(prefilled, answer.first))
                span.set(replica=first.replica, first_token_ran_s=first.ran_s)
                span.event("first token")
                await answer.whole
            finally:
                self._answers.forget(answer)
                if answer.complete:
                    asyncio.get_running_loop().call_later(JOIN_S, ending.cancel)
                else:
                    ending.cancel()
                if prefilled is not None and not answer.heard:
                    self._release(prefilled, request.version)

    def _leased(self, prefilled: PrefillReply | None, first: Awaitable[T]) -> Awaitable[T]:
        """The first token of decode, with the lease of the blocks that it waits for kept up meanwhile."""
        hand_off = shaping.hand_off_id(prefilled.kv_transfer_params) if prefilled else None
        return self._leases.wait(hand_off, first) if self._leases is not None else first

    def _prefill_at_decode(self, prompt: Prompt, failed: bool) -> str | None:
        """Why decode prefills this prompt where there is a prefill stage; None: prefill does it."""
        if Stage.PREFILL not in self.stages:
            return None
        if len(prompt.token_ids) < self._config.kv.min_prompt_tokens:
            return "short"
        return "failed" if failed else None

    async def _prefill(self, request: StageRequest, encoded: Encoded, version: Version, record: Trace) -> PrefillReply:
        params = shaping.prefill_params(request.params, encoded.ec_transfer_params)
        key = shaping.unique_id(request.request_id)
        call = StageRequest(key, encoded.prompt, params, request.options, version)
        began = time.perf_counter()
        with record.span.child("prefill", prompt_tokens=len(encoded.prompt.token_ids)) as span:
            work = self.stages[Stage.PREFILL].call("prefill", shaping.traced(call, span.headers))
            # In a context of its own: Serve would cancel it with the request, and so lose a reply that is on its way.
            task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
            try:
                reply: PrefillReply = await asyncio.shield(task)
            except asyncio.CancelledError:
                self._in_background(self._let_end(task))
                raise
            span.set(replica=reply.replica, ran_s=reply.ran_s, cached_tokens=reply.num_cached_tokens)
        record.saw(Stage.PREFILL, reply.replica)
        took = time.perf_counter() - began
        record.took("prefill", took)
        record.moved("ec_transfer", reply.ec_s)
        record.called(Stage.PREFILL, took, reply.ran_s)
        return reply

    def _release(self, prefilled: PrefillReply, version: Version) -> None:
        """Give back, in the background, the blocks of a prefill that no decode engine pulled.

        In a context of its own: the request's is being cancelled, and Serve would cancel this call with it.
        """
        kv = prefilled.kv_transfer_params
        release = self.stages[Stage.DECODE].call("release", shaping.unique_id("release"), kv, version)
        self._in_background(_quietly(release))

    async def _let_end(self, prefill: asyncio.Task[PrefillReply]) -> None:
        """Give a prefill whose client has left the time to end in order, and give back its blocks.

        Cancelled in the moment it is done, nobody would know of the blocks until their lease ends.
        """
        try:
            async with asyncio.timeout(LET_END_S):
                reply = await prefill
        except (EPDError, TimeoutError):  # the timeout has cancelled it
            return
        self._release(reply, reply.version)

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        return task


async def first_failure(work: Awaitable[T]) -> T:
    """The result of work on several items; where one failed, and with that has cancelled the others, its error."""
    try:
        return await work
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def one_version(said: str, more: str) -> str:
    """The weights of all tokens of a request. Raises ``OtherVersion`` where another choice of it had others."""
    if said and more and said != more:
        raise OtherVersion(Stage.DECODE, "has other weights than what answered the rest of the request")
    return said or more


async def _quietly(call: Any) -> None:
    """A clean-up whose failure changes nothing: the lease ends by itself."""
    try:
        async with asyncio.timeout(10):
            await call
    except (EPDError, TimeoutError):
        pass
