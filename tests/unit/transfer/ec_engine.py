"""An engine without a model: vLLM's own scheduler and our connector's two halves around it, on the CPU, in microseconds.

What stands for the model runner does what those of vLLM 0.32.0 do with embeddings, and dies of what they die of: V1
(``v1/worker/gpu_model_runner.py``, on the CPU) or V2 (``v1/worker/gpu/model_runner.py``, on cards), whose own
``ActiveECConnector`` is around our connector here too. The token that it samples is a sum of the embeddings in the prompt: a
wrong one shows.
"""

import copy
import pickle
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ECConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu import ec_connector as runner_v2

from serve_app.config import EPDConfig
from serve_app.config.advanced import AdvancedEC
from serve_app.launch.connectors import ec_transfer_config
from serve_app.stage import Stage
from serve_app.transfer.ec_metrics import LOAD_SECONDS

BLOCK = 16
LENGTH = 4
"""Placeholder tokens, and rows of the embedding, of an item."""

GRID = {"image_grid_thw": True}
PIXELS = {"pixel_values": False, **GRID}


class EngineDied(Exception):
    """What the real model runner raises takes the whole engine with it."""


def feature(
    name: str, fields: dict[str, bool] | None = None, offset: int = 0, length: int = LENGTH
) -> MultiModalFeatureSpec:
    """An item with fields (name → kept on the CPU), or without data as after a cache hit."""
    data = None
    if fields is not None:
        data = MultiModalKwargsItem(
            {
                key: MultiModalFieldElem(data=torch.ones(3), field=MultiModalBatchedField(keep_on_cpu=kept))
                for key, kept in fields.items()
            }
        )
    return MultiModalFeatureSpec(data, "image", name, PlaceholderRange(offset, length))


def embedding(name: str, width: int, length: int = LENGTH) -> torch.Tensor:
    """What the encoder makes of an item: of its content, so the same each time."""
    return torch.full((length, width), float(sum(map(ord, name))))


