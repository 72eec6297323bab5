"""``EPDClient``: vLLM's ``EngineClient`` whose ``generate()`` is encode → prefill → decode over Ray Serve handles.

vLLM's OpenAI app calls it as it would call an engine of its own. By then the prompt is rendered: token ids and processed
items. Nothing of a request is kept here after its last token, so any ingress replica can serve any request.
"""

import asyncio
import contextvars
import itertools
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams

from serve_app import handoff, overlap, trace
from serve_app.admission import Admission, size_of
from serve_app.config import EPDConfig, Stage
from serve_app.encoding import Encoded, EncodeStage, Replies
from serve_app.engine import from_engine_input
from serve_app.errors import BadRequest, EPDError, HandoffLost, OtherVersion, Overloaded, StageError, StageTimeout
from serve_app.from_media import FromMedia, ItemProcessor, declared_fields
from serve_app.guard import GuardedInputProcessor, check_params, guard_renderer
from serve_app.handoff import ANY, Chunk, Media, PrefillReply, Prompt, StageRequest, Version
from serve_app.ingress_metrics import IngressMetrics
from serve_app.kv_waits import leases
from serve_app.outputs import assemble, merge, with_prefill, words_after
from serve_app.retry import Ladder, Retries
from serve_app.routing import StageHandle
from serve_app.trace import Trace
from serve_app.vllm_errors import to_vllm_error

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


