"""``SharedFolderECConnector``: embeddings move between engines as files in a folder that all of them share.

Loaded by vLLM through ``ec_connector_module_path``; runs on any device. What it adds to vLLM's ``ECExampleConnector``:

- a file is written beside its place and renamed into it, so no engine ever loads a torn one;
- an item without pixels whose file is gone fails its own request (retryable), where vLLM's engine would die trying to
  encode nothing;
- it counts, as ``epd:ec_items_total`` in the engine's metrics: items ``encoded`` by this engine, ``loaded`` from the
  folder, and ``missing`` when they were needed.

Contract with vLLM 0.32.0: ``tests/unit/test_ec_connector.py``.
"""

import os
import uuid
from typing import Any

import safetensors.torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats
from vllm.utils.gpu_sync_debug import gpu_sync_allowed


class SharedFolderStats(ECConnectorStats):
    """Counts of one interval, by name."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def add(self, name: str, count: int = 1) -> None:
        self.data[name] = self.data.get(name, 0) + count

    def aggregate(self, other: ECConnectorStats) -> ECConnectorStats:
        for name, count in other.data.items():
            self.add(name, count)
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class SharedFolderPromMetrics(ECConnectorPromMetrics):
    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine: dict[int, Any]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine)
        self._items = self._counter_cls(
            "epd:ec_items", "Items by what this engine did for their embeddings.", labelnames=[*labelnames, "event"]
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for event, count in transfer_stats_data.items():
            self._items.labels(*self.per_engine_labelvalues[engine_idx], event).inc(count)


class SharedFolderECConnector(ECExampleConnector):
    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self._stats = SharedFolderStats()
        self._lost: set[str] = set()

    # ---- worker side

    def save_caches(self, encoder_cache: dict[str, Any], mm_hash: str, **kwargs: Any) -> None:
        if not self.is_producer:
            return
        path = self._generate_filename_debug(mm_hash)
        temporary = f"{path}.{os.getpid()}.{uuid.uuid4().hex[:6]}"
        with gpu_sync_allowed():
            tensors = {"ec_cache": encoder_cache[mm_hash].detach().cpu().contiguous()}
        safetensors.torch.save_file(tensors, temporary)
        os.replace(temporary, path)

    # ---- scheduler side

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """False, and the request fails, when an item that is still to be read has neither file nor pixels."""
        for feature in request.mm_features:
            end = feature.mm_position.offset + feature.mm_position.length
            if end <= num_computed_tokens or self._can_encode(feature) or self.has_cache_item(feature.identifier):
                continue
            self._lost.add(request.request_id)
            self._stats.add("missing")
            return False
        return True

    def take_unavailable_requests(self) -> set[str]:
        lost, self._lost = self._lost, set()
        return lost

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        super().update_state_after_alloc(request, index)
        loads = request.mm_features[index].identifier in self._mm_datas_need_loads
        self._stats.add("loaded" if loads else "encoded")

    def get_ec_connector_stats(self) -> SharedFolderStats | None:
        if self.role is not ECConnectorRole.SCHEDULER or self._stats.is_empty():
            return None
        stats, self._stats = self._stats, SharedFolderStats()
        return stats

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> SharedFolderStats:
        return SharedFolderStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> Any:
        return SharedFolderPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- both

    def has_cache_item(self, identifier: str) -> bool:
        return os.path.exists(self._path(identifier))

    def _path(self, mm_hash: str) -> str:
        """The file of an item, without making its folder as vLLM's connector does on every look-up."""
        return os.path.join(self._generate_foldername_debug(mm_hash, create_folder=False), "encoder_cache.safetensors")

    def _can_encode(self, feature: Any) -> bool:
        """Whether the item came with what an encoder reads, and not only with the fields that positions need."""
        if feature.data is None:
            return False
        positional = self._metadata_resolver.fields_for(feature.modality)
        return any(key not in positional and not field.field.keep_on_cpu for key, field in feature.data.items())
