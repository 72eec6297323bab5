"""An engine core that computes nothing, in the place of vLLM's in a replica: tokens come at a fixed pace, and all that is
around a core (``AsyncLLM``, its output handler and statistics, our code) is the real thing.

It leans on what ``AsyncLLM`` asks of ``AsyncMPClient`` in vLLM 0.32.0 (``vllm/v1/engine/core_client.py``);
``tests/unit/benchmarks/test_null_core.py`` says what broke.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats

from serve_app.stage import Stage

WORD = " a"
KV_BLOCKS = 4096
BLOCK = 16


@dataclass(slots=True)
class Running:
    request: EngineCoreRequest
    tokens: int
    """That its answer has."""
    queued: EngineCoreEvent = field(default_factory=lambda: EngineCoreEvent.new_event(EngineCoreEventType.QUEUED))
    made: int = 0


class NullCore(AsyncMPClient):
    """What ``EngineCoreClient.make_async_mp_client`` returns, without a process behind it.

    A step gives each running request its next token, ``step_s`` seconds after it began; a request that comes meanwhile joins
    the next one, as in an engine. Steps keep to their pace: if this process was busy when some were due, they come together.
    ``alone``: one request at a time, as where an engine has no use for a batch.
    """

    def __init__(
        self, stage: Stage, step_s: float, vllm_config: VllmConfig, renderer: Any, alone: bool = False
    ) -> None:
        self.stage = stage
        self.step_s = step_s
        self.slots = 1 if alone else vllm_config.scheduler_config.max_num_seqs
        self.steps = self.tokens = 0
        self.vllm_config = vllm_config
        vllm_config.cache_config.num_gpu_blocks = KV_BLOCKS
        self.resources = BackgroundResources(ctx=None)
        self.engine_ranks_managed = [0]
        self.core_engines = [b"\0\0"]
        self.core_engine = self.core_engines[0]
        self.client_index = 0
        self.engines_running = False
        self._kv_event_sources: dict[int, Any] = {}
        self._word = renderer.get_tokenizer().encode(WORD, add_special_tokens=False)[-1]
        self._running: dict[str, Running] = {}
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._stepping: asyncio.Task[None] | None = None
        renderer.start_mm_warmup_in_background()

    # ---- what AsyncLLM asks of a core

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.ensure_alive()
        if request.abort_immediately:
            return
        tokens = (request.sampling_params.max_tokens or 1) if self.stage is Stage.DECODE else 1
        self._running[request.request_id] = Running(request, tokens)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._steps())

    async def abort_requests_async(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def _call_utility_async(self, method: str, *args: Any, engine: Any) -> Any:
        self.ensure_alive()
        match method:
            case "get_supported_tasks":
                return ("generate",)
            case "collective_rpc":  # its one worker has nothing to tell
                return [()]
            case "is_sleeping" | "is_scheduler_paused":
                return False
        return None

    def ensure_alive(self) -> None:
        if self.resources.engine_dead:
            raise EngineDeadError()

    def shutdown(self, timeout: float | None = None) -> None:
        self.resources.engine_dead = True
        if self._stepping is not None:
            self._stepping.cancel()

    # ---- steps

    async def _steps(self) -> None:
        ends = time.monotonic()
        while self._running:
            batch = list(islice(self._running.values(), self.slots))
            scheduled = EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED)
            ends += self.step_s
            await asyncio.sleep(max(ends - time.monotonic(), 0))
            outputs = [self._next(each, scheduled) for each in batch if each.request.request_id in self._running]
            waiting = max(len(self._running) - self.slots, 0)
            stats = SchedulerStats(num_running_reqs=len(self._running) - waiting, num_waiting_reqs=waiting)
            self.steps += 1
            self.tokens += sum(len(output.new_token_ids) for output in outputs)
            self._outputs.put_nowait(EngineCoreOutputs(outputs=outputs, scheduler_stats=stats))

    def _next(self, running: Running, scheduled: EngineCoreEvent) -> EngineCoreOutput:
        """The next output of a request, which is not running any more when it was the last."""
        request, running.made = running.request, running.made + 1
        tokens = [] if self.stage is Stage.ENCODER else [self._word]
        output = EngineCoreOutput(request.request_id, tokens)
        if running.made == 1:
            prompt = len(request.prompt_token_ids or ())
            output.events = [running.queued, scheduled]
            output.prefill_stats = PrefillStats(num_prompt_tokens=prompt, num_computed_tokens=prompt)
        if running.made == running.tokens:
            del self._running[request.request_id]
            output.finish_reason = FinishReason.LENGTH
            output.kv_transfer_params = kv_params(request) if self.stage is Stage.PREFILL else None
            output.ec_transfer_params = ec_params(request) if self.stage is Stage.ENCODER else None
        return output


def kv_params(request: EngineCoreRequest) -> dict[str, Any]:
    """As NIXL's of a prefill, of blocks that are not there."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "null",
        "remote_block_ids": [list(range(len(request.prompt_token_ids or ()) // BLOCK + 1))],
        "remote_host": "127.0.0.1",
        "remote_port": 1,
    }


def ec_params(request: EngineCoreRequest) -> dict[str, Any]:
    return {item.identifier: {"item_indices": [0], "metadata": {}} for item in request.mm_features or ()}


def replace_cores(stage: Stage, step_s: float, item_s: float = 0.0) -> None:
    """From now on an ``AsyncLLM`` that is made in this process has a core that does nothing.

    ``step_s``: of a step of decode; ``item_s``: that an encoder has for an item, one after another. Prompts take no time.
    """
    took_s = {Stage.DECODE: step_s, Stage.ENCODER: item_s}.get(stage, 0.0)

    def make(vllm_config: VllmConfig, *args: Any, renderer: Any, **more: Any) -> NullCore:
        return NullCore(stage, took_s, vllm_config, renderer, alone=stage is Stage.ENCODER and item_s > 0)

    EngineCoreClient.make_async_mp_client = staticmethod(make)
