"""The adapter around vLLM's ``AsyncLLM``: a request in, the outputs of the engine's core out.

``tests/contracts`` shows which of vLLM's internals that it uses a version after 0.32.0 has changed.
"""

import asyncio
import math
import multiprocessing
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerBase

from serve_app.handoff.engine_input import to_core_request
from serve_app.handoff.errors import BadRequest, EngineDead, HandoffLost, StageUnavailable
from serve_app.handoff.shaping import generates
from serve_app.handoff.types import StageRequest
from serve_app.observe.engine_metrics import PageLogger, tell_ray
from serve_app.stage import Stage
from serve_app.stages.forked_core import install_forked_core
from serve_app.stages.tap import Hear, install_tap
from serve_app.transfer.kv_layout import KVLayout, layout_of

USAGE = UsageContext.OPENAI_API_SERVER
"""It gives batches the sizes of `vllm serve`: an H100 gets 8,192 tokens and 1,024 sequences, not 2,048 and 128."""


def engine_config(args: AsyncEngineArgs) -> VllmConfig:
    return args.create_engine_config(USAGE)


class KVUse(StatLoggerBase):
    """The share of the KV cache in use that the scheduler of each engine core told last."""

    def __init__(self) -> None:
        self.by_core: dict[int, float] = {}

    def factory(self, vllm_config: Any, engine_index: int = 0) -> "KVUse":
        """vLLM calls it for each engine core."""
        return self

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.by_core[engine_idx] = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        pass


def failed(output: RequestOutput | PoolingRequestOutput) -> bool:
    """Whether the engine could not load what another had handed over."""
    if isinstance(output, PoolingRequestOutput):
        return output.error is not None
    return bool(output.outputs[0].finish_reason == "error")


