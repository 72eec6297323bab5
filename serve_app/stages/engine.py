"""The adapter around vLLM's ``AsyncLLM``: a request in, the outputs of the engine's core out.

What leans on vLLM's internals is here and in the rooms that ``tests/repo/test_rooms.py`` names; ``tests/contracts`` says
what broke when vLLM 0.32.0 is replaced.
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
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerBase

from serve_app.handoff.engine_input import to_core_request
from serve_app.handoff.errors import BadRequest, ConfigError, EngineDead, HandoffLost, StageUnavailable
from serve_app.handoff.types import StageRequest
from serve_app.observe.engine_metrics import PageLogger, tell_ray
from serve_app.stage import Stage
from serve_app.stages.tap import Hear, install_tap
from serve_app.transfer.kv_layout import KVLayout, layout_of


def check_engine_args(args: dict[str, Any], where: str) -> None:
    """Refuse names that vLLM does not know, before anything is started."""
    known = set(AsyncEngineArgs.__dataclass_fields__)
    for key in args:
        if key not in known:
            raise ConfigError(
                f"`{where}.{key}` is not an engine argument of this vLLM (`vllm serve --help` lists them)"
            )


USAGE = UsageContext.OPENAI_API_SERVER
"""It picks vLLM's table of batch sizes: that of `vllm serve`. By vLLM's default for this class an H100 gets 2,048 tokens and
128 sequences in place of 8,192 and 1,024."""


def engine_config(args: AsyncEngineArgs) -> VllmConfig:
    return args.create_engine_config(USAGE)


class KVUse(StatLoggerBase):
    """The share of the KV cache that is in use, per engine core: the latest that its scheduler told."""

    def __init__(self) -> None:
        self.by_core: dict[int, float] = {}

    def factory(self, vllm_config: Any, engine_index: int = 0) -> "KVUse":
        """As vLLM asks for a logger of each engine core."""
        return self

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.by_core[engine_idx] = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        pass


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
        """``check`` refuses a configuration, by raising, before anything is loaded."""
        self._stage = stage
        self._hang_s = hang_s
        self._ping: asyncio.Task[bool] | None = None
        self._pinged = 0.0
        self._kv_use = KVUse()
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
        # As vLLM's own server does. The collector would look through all that has been imported: half a second in which no
        # token goes on.
        freeze_gc_heap()

    @property
    def renderer(self) -> Any:
        """vLLM's renderer of this engine's model."""
        return self._llm.renderer

    async def run(self, request: StageRequest, hear: Hear | None = None) -> RequestOutput:
        """Run a request to its end; cancelling aborts it. Returns its last output: no text, and no logprobs; of a request
        that was aborted by its id, what it had by then. ``hear`` gets what the engine's core puts out, step by step.

        Raises ``BadRequest`` when the engine refuses it, ``EngineDead`` or, where it is full, ``StageUnavailable``, and
        ``HandoffLost`` when what an earlier stage handed over could not be loaded.
        """
        llm = self._llm
        if llm.errored:
            raise EngineDead(self._stage, f"failed: {llm.dead_error}")
        if llm.vllm_config.cache_config.kv_sharing_fast_prefill and request.params.prompt_logprobs:
            raise BadRequest("Logprobs of the prompt are wrong with `kv_sharing_fast_prefill`: this engine has none.")
        if llm.output_processor.has_request(request.request_id):  # vLLM would take it for more of that one's prompt
            raise StageUnavailable(self._stage, "works on the request already: Ray Serve sent it twice")
        llm._run_output_handler()
        queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, request.request_id)
        try:
            core = to_core_request(request, llm.input_processor)
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
        assert isinstance(output, RequestOutput)
        if output.outputs[0].finish_reason == "error":
            raise HandoffLost(self._stage, "could not load what the stage before handed over; send the request again")
        return output

    async def abort(self, request_ids: list[str]) -> None:
        """End requests: ``run`` returns what they had."""
        await self._llm.abort(request_ids, internal=True)

    async def release(self, request_id: str, kv_transfer_params: dict[str, Any]) -> None:
        """Free the blocks that prefill holds for a request which will never be decoded (called on a decode engine)."""
        await self._llm.notify_kv_transfer_request_rejected(request_id, kv_transfer_params)

    async def renew_leases(self, request_ids: list[str]) -> set[str]:
        """Begin the leases of KV blocks anew; returns the requests whose leases have ended."""
        return await self._ask_workers("renew_kv_leases", request_ids)

    async def overdue_pulls(self, seconds: float) -> set[str]:
        """Prefill's ids of the requests whose KV blocks have been under way to here for longer than this."""
        return await self._ask_workers("overdue_kv_pulls", seconds)

    async def _ask_workers(self, method: str, *args: Any) -> set[str]:
        """Call a method of all workers (``kv_lease.answer_replica``); returns the requests that any of them names. By vLLM's
        own ``collective_rpc`` one hears of the first data-parallel engine only."""
        client: Any = self._llm.engine_core
        try:
            engines = await client.call_utility_all_async("collective_rpc", method, None, args, None)
        except EngineDeadError as error:
            raise EngineDead(self._stage, f"failed: {error}") from error
        return {request for workers in engines for named in workers for request in named}

    async def check_health(self) -> None:
        """Raises when the engine is dead or hangs, so that Serve replaces the replica. Does not wait for the engine.

        A question that its core answers between two steps is always under way. A core that does not for ``timeouts.hang_s``
        is killed: what waits for it gets an error, and Serve, which kills the replica, would leave a process that hangs.
        """
        await self._llm.check_health()
        if self._llm.errored:
            raise self._llm.dead_error
        if self._ping is None or self._ping.done():
            self._pinged = time.monotonic()
            self._ping = asyncio.create_task(self._llm.is_sleeping())
            # What it raises when the engine dies is told above.
            self._ping.add_done_callback(lambda ping: ping.cancelled() or ping.exception())
        elif time.monotonic() - self._pinged > self._hang_s:
            for core in multiprocessing.active_children():
                kill_process_tree(core.pid)
            raise StageUnavailable(self._stage, f"hangs: no answer for {self._hang_s:g} s (`timeouts.hang_s`)")

    @property
    def kv_use(self) -> float:
        """Share of the KV cache that requests hold, those included whose blocks another engine has still to pull."""
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
        config = self._llm.vllm_config
        return int(config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size)

    @property
    def holds_blocks(self) -> bool:
        """Whether there are KV blocks that somebody needs. A dead engine holds none."""
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
