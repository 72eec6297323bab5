"""``EPDClient``: vLLM's ``EngineClient`` whose ``generate()`` is encode → prefill → decode over Ray Serve handles.

vLLM's OpenAI app calls it as it would call an engine of its own. By then the prompt is rendered: token ids and processed
items. Nothing of a request is kept here after its last token, so any ingress replica can serve any request.
"""

import asyncio
import copy
import math
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from serve_app.config import EPDConfig
from serve_app.handoff import shaping
from serve_app.handoff.engine_input import from_engine_input
from serve_app.handoff.errors import Overloaded
from serve_app.handoff.types import ANY, Media, Prompt, StageRequest, Version
from serve_app.ingress.admission import Admission, size_of
from serve_app.ingress.answers import Answers
from serve_app.ingress.encoding import EncodeStage, Replies
from serve_app.ingress.guard import GuardedInputProcessor, check_params, guard_renderer
from serve_app.ingress.pipeline import Choice, Deadline, Pipeline, first_failure
from serve_app.ingress.rendering import FromMedia, ItemProcessor, declared_fields
from serve_app.ingress.vllm_errors import to_vllm_error
from serve_app.observe import trace
from serve_app.observe.ingress_metrics import IngressMetrics
from serve_app.observe.trace import Trace
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage


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
        self.metrics = IngressMetrics()
        self.admission = Admission(config.admission, embed_size_bytes(self.model_config), self.metrics.outstanding)
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
        self._processor = OutputProcessor(
            self.renderer.tokenizer, log_stats=False, stream_interval=vllm_config.scheduler_config.stream_interval
        )
        self.answers = Answers(self._processor)
        # Marks and the processors of users may look at the answer alone.
        processors = self.model_config.logits_processors or config.decode.engine_args.get("logits_processors")
        engines_go_on = vllm_config.watermark_config is None and not processors
        self.pipeline = Pipeline(config, stages, self._encoders, self.answers, engines_go_on)

    @property
    def load(self) -> dict[str, float]:
        """What is under way at this ingress replica."""
        return {"calls": float(self.admission.requests), "outstanding": float(self.admission.requests)}

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
            core, rendered = self._admit(prompt, sampling_params, request_id, options)
            text = prompt_text if prompt_text is not None else extract_prompt_components(self.model_config, prompt)[0]
            with self.admission.admit(rendered.items):
                record.begin()
                record.items.update(item.modality for item in rendered.items)
                record.media_bytes += sum(map(size_of, rendered.items))
                record.prompt_tokens += len(rendered.token_ids)
                record.choices += sampling_params.n
                self.pipeline.retries.accepted()
                request = StageRequest(request_id, rendered, core.params, options, self._version)
                queue = RequestOutputCollector(core.params.output_kind, core.request_id)
                choices = self._choices(core, text, queue)
                deadline = self._deadline(record)
                tasks = [self._complete(request, choice, queue, deadline, record) for choice in choices]
                try:
                    finished = False
                    while not finished:
                        output = queue.get_nowait() or await queue.get()
                        assert isinstance(output, RequestOutput)
                        finished = output.finished
                        yield output
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                    self._processor.abort_requests([core.request_id], internal=True)
        except Exception as error:
            mapped = to_vllm_error(error)
            record.fail(mapped)
            raise mapped from error

    def _choices(self, core: EngineCoreRequest, text: str | None, queue: RequestOutputCollector) -> list[Choice]:
        """All that vLLM's OutputProcessor gathers into the outputs of one request."""
        if core.params.n == 1:
            return [Choice(self._processor, core, text, None, 0, queue)]
        parent = ParentRequest(core)
        choices = []
        for index in range(core.params.n):
            child = copy.copy(core)
            child.request_id, child.sampling_params = parent.get_child_info(index)
            choices.append(Choice(self._processor, child, text, parent, index, queue))
        return choices

    def _complete(
        self,
        request: StageRequest,
        choice: Choice,
        queue: RequestOutputCollector,
        deadline: Deadline,
        record: Trace,
    ) -> asyncio.Task[None]:
        """Make one choice; a failure of it is one of the request."""

        async def complete() -> None:
            try:
                await self.pipeline.complete(request, choice, deadline, record)
            except Exception as error:
                queue.put(error)

        request = msgspec.structs.replace(request, params=choice.params)
        return asyncio.get_running_loop().create_task(complete())

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

    def _admit(
        self, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> tuple[EngineCoreRequest, Prompt]:
        """Refuse here what any stage would refuse, before a stage is called, and complete the sampling parameters: for all
        stages, and once."""
        check_params(params)
        core = self.input_processor.process_inputs(
            request_id, prompt, params, supported_tasks=("generate",), lora_request=options["lora_request"]
        )
        self.input_processor.assign_request_id(core)
        core.params.watermarking = params.watermarking  # the engine's to resolve
        rendered = from_engine_input(prompt)
        if self._config.ec.salt_by_tenant:
            rendered = shaping.salted(rendered, rendered.cache_salt)
        return core, rendered

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


def not_disaggregated(what: str) -> VLLMValidationError:
    return VLLMValidationError(f"{what} is not available here: this server is an ingress in front of several engines.")