class StageEngine:
    """One engine of one stage, in the process of its replica (the engine core is a child process)."""

    def __init__(
        self,
        stage: Stage,
        args: dict[str, Any],
        metrics_in_ray: bool = False,
        hang_s: float = math.inf,
        check: Callable[[VllmConfig], None] = lambda config: None,
    ) -> None:
        """``check`` raises to refuse a configuration before anything is loaded."""
        self._stage = stage
        self._hang_s = hang_s
        self._ping: asyncio.Task[bool] | None = None
        self._pinged = 0.0
        self._kv_use = KVUse()
        self._adapters: set[int] = set()
        install_forked_core()
        parsed = AsyncEngineArgs(**args)
        vllm_config = engine_config(parsed)
        check(vllm_config)
        self._llm = AsyncLLM.from_vllm_config(
            vllm_config,
            usage_context=USAGE,
            stat_loggers=[self._kv_use.factory, PageLogger],
            enable_log_requests=parsed.enable_log_requests,
            disable_log_stats=parsed.disable_log_stats,
        )
        self.tap = install_tap(self._llm.output_processor)
        envs.enable_envs_cache()  # vLLM asks for one with every token
        if metrics_in_ray and not parsed.disable_log_stats:
            tell_ray()
        freeze_gc_heap()  # as vLLM's server does: a look through all imports holds up tokens for half a second

    @property
    def renderer(self) -> Any:
        """vLLM's renderer of this engine's model."""
        return self._llm.renderer

    async def run(self, request: StageRequest, hear: Hear | None = None) -> RequestOutput | PoolingRequestOutput:
        """Run a request to its end; cancelling aborts it. Returns its last output, without text and logprobs, also after an
        ``abort``. ``hear`` gets the outputs of the engine's core, step by step.

        Raises ``BadRequest`` if the engine refuses the request, ``HandoffLost`` if it could not load what an earlier stage
        handed over, ``EngineDead``, and ``StageUnavailable`` for other failures.
        """
        llm = self._llm
        if llm.errored:
            raise EngineDead(self._stage, f"failed: {llm.dead_error}")
        samples = generates(request.params)
        if samples and llm.vllm_config.cache_config.kv_sharing_fast_prefill and request.params.prompt_logprobs:
            raise BadRequest("Logprobs of the prompt are wrong with `kv_sharing_fast_prefill`: this engine has none.")
        if llm.output_processor.has_request(request.request_id):  # vLLM would add it to that one's prompt
            raise StageUnavailable(self._stage, "works on the request already: Ray Serve sent it twice")
        if (adapter := request.options.get("lora_request")) is not None:
            await self.add_adapter(adapter)
        llm._run_output_handler()
        queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, request.request_id)
        try:
            core = to_core_request(request, llm.input_processor)
            if samples:
                request.params._validate_spec_decode(llm.vllm_config.speculative_config)
            with self.tap.hears(request.request_id, hear) if hear is not None else nullcontext():
                await llm._add_request(core, None, None, 0, queue)
                output = await queue.get()
        except VLLMClientError as error:
            raise BadRequest(str(error)) from error
        except EngineDeadError as error:
            raise EngineDead(self._stage, f"failed: {error}") from error
        except asyncio.CancelledError:
            await self.abort([request.request_id])
            raise
        except Exception as error:
            await self.abort([request.request_id])
            raise StageUnavailable(self._stage, f"failed: {error}") from error
        assert not isinstance(output, Exception)
        if failed(output):
            raise HandoffLost(self._stage, "could not load what the stage before handed over; send the request again")
        return output

    async def tasks(self) -> tuple[str, ...]:
        """What vLLM calls the tasks that this engine's model is for."""
        return tuple(await self._llm.get_supported_tasks())

    async def abort(self, request_ids: list[str]) -> None:
        """End requests: their ``run`` returns the output so far."""
        await self._llm.abort(request_ids, internal=True)

    async def add_adapter(self, adapter: LoRARequest) -> None:
        """Load a LoRA adapter, if it is not. An engine that found out in a step that it cannot would die of it. Raises
        ``EngineDead``, and ``StageUnavailable`` with the reason."""
        if adapter.lora_int_id in self._adapters:
            return
        try:
            await self._llm.add_lora(adapter)
        except EngineDeadError as error:
            raise EngineDead(self._stage, f"failed: {error}") from error
        except Exception as error:  # of a core's utility, which tells no types
            message = f"cannot load the adapter `{adapter.lora_name}` from {adapter.lora_path}: {error}"
            raise StageUnavailable(self._stage, message) from error
        self._adapters.add(adapter.lora_int_id)

    async def remove_adapter(self, number: int) -> None:
        """Forget an adapter that no request has named. ``number``: its ``lora_int_id``."""
        if number in self._adapters:
            self._adapters.discard(number)
            await self._llm.remove_lora(number)

    async def release(self, request_id: str, kv_transfer_params: dict[str, Any]) -> None:
        """Have a decode engine free the blocks that prefill holds for a request which will never be decoded."""
        await self._llm.notify_kv_transfer_request_rejected(request_id, kv_transfer_params)

    async def renew_leases(self, request_ids: list[str]) -> set[str]:
        """Renew the leases of KV blocks; returns the requests whose leases have ended."""
        return await self._ask_workers("renew_kv_leases", request_ids)

    async def overdue_pulls(self, seconds: float) -> set[str]:
        """Prefill's ids of the requests whose KV blocks this engine has been pulling for longer than this."""
        return await self._ask_workers("overdue_kv_pulls", seconds)

    async def _ask_workers(self, method: str, *args: Any) -> set[str]:
        """The requests that any worker names in answer to a call (``kv_lease.answer_replica``). The ``collective_rpc`` of
        ``AsyncLLM`` would answer for the first data-parallel engine only."""
        client: Any = self._llm.engine_core
        try:
            engines = await client.call_utility_all_async("collective_rpc", method, None, args, None)
        except EngineDeadError as error:
            raise EngineDead(self._stage, f"failed: {error}") from error
        return {request for workers in engines for named in workers for request in named}

    async def check_health(self) -> None:
        """Raises ``EngineDead``, or ``StageUnavailable`` if the engine hangs. Does not wait for the engine.

        A question is always under way that the core answers between two steps. A core that does not answer for
        ``timeouts.hang_s`` is killed here: its requests get an error, and the next check ends the replica.
        """
        if self._llm.errored:
            raise EngineDead(self._stage, f"failed: {self._llm.dead_error}")
        if self._ping is None or self._ping.done():
            self._pinged = time.monotonic()
            self._ping = asyncio.create_task(self._llm.is_sleeping())
            # A dead engine is told above; this keeps asyncio from logging what the question raises then.
            self._ping.add_done_callback(lambda ping: ping.cancelled() or ping.exception())
        elif time.monotonic() - self._pinged > self._hang_s:
            for core in multiprocessing.active_children():
                kill_process_tree(core.pid)
            raise StageUnavailable(self._stage, f"hangs: no answer for {self._hang_s:g} s (`timeouts.hang_s`)")

    @property
    def kv_use(self) -> float:
        """Share of the KV cache in use, including blocks that another engine has still to pull."""
        use = self._kv_use.by_core.values()
        return sum(use) / len(use) if use else 0.0

    @property
    def vllm_config(self) -> VllmConfig:
        return self._llm.vllm_config

    @property
    def kv_layout(self) -> KVLayout:
        return layout_of(self.vllm_config)

    @property
    def slots(self) -> int:
        """Sequences that run at a time."""
        config = self.vllm_config
        return int(config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size)

    @property
    def holds_blocks(self) -> bool:
        """Whether KV blocks are in use. A dead engine holds none."""
        return not self._llm.errored and self.kv_use > 0

    def metrics(self) -> str:
        """vLLM's metrics in Prometheus' text format."""
        return str(generate_latest(REGISTRY).decode())

    async def start_profile(self, **overrides: Any) -> None:
        """Raises ``BadRequest`` where no profiler is configured."""
        if self._llm.vllm_config.profiler_config.profiler is None:
            raise BadRequest(
                "No profiler is configured: set `engine_args: {profiler_config: {profiler: torch, torch_profiler_dir: …}}`."
            )
        await self._llm.start_profile(**overrides)

    async def stop_profile(self) -> None:
        await self._llm.stop_profile()

    def shutdown(self) -> None:
        """End the engine process and wait until it is gone."""
        self._llm.shutdown(timeout=5.0)