class EPDClient(EngineClient):
    """The pipeline of one ingress replica."""

    def __init__(
        self,
        config: EPDConfig,
        vllm_config: VllmConfig,
        stages: Mapping[Stage, StageHandle],
        version: Version = ANY,
    ) -> None:
        """``version``: of this ingress replica. Engines of another refuse its requests."""
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        guard_renderer(self.renderer)
        declared = declared_fields(self.renderer)
        self.input_processor = GuardedInputProcessor(vllm_config, self.renderer)
        self.stages = stages
        self._version = version
        self._config = config
        self._background: set[asyncio.Task[Any]] = set()
        self.metrics = IngressMetrics()
        self.admission = Admission(config.admission, embed_size_bytes(self.model_config), self.metrics.outstanding)
        self._retries = Retries(config.retry)
        # Marks and the processors of users may look at the answer alone.
        processors = self.model_config.logits_processors or config.decode.engine_args.get("logits_processors")
        self._engines_go_on = vllm_config.watermark_config is None and not processors
        prefill = stages.get(Stage.PREFILL)
        self._leases = leases(prefill, config.kv.lease_s) if prefill is not None and config.kv.has_leases else None
        encoder = stages.get(Stage.ENCODER)
        self._encoders: EncodeStage | None = None
        if encoder is not None:
            encode = config.encode if config.ec.uses_folder else config.encode.model_copy(update={"remember_s": 0})
            self._encoders = EncodeStage(encoder, encode, config.ec.shareable, declared, version=version)
        self.from_media: frozenset[str] = frozenset()
        """Modalities whose items go to encoders as media."""
        if self._encoders is not None and config.encode.from_media:
            processor = ItemProcessor(self.renderer, config.media)
            self.from_media = processor.modalities
            self._encoders.features = processor.features
            FromMedia(processor, self._encode_media, config.ec.salt_by_tenant)

    @property
    def load(self) -> dict[str, float]:
        """What is under way at this ingress replica."""
        return {"calls": float(self.admission.requests), "outstanding": float(self.admission.requests)}

    # ---- the pipeline

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Encode the items, prefill and decode each choice, and yield as one engine would.

        Closing the generator aborts what is running on any stage and gives back KV blocks that nobody will pull.
        ``trace_headers``, the client's, are not used: the request's own span continues them, see ``tracing.py``.
        Raises vLLM's own exceptions: ``VLLMClientError`` (4xx) or ``GracefulHTTPError`` with 503 or 504.
        """
        record = trace.current.get() or Trace(request_id)
        options = {
            "lora_request": lora_request,
            "priority": priority,
            "reasoning_ended": reasoning_ended,
            "reasoning_parser_kwargs": reasoning_parser_kwargs,
        }
        try:
            request = self._admit(prompt, sampling_params, request_id, options)
            text = prompt_text if prompt_text is not None else extract_prompt_components(self.model_config, prompt)[0]
            with self.admission.admit(request.prompt.items):
                record.begin()
                record.items.update(item.modality for item in request.prompt.items)
                record.media_bytes += sum(map(size_of, request.prompt.items))
                record.prompt_tokens += len(request.prompt.token_ids)
                record.choices += sampling_params.n
                self._retries.accepted()
                deadline = self._deadline(record)
                choices = [self._choice(request, index, deadline, record) for index in range(sampling_params.n)]
                async with aclosing(assemble(request, text, merge(choices))) as outputs:
                    async for output in outputs:
                        yield output
        except Exception as error:
            mapped = to_vllm_error(error)
            record.fail(mapped)
            raise mapped from error

    def _deadline(self, record: Trace) -> Deadline:
        """Counted from the beginning of the request; from now where it has made tokens before, as beam search does, which
        calls ``generate`` for each beam of each step."""
        seconds = min(record.timeout_s or math.inf, self._config.request_timeout_s)
        spent = time.perf_counter() - record.began if record.first_token is None else 0.0
        return Deadline(asyncio.get_running_loop().time() + seconds - spent, seconds)

    async def _encode_media(self, media: list[Media]) -> Replies:
        """Encode items while their prompt is rendered."""
        assert self._encoders is not None
        record = trace.current.get() or Trace("media")
        try:
            with self.admission.admit_media(media):
                work = first_failure(self._encoders.encode_media(media, record))
                return await self._deadline(record).within(Stage.ENCODER, work)
        except Exception as error:
            mapped = to_vllm_error(error)
            record.fail(mapped)
            raise mapped from error

    def _admit(self, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]) -> StageRequest:
        """Refuse here what any stage would refuse, before a stage is called."""
        check_params(params)
        self.input_processor.process_inputs(
            request_id, prompt, params, supported_tasks=("generate",), lora_request=options["lora_request"]
        )
        rendered = from_engine_input(prompt)
        if self._config.ec.salt_by_tenant:
            rendered = handoff.salted(rendered, rendered.cache_salt)
        return StageRequest(request_id, rendered, params, options, version=self._version)

    async def _choice(
        self, request: StageRequest, index: int, deadline: Deadline, record: Trace
    ) -> AsyncGenerator[Chunk]:
        """Encode, prefill and decode one choice, and again while a retry may help: down the ``Ladder``, and each time with
        hand-offs of its own, as ``kv_transfer_params`` are used once.

        What was said goes on from there, with a deadline of its own, where its tokens tell all (``handoff.can_go_on``). Else
        a choice that is not streamed, and so held back to its end, is made anew within the deadline. So it is where there is
        no more than its first token, which comes ahead of the pieces that decode saves.
        """
        streamed = handoff.is_streamed(request.params)
        ladder = Ladder(structured=request.params.structured_outputs is not None)
        said: list[int] = []
        held: list[Chunk] = []
        cached_tokens: int | None = None
        finished = False
        for attempt in itertools.count(1):
            way = overlap.way({stage: handle.weights for stage, handle in self.stages.items()}, record.weights)
            version = request.version._replace(weights=way.weights)
            rest = msgspec.structs.replace(handoff.rest_of(request, said), version=version)
            words = words_after(self.renderer.tokenizer, request, said) if said else None
            at_decode = self._prefill_at_decode(rest.prompt, ladder.without_prefill)
            if at_decode is None and Stage.PREFILL in way.without:
                at_decode = "other version"
            without_encoders = ladder.without_encoders or Stage.ENCODER in way.without
            # An answer that came while the prompt was rendered serves all choices, or the first alone.
            first = attempt == 1 and (index == 0 or self._config.ec.shareable)
            encoded = Encoded(rest.prompt, None)
            try:
                work = self._encode(rest, record, first, without_encoders)
                encoded = await deadline.within(Stage.ENCODER, work)
                if at_decode is not None:
                    record.rung(f"prefill-at-decode({at_decode})")
                prefill = Stage.PREFILL in self.stages and at_decode is None
                async with aclosing(self._attempt(rest, encoded, index, prefill, deadline, record)) as chunks:
                    async for chunk in chunks:
                        record.weights = one_version(record.weights, chunk.version.weights)
                        if words is not None:
                            chunk = msgspec.structs.replace(words(chunk), num_cached_tokens=cached_tokens)
                        elif cached_tokens is None and not said:
                            cached_tokens = chunk.num_cached_tokens
                            record.cached_tokens += (cached_tokens or 0) if index == 0 else 0
                        said += chunk.token_ids
                        finished = chunk.finish_reason is not None
                        if streamed:
                            yield chunk
                        else:
                            held.append(chunk)
                break
            except StageError as error:
                if finished:  # the replica went after its last word
                    break
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
                now = asyncio.get_running_loop().time()
                kept = bool(said) if streamed else len(said) > 1
                begun = kept and not no_more and self._engines_go_on and handoff.can_go_on(request.params)
                too_late = bool(said) and not begun and (streamed or now > deadline.at)
                again = not (too_late or ladder.deadly) and self._retries.allow(error, attempt, begun)
                if held and not (again and begun):
                    record.output_tokens -= len(said)
                    said, held = [], []
                    if record.choices == 1:  # else there are others whose tokens this one has to go with
                        record.weights = ""
                if not again:
                    raise
                if begun:
                    deadline = Deadline(now + deadline.seconds, deadline.seconds)
                record.rung(f"{error.stage}-again")
                await deadline.within(error.stage, self._retries.pause(attempt))
        for chunk in held:
            yield chunk

    async def _encode(self, request: StageRequest, record: Trace, first: bool, without_encoders: bool) -> Encoded:
        """Where no encoder is needed the prompt goes on as it is."""
        if self._encoders is None or not request.prompt.items:
            return Encoded(request.prompt, None)
        if without_encoders:
            return await self._encoders.at_prefill(request.prompt)
        return await first_failure(self._encoders.encode(request, record, first))

    async def _attempt(
        self,
        request: StageRequest,
        encoded: Encoded,
        index: int,
        prefill: bool,
        deadline: Deadline,
        record: Trace,
    ) -> AsyncGenerator[Chunk]:
        """One prefill, where decode does not do it too, and one decode."""
        prefilled = None
        version = request.version.after(encoded.version)
        if prefill:
            prefilled = await deadline.within(Stage.PREFILL, self._prefill(request, encoded, version, record))
            version = version.after(prefilled.version)
        kv = prefilled.kv_transfer_params if prefilled else None
        params = handoff.decode_params(request.params, kv, encoded.ec_transfer_params, index)
        streamed = handoff.is_streamed(request.params)
        decode = StageRequest(request.request_id, encoded.prompt, params, request.options, streamed, version)
        pulled = False
        try:
            async with aclosing(self._decode(decode, prefilled, index, deadline, record)) as chunks:
                async for chunk in chunks:
                    if prefilled and not pulled:
                        chunk = with_prefill(chunk, prefilled)
                    pulled = True
                    yield chunk
        finally:
            if kv is not None and not pulled:
                self._release(request.request_id, kv, version)

    async def _decode(
        self, call: StageRequest, prefilled: PrefillReply | None, index: int, deadline: Deadline, record: Trace
    ) -> AsyncGenerator[Chunk]:
        began = time.perf_counter()
        source = prefilled.node if prefilled else ""
        pulled = False
        with record.span.child("decode", choice=index) as span:
            stream = self.stages[Stage.DECODE].stream("generate", handoff.traced(call, span.headers), source=source)
            async with aclosing(stream):
                while True:
                    try:
                        # Only the first token has a deadline: from then on the client sees what comes.
                        coming = anext(stream)
                        if not pulled:
                            coming = deadline.within(Stage.DECODE, self._leased(prefilled, coming))
                        chunk, replica = await coming
                    except StopAsyncIteration:
                        return
                    record.saw(Stage.DECODE, replica)
                    if chunk.ran_s is not None:
                        record.called(Stage.DECODE, time.perf_counter() - began, chunk.ran_s)
                        record.moved("kv_transfer", chunk.kv_s)
                    if not pulled:
                        span.set(replica=replica, first_token_ran_s=chunk.ran_s)
                        span.event("first token")
                    record.token(len(chunk.token_ids))
                    pulled = True
                    yield chunk

    def _leased(self, prefilled: PrefillReply | None, first: Awaitable[T]) -> Awaitable[T]:
        """The first token of decode, with the lease of the blocks that it waits for kept up meanwhile."""
        request = handoff.hand_off_id(prefilled.kv_transfer_params) if prefilled else None
        return self._leases.wait(request, first) if self._leases is not None and request is not None else first

    def _prefill_at_decode(self, prompt: Prompt, failed: bool) -> str | None:
        """Why decode prefills this prompt where there is a prefill stage; None: prefill does it."""
        if Stage.PREFILL not in self.stages:
            return None
        if len(prompt.token_ids) < self._config.kv.min_prompt_tokens:
            return "short"
        return "failed" if failed else None

    async def _prefill(self, request: StageRequest, encoded: Encoded, version: Version, record: Trace) -> PrefillReply:
        params = handoff.prefill_params(request.params, encoded.ec_transfer_params)
        call = StageRequest(request.request_id, encoded.prompt, params, request.options, version=version)
        began = time.perf_counter()
        with record.span.child("prefill", prompt_tokens=len(encoded.prompt.token_ids)) as span:
            work = self.stages[Stage.PREFILL].call("prefill", handoff.traced(call, span.headers))
            # In a context of its own: Serve would cancel it with the request, and so lose a reply that is on its way.
            task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
            try:
                reply: PrefillReply = await asyncio.shield(task)
            except asyncio.CancelledError:
                self._in_background(self._let_end(request.request_id, task))
                raise
            span.set(replica=reply.replica, ran_s=reply.ran_s, cached_tokens=reply.num_cached_tokens)
        record.saw(Stage.PREFILL, reply.replica)
        took = time.perf_counter() - began
        record.took("prefill", took)
        record.moved("ec_transfer", reply.ec_s)
        record.called(Stage.PREFILL, took, reply.ran_s)
        return reply

    def _release(self, request_id: str, kv_transfer_params: dict[str, Any], version: Version) -> None:
        """Give back, in the background, the blocks of a prefill that no decode engine pulled.

        In a context of its own: the request's is being cancelled, and Serve would cancel this call with it.
        """
        call = self.stages[Stage.DECODE].call("release", request_id, kv_transfer_params, version)
        self._in_background(_quietly(call))

    async def _let_end(self, request_id: str, prefill: asyncio.Task[PrefillReply]) -> None:
        """Give a prefill whose client has left the time to end in order, and give back its blocks.

        Cancelled in the moment it is done, nobody would know of the blocks until their lease ends.
        """
        try:
            async with asyncio.timeout(LET_END_S):
                reply = await prefill
        except (EPDError, TimeoutError):  # the timeout has cancelled it
            return
        self._release(request_id, reply.kv_transfer_params, reply.version)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ---- the rest of vLLM's protocol

    is_running = True
    is_stopped = False
    errored = False

    @property
    def dead_error(self) -> BaseException:
        return RuntimeError("the ingress has no engine that could die")

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """vLLM asks before it renders a prompt."""
        try:
            self.admission.check_request()
        except Overloaded as error:
            raise to_vllm_error(error) from error

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def abort(self, request_id: Any) -> None:
        """Nothing to do: a request is aborted by closing its generator."""

    async def check_health(self) -> None: ...

    async def do_log_stats(self) -> None: ...

    async def is_tracing_enabled(self) -> bool:
        return self._config.tracing.endpoint is not None

    async def is_sleeping(self) -> bool:
        return False

    async def is_paused(self) -> bool:
        return False

    async def reset_mm_cache(self) -> None: ...

    async def notify_kv_transfer_request_rejected(
        self, request_id: str, kv_transfer_params: dict[str, Any], *, data_parallel_rank: int | None = None
    ) -> None: ...

    def shutdown(self, timeout: float | None = None) -> None:
        self.renderer.shutdown()

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise not_disaggregated("Pooling")

    async def add_lora(self, lora_request: Any) -> bool:
        raise not_disaggregated("Loading LoRA adapters at run time")

    async def start_profile(self, profile_prefix: str | None = None, **overrides: Any) -> None:
        raise not_disaggregated("vLLM's own profile route")

    async def stop_profile(self) -> None:
        raise not_disaggregated("vLLM's own profile route")

    async def reset_encoder_cache(self) -> None:
        raise not_disaggregated("Resetting caches")

    async def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        raise not_disaggregated("Resetting caches")

    async def sleep(self, *args: Any, **kwargs: Any) -> None:
        raise not_disaggregated("Sleep mode")

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        raise not_disaggregated("Sleep mode")

    async def release_kv_cache_memory(self) -> None:
        raise not_disaggregated("Sleep mode")

    async def pause_generation(self, *args: Any, **kwargs: Any) -> None:
        raise not_disaggregated("Pausing generation")

    async def resume_generation(self) -> None:
        raise not_disaggregated("Pausing generation")


def embed_size_bytes(model_config: Any) -> int:
    """Bytes of one embedding (visual or audio token) of a model."""
    return int(model_config.get_inputs_embeds_size() * model_config.dtype.itemsize)


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


def not_disaggregated(what: str) -> VLLMValidationError:
    return VLLMValidationError(f"{what} is not available here: this server is an ingress in front of several engines.")


async def _quietly(call: Any) -> None:
    """A clean-up whose failure changes nothing: the lease ends by itself."""
    try:
        async with asyncio.timeout(10):
            await call
    except (EPDError, TimeoutError):
        pass