class Engine:
    """One stage. ``ahead``: with vLLM's asynchronous scheduler, one step scheduled before the last one's output is
    seen. ``v2``: with its V2 model runner. ``prefixes``: with a prefix cache. ``apart``: with the worker in another
    process, as far as it can see."""

    def __init__(
        self,
        vllm_config: Any,
        folder: Path,
        stage: Stage,
        *,
        ahead: bool = False,
        v2: bool = False,
        apart: bool = False,
        blocks: int = 100,
        cache: int | None = None,
        prefixes: bool = False,
        **ec: Any,
    ) -> None:
        settings = self._settings(stage, {"storage_path": folder, **ec})
        config = copy.copy(vllm_config)
        config.instance_id = uuid.uuid4().hex
        config.ec_transfer_config = ECTransferConfig(**settings)
        config.cache_config = copy.copy(config.cache_config)
        config.cache_config.num_gpu_blocks = blocks
        config.cache_config.enable_prefix_caching = prefixes
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256) if prefixes else None
        if stage is Stage.ENCODER:  # as AsyncEngineArgs does it
            config.model_config = copy.copy(config.model_config)
            config.model_config.multimodal_config = copy.copy(config.model_config.multimodal_config)
            config.model_config.multimodal_config.mm_encoder_only = True
        self.width = config.model_config.get_inputs_embeds_size()
        self.worker = self._make_worker(config)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler = (AsyncScheduler if ahead else Scheduler)(
            config,
            KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        if cache is not None:
            manager = self.scheduler.encoder_cache_manager
            manager.cache_size = manager.num_free_slots = manager.num_freeable_slots = cache
        self.connector: Any = self.scheduler.ec_connector
        self.encoder_cache: dict[str, torch.Tensor] = {}
        self.requests: dict[str, Request] = {}
        self.computed: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.replies: dict[str, dict[str, Any] | None] = {}
        self.encodings: list[str] = []
        self.counts: dict[str, int] = {}
        self._ahead, self._apart = ahead, apart
        with mock.patch.object(runner_v2, "get_ec_transfer", return_value=self.worker):
            self._v2 = runner_v2.ActiveECConnector(config, self.encoder_cache) if v2 else None
        self._in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()

    def _settings(self, stage: Stage, ec: dict[str, Any]) -> dict[str, Any]:
        advanced = {key: ec.pop(key) for key in AdvancedEC.model_fields.keys() & ec.keys()}
        settings = ec_transfer_config(EPDConfig(ec=ec, advanced={"ec": advanced}), stage)
        assert settings is not None
        return settings

    def _make_worker(self, config: Any) -> Any:
        return ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)

    def close(self) -> None:
        """In the order of ``EngineCore.shutdown``."""
        self.worker.shutdown()
        self.connector.shutdown()

    def add(
        self,
        request_id: str,
        *features: MultiModalFeatureSpec,
        text: int = 2,
        max_tokens: int = 1,
        ec_params: Any = None,
    ) -> Request:
        """A request for the items, one after another, and some text after them."""
        items, offset = [], 0
        for item in features:
            length = item.mm_position.length
            items.append(
                MultiModalFeatureSpec(item.data, item.modality, item.identifier, PlaceholderRange(offset, length))
            )
            offset += length
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args={"ec_transfer_params": ec_params})
        params.update_from_generation_config({}, eos_token_id=0)
        request = Request(request_id, [7] * (offset + text), params, None, mm_features=items, block_hasher=self._hasher)
        self.requests[request_id] = request
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        """Schedule, run, and hand out; one step later if the scheduler runs ahead."""
        scheduled = self.scheduler.schedule()
        self._in_flight.append((scheduled, self._execute(scheduled)))
        if len(self._in_flight) > self._ahead:
            self._update()

    def run(self, steps: int = 50) -> None:
        """Until no request is left."""
        for _ in range(steps):
            if not self.scheduler.has_unfinished_requests() and not self._in_flight:
                return
            self.step()
            if not self.scheduler.has_unfinished_requests():
                while self._in_flight:
                    self._update()
        raise AssertionError(f"still there after {steps} steps: {list(self.scheduler.requests)}")

    def ask(self, request_id: str, *features: MultiModalFeatureSpec, **options: Any) -> str:
        """Run a request alone; its finish reason."""
        self.add(request_id, *features, **options)
        self.run()
        return self.reasons[request_id]

    def answer(self, *names: str) -> int:
        """The token after these items, if every embedding was right."""
        return sum(int(embedding(name, 1)[0, 0]) for name in names) % 1000

    def _update(self) -> None:
        for outputs in self.scheduler.update_from_output(*self._in_flight.popleft()).values():
            for output in outputs.outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    self.reasons[output.request_id] = str(output.finish_reason)
                    self.replies[output.request_id] = output.ec_transfer_params
            stats = outputs.scheduler_stats
            for name, count in ((stats and stats.ec_connector_stats) or {}).items():
                if name != LOAD_SECONDS:
                    self.counts[name] = self.counts.get(name, 0) + count

    def _execute(self, scheduled: Any) -> ModelRunnerOutput:
        """``GPUModelRunner.execute_model``, ``MMEncoderModelRunner.execute_model``."""
        for name in scheduled.free_encoder_mm_hashes:
            self.encoder_cache.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            self.computed[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        self.computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        if self._apart:
            scheduled.ec_connector_metadata = pickle.loads(pickle.dumps(scheduled.ec_connector_metadata))
        if not scheduled.num_scheduled_tokens and self._v2 is not None:
            return self._v2.no_forward(scheduled)
        if not scheduled.num_scheduled_tokens and not self.worker.is_producer:
            return ModelRunnerOutput([], {})
        with self._around_encoder(scheduled) as done:
            self._encode(scheduled)
        ids = list(scheduled.num_scheduled_tokens)
        sampled = [] if self.worker.is_producer else [self._sample(id, scheduled) for id in ids]
        return ModelRunnerOutput(ids, {id: index for index, id in enumerate(ids)}, sampled, ec_connector_output=done)

    def _around_encoder(self, scheduled: Any) -> AbstractContextManager[ECConnectorOutput | None]:
        return self._v1_output(scheduled) if self._v2 is None else self._v2.maybe_get_output(scheduled)

    @contextmanager
    def _v1_output(self, scheduled: Any) -> Iterator[ECConnectorOutput]:
        """``ECConnectorModelRunnerMixin``."""
        output = ECConnectorOutput()
        self.worker.bind_connector_metadata(scheduled.ec_connector_metadata)
        if self.worker.is_producer:
            self.worker.start_save_caches(encoder_cache=self.encoder_cache)
        if self.worker.is_consumer:
            self.worker.start_load_caches(self.encoder_cache)
        yield output
        self.worker.get_finished(scheduled.finished_req_ids)
        output.ec_connector_worker_meta = self.worker.build_connector_worker_meta()
        self.worker.clear_connector_metadata()

    def _encode(self, scheduled: Any) -> None:
        for request_id, indices in scheduled.scheduled_encoder_inputs.items():
            for index in indices:
                item = self.requests[request_id].mm_features[index]
                if item.data is None or (self._v2 is not None and item.identifier in self.encoder_cache):
                    continue
                if "pixel_values" not in item.data:
                    raise EngineDied(f"nothing to encode {item.identifier} from")
                self.encodings.append(item.identifier)
                self.encoder_cache[item.identifier] = embedding(item.identifier, self.width, item.mm_position.length)
                if self._v2 is None:  # it looks for what is new in the cache by itself
                    self.worker.save_caches(self.encoder_cache, item.identifier)

    def _sample(self, request_id: str, scheduled: Any) -> list[int]:
        request = self.requests[request_id]
        start = self.computed[request_id]
        end = start + scheduled.num_scheduled_tokens[request_id]
        total = 0
        for item in request.mm_features:
            first, last = item.mm_position.offset, item.mm_position.offset + item.mm_position.length
            if first < end and last > start:
                if item.identifier not in self.encoder_cache:
                    raise EngineDied(f"Encoder cache miss for {item.identifier}")
                tensor = self.encoder_cache[item.identifier]
                if tensor.shape != (item.mm_position.length, self.width):
                    raise EngineDied(f"{item.identifier} is {tuple(tensor.shape)}")
                total += int(tensor[0, 0])
        if end < request.num_prompt_tokens:
            return []
        return [total % 1000]
