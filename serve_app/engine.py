"""The adapter around vLLM's ``AsyncLLM``: tokens in, tokens out.

What leans on vLLM's internals is here, in ``client.py``, ``guard.py``, ``outputs.py``, ``openai_app.py`` and the modules
whose names begin with ``ec_`` and ``media``; ``tests/unit/test_contracts*.py`` say what broke when vLLM 0.32.0 is replaced.
"""

import asyncio
import math
import multiprocessing
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from serve_app.config import Stage
from serve_app.engine_metrics import STAT_LOGGERS
from serve_app.errors import BadRequest, ConfigError, EngineDead, HandoffLost, StageError, StageUnavailable
from serve_app.handoff import ANY, Chunk, Item, Prompt, Source, StageRequest, Version
from serve_app.kv_layout import KVLayout, layout_of


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


def to_engine_input(prompt: Prompt) -> Any:
    """vLLM's engine input of a prompt. Keeps ``is_embed``, which vLLM's HTTP ``GenerateRequest`` drops."""
    if not prompt.items:
        return tokens_input(prompt.token_ids, cache_salt=prompt.cache_salt)
    kwargs: dict[str, list[Any]] = {}
    hashes: dict[str, list[str]] = {}
    ranges: dict[str, list[PlaceholderRange]] = {}
    for item in prompt.items:
        kwargs.setdefault(item.modality, []).append(item.data)
        hashes.setdefault(item.modality, []).append(item.hash)
        ranges.setdefault(item.modality, []).append(PlaceholderRange(item.offset, item.length, item.is_embed))
    return mm_input(prompt.token_ids, MultiModalKwargsItems(kwargs), hashes, ranges, cache_salt=prompt.cache_salt)


class SourcedItem(MultiModalKwargsItem):
    """A processed item that knows the media it came from: so a ``Source`` gets through vLLM's app to our ``generate``."""

    def __init__(self, data: MultiModalKwargsItem, source: Source) -> None:
        super().__init__(data)
        self.source = source


