"""vLLM's ``AsyncLLM``, with its output handler and ``OutputProcessor``, around a core that a test plays."""

import asyncio
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor


class FakeCore:
    """``come``: the requests that it got. ``fails``: what it raises for each."""

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.come: asyncio.Queue[EngineCoreRequest] = asyncio.Queue()
        self.aborted: list[str] = []
        self.fails: Exception | None = None
        self._steps: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if self.fails is not None:
            raise self.fails
        self.come.put_nowait(request)

    async def abort_requests_async(self, request_ids: Iterable[str]) -> None:
        self.aborted += request_ids

    async def get_output_async(self) -> EngineCoreOutputs:
        step = await self._steps.get()
        if isinstance(step, Exception):
            raise step
        return step

    def step(self, *outputs: EngineCoreOutput) -> None:
        self._steps.put_nowait(EngineCoreOutputs(outputs=list(outputs)))

    def die(self, error: Exception) -> None:
        self.resources.engine_dead = True
        self._steps.put_nowait(error)

    def shutdown(self, timeout: float | None = None) -> None: ...


class FakeLLM(AsyncLLM):
    """``recorded``: the statistics of each step. ``watermarks``: whether its engine marks a request."""

    def __init__(
        self, log_stats: bool = False, watermarks: Callable[[Any], bool] = lambda params: False, **config: Any
    ) -> None:
        cache = SimpleNamespace(kv_sharing_fast_prefill=False)
        self.vllm_config = SimpleNamespace(
            cache_config=cache,
            speculative_config=None,
            watermark_config=None,
            _check_supports_watermarking=watermarks,
        )
        self.vllm_config.__dict__.update(config)
        self.scheduler_config = SimpleNamespace(max_num_queued_reqs=None, max_num_queued_tokens=None)
        self.renderer = SimpleNamespace(mm_processor_cache=None, stat_mm_cache=lambda: None, shutdown=lambda: None)
        self.input_processor = object.__new__(InputProcessor)
        self.input_processor.vllm_config, self.input_processor.lora_config = self.vllm_config, None
        self.engine_core = self.core = FakeCore()
        self.output_processor = OutputProcessor(None, log_stats=log_stats)
        self.output_handler = self.admission_stats = None
        self.log_stats, self.log_requests = log_stats, False
        self.recorded: list[Any] = []
        self.adapters: list[str] = []
        self.logger_manager = SimpleNamespace(record=lambda iteration_stats, **_: self.recorded.append(iteration_stats))

    def __del__(self) -> None: ...

    async def add_lora(self, lora_request: Any) -> bool:
        self.adapters.append(lora_request.lora_name)
        if "broken" in lora_request.lora_path:
            raise RuntimeError("no adapter_config.json")
        return True

    async def come(self) -> EngineCoreRequest:
        """The next request that reaches the core."""
        return await asyncio.wait_for(self.core.come.get(), 5)
