"""``EPDClient``: vLLM's ``EngineClient`` whose ``generate()`` is encode → prefill → decode over Ray Serve handles.

vLLM's OpenAI app calls it as it would call an engine of its own. By then the prompt is rendered: token ids and processed
items. Nothing of a request is kept here after its last token, so any ingress replica can serve any request.
"""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader import get_model_cls
from vllm.model_executor.models.interfaces import supports_transcription
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.pooling_params import PoolingParams
from vllm.renderers.base import BaseRenderer
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from serve_app.config import EPDConfig
from serve_app.handoff import shaping
from serve_app.handoff.engine_input import from_engine_input
from serve_app.handoff.errors import Overloaded
from serve_app.handoff.types import Prompt, StageRequest, Version
from serve_app.ingress.adapters import Adapters
from serve_app.ingress.guard import GuardedInputProcessor, check_params
from serve_app.ingress.pipeline import Pipeline
from serve_app.ingress.request import Request, current
from serve_app.ingress.vllm_errors import fails_as_vllm, to_vllm_error
from serve_app.media.items import declared_fields
from serve_app.stage import Stage


def not_disaggregated(what: str) -> VLLMValidationError:
    return VLLMValidationError(f"{what} is not available here: this server is an ingress in front of several engines.")


def refusal_of(what: str) -> Any:
    """A method of vLLM's protocol that refuses."""

    async def refuse(self: EngineClient, *args: Any, **kwargs: Any) -> Any:
        raise not_disaggregated(what)

    return refuse


class EPDClient(EngineClient):
    """The pipeline of one ingress replica."""

    def __init__(
        self,
        config: EPDConfig,
        vllm_config: VllmConfig,
        renderer: BaseRenderer[Any],
        pipeline: Pipeline,
        version: Version,
        adapters: Adapters,
    ) -> None:
        """``version``: of this ingress replica. Engines of another refuse its requests."""
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer
        self.input_processor = GuardedInputProcessor(vllm_config, renderer)
        self.pipeline = pipeline
        self._declared = declared_fields(renderer)
        self._version = version
        self.adapters = adapters
        self._config = config
        self._tasks: tuple[str, ...] = ()

    def generate(
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
        ``session_id``: what the client calls the conversation, which stays where it is while the load there allows.
        ``trace_headers``, the client's, are not used: the request's own span continues them, see ``tracing.py``.
        Raises vLLM's own exceptions: ``VLLMClientError`` (4xx) or ``GracefulHTTPError`` with 503 or 504.
        """
        options = {
            "lora_request": lora_request,
            "priority": priority,
            "reasoning_ended": reasoning_ended,
            "reasoning_parser_kwargs": reasoning_parser_kwargs,
        }
        return self._answer(prompt, sampling_params, request_id, options, prompt_text, session_id)

    def encode(
        self,
        prompt: Any,
        pooling_params: PoolingParams,
        request_id: str,
        lora_request: Any = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        tokenization_kwargs: dict[str, Any] | None = None,
        reasoning_ended: bool | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """Encode the items and pool the prompt: one output, a vector or scores. As ``generate`` otherwise."""
        return self._answer(prompt, pooling_params, request_id, {"lora_request": lora_request, "priority": priority})

    async def _answer(
        self,
        prompt: Any,
        params: SamplingParams | PoolingParams,
        request_id: str,
        options: dict[str, Any],
        text: str | None = None,
        session: str | None = None,
    ) -> AsyncGenerator[Any, None]:
        request = current.get() or Request(request_id)
        request.session = session
        with fails_as_vllm(request):
            core, rendered = await self._admit(prompt, params, request_id, options, request)
            text = text if text is not None else extract_prompt_components(self.model_config, prompt)[0]
            call = StageRequest(request_id, rendered, core.params, options, self._version)
            async with self.pipeline.answering(call, core, text, request) as queue:
                finished = False
                while not finished:
                    output = queue.get_nowait() or await queue.get()
                    finished = output.finished
                    yield output

    async def _admit(
        self,
        prompt: Any,
        params: SamplingParams | PoolingParams,
        request_id: str,
        options: dict[str, Any],
        request: Request,
    ) -> tuple[EngineCoreRequest, Prompt]:
        """Refuse here what any stage would refuse, before a stage is called, and complete the parameters: for all stages,
        and once."""
        if isinstance(params, SamplingParams):
            check_params(params)
        tasks = await self.get_supported_tasks()
        core = self.input_processor.process_inputs(
            request_id, prompt, params, supported_tasks=tasks, lora_request=options["lora_request"]
        )
        self.input_processor.assign_request_id(core)
        if isinstance(params, SamplingParams):
            core.params.watermarking = params.watermarking  # the engine's to resolve
        rendered = request.sources.of(from_engine_input(prompt), self._declared)
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

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Raises ``ValueError`` where no engine takes adapters, and what ``Adapters.add`` raises."""
        if self.vllm_config.lora_config is None:
            raise ValueError(
                "This server takes no LoRA adapters: set `engine_args: {enable_lora: true}` and start it again."
            )
        await self.adapters.add(lora_request)
        return True

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """vLLM asks before it renders a prompt."""
        try:
            self.pipeline.admission.check_request()
        except Overloaded as error:
            raise to_vllm_error(error) from error

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """Speech is written down by decoder-only models: their prompt has the sound as an item. What a model pools its
        engine alone can tell."""
        if not self._tasks:
            if self._config.pools:
                self._tasks = await self.pipeline.stages[Stage.DECODE].call("tasks")
            elif supports_transcription(get_model_cls(self.model_config)):
                self._tasks = ("generate", "transcription")
            else:
                self._tasks = ("generate",)
        return self._tasks

    async def is_tracing_enabled(self) -> bool:
        return self._config.tracing.endpoint is not None

    async def is_sleeping(self) -> bool:
        return False

    is_paused = is_sleeping

    def shutdown(self, timeout: float | None = None) -> None:
        self.renderer.shutdown()

    async def _nothing_to_do(self, *args: Any, **kwargs: Any) -> None:
        """A request is aborted by closing its generator, and the engines look after themselves."""

    abort = check_health = do_log_stats = reset_mm_cache = notify_kv_transfer_request_rejected = _nothing_to_do

    start_profile = stop_profile = refusal_of("vLLM's own profile route")
    reset_encoder_cache = reset_prefix_cache = refusal_of("Resetting caches")
    sleep = wake_up = release_kv_cache_memory = refusal_of("Sleep mode")
    pause_generation = resume_generation = refusal_of("Pausing generation")