def from_engine_input(engine_input: Any) -> Prompt:
    """The prompt that vLLM's renderer made, items in prompt order.

    Raises ``BadRequest`` for inputs that no stage can hand on.
    """
    if engine_input["type"] == "token":
        return Prompt(list(engine_input["prompt_token_ids"]), cache_salt=engine_input.get("cache_salt"))
    if engine_input["type"] != "multimodal" or "encoder_prompt_token_ids" in engine_input:
        raise BadRequest(
            f"Prompts of type {engine_input['type']!r} cannot be served disaggregated: only token and multimodal prompts of "
            "decoder-only models can be handed from stage to stage."
        )

    def item(modality: str, item_hash: str, where: PlaceholderRange, data: Any) -> Item:
        source = data.source if isinstance(data, SourcedItem) else None
        plain = MultiModalKwargsItem(data.data) if source is not None else data
        return Item(modality, item_hash, where.offset, where.length, where.is_embed, plain, source)

    items = [
        item(modality, item_hash, where, data)
        for modality, hashes in engine_input["mm_hashes"].items()
        for item_hash, where, data in zip(
            hashes, engine_input["mm_placeholders"][modality], engine_input["mm_kwargs"][modality], strict=True
        )
    ]
    return Prompt(
        list(engine_input["prompt_token_ids"]),
        tuple(sorted(items, key=lambda item: item.offset)),
        engine_input.get("cache_salt"),
    )


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
        hang_timeout_s: float = math.inf,
        check: Callable[[VllmConfig], None] = lambda config: None,
    ) -> None:
        """``check`` refuses a configuration, by raising, before anything is loaded."""
        self._stage = stage
        self._hang_timeout_s = hang_timeout_s
        self._ping: asyncio.Task[bool] | None = None
        self._pinged = 0.0
        self._kv_use = KVUse()
        parsed = AsyncEngineArgs(**args)
        to_ray = STAT_LOGGERS if metrics_in_ray and not parsed.disable_log_stats else ()
        vllm_config = engine_config(parsed)
        check(vllm_config)
        self._llm = AsyncLLM.from_vllm_config(
            vllm_config,
            usage_context=USAGE,
            stat_loggers=[self._kv_use.factory, *to_ray],
            enable_log_requests=parsed.enable_log_requests,
            disable_log_stats=parsed.disable_log_stats,
        )

    @property
    def renderer(self) -> Any:
        """vLLM's renderer of this engine's model."""
        return self._llm.renderer

    async def generate(self, request: StageRequest) -> AsyncGenerator[RequestOutput]:
        """Run a request; closing the iterator aborts it.

        Raises ``BadRequest`` when the engine refuses it, ``EngineDead`` or, where it is full, ``StageUnavailable``, and
        ``HandoffLost`` when what an earlier stage handed over could not be loaded: ``AsyncLLM`` does not raise then.
        """
        stream = self._llm.generate(
            to_engine_input(request.prompt), request.params, request.request_id, **request.options
        )
        try:
            async with aclosing(stream):
                async for output in stream:
                    if any(choice.finish_reason == "error" for choice in output.outputs):
                        raise HandoffLost(
                            self._stage, "could not load what the stage before handed over; send the request again"
                        )
                    yield output
        except VLLMClientError as error:
            raise BadRequest(str(error)) from error
        except EngineDeadError as error:
            raise EngineDead(self._stage, f"failed: {error}") from error
        except (EngineGenerateError, GracefulHTTPError) as error:
            raise StageUnavailable(self._stage, f"failed: {error}") from error

    async def final(self, request: StageRequest) -> RequestOutput:
        """The last output of a request that is not streamed."""
        last = None
        async with aclosing(self.generate(request)) as stream:
            async for output in stream:
                last = output
        if last is None:
            raise StageUnavailable(self._stage, "ended without an output")
        return last

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

        A question that its core answers between two steps is always under way. A core that does not for ``hang_timeout_s``
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
        elif time.monotonic() - self._pinged > self._hang_timeout_s:
            for core in multiprocessing.active_children():
                kill_process_tree(core.pid)
            raise StageUnavailable(self._stage, f"hangs: no answer for {self._hang_timeout_s:g} s (`hang_timeout_s`)")

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


ENCODE_PARAMS = SamplingParams(max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
"""An encoder-only engine emits no token: the request ends when its items are encoded."""


def queue_s(output: RequestOutput) -> float:
    """Seconds that the request of an output waited in its engine's queue."""
    stats = output.metrics
    return max(stats.scheduled_ts - stats.queued_ts, 0.0) if stats is not None and stats.scheduled_ts else 0.0


async def coalesced(outputs: AsyncGenerator[RequestOutput], interval_s: float) -> AsyncGenerator[RequestOutput]:
    """Outputs with new tokens only, at most one per interval: the first and the last at once, in between what has come.

    A message from replica to ingress to proxy to client costs more than making a token does. No timer: what is held goes on
    with the first output after the interval, or before the engine's failure.
    """
    held, due = None, -math.inf
    async with aclosing(outputs):
        try:
            async for output in outputs:
                if held is None:
                    held = output
                else:
                    held.add(output, aggregate=True)
                now = time.monotonic()
                if held.finished or now >= due:
                    yield held
                    held, due = None, now + interval_s
        except StageError:
            if held is not None:
                yield held
            raise


def to_chunk(
    output: RequestOutput, ran_s: float | None = None, kv_s: float | None = None, version: Version = ANY
) -> Chunk:
    """The only choice of an output, without the prompt that every ``RequestOutput`` repeats."""
    (choice,) = output.outputs
    return Chunk(
        text=choice.text,
        token_ids=list(choice.token_ids),
        logprobs=choice.logprobs,
        cumulative_logprob=choice.cumulative_logprob,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        num_cached_tokens=output.num_cached_tokens,
        prompt_logprobs=output.prompt_logprobs,
        ran_s=ran_s,
        kv_s=kv_s,
        version=version,
    )
