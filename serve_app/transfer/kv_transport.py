"""vLLM's NIXL connectors, with leases (``kv_lease.py``) and a watch over how fast KV blocks move from prefill to decode.

UCX takes any transport that it finds. Where a card has no NVLink, or pods share no namespaces and have no RDMA, blocks go
over TCP at about 0.5 GB/s, which adds 0.2 s to the TTFT of a 100 MB prompt and fails nothing. So the worker that moves
blocks (decode's where it pulls, prefill's where it pushes) logs the first hand-off of each peer and warns once of slow ones,
and vLLM's statistics get a histogram of MB/s. NIXL does not tell which transport UCX took; UCX does, see ``SLOW``.

Engines of two versions do not connect, see ``register_kv_caches``. vLLM loads the classes by ``kv_connector_module_path``,
under the names that its own checks know.
"""

import dataclasses
import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector as nixl
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_scheduler import NixlPushConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlPromMetrics
from vllm.logger import init_logger
from vllm.v1.metrics.utils import create_metric_per_engine

from serve_app.handoff.types import VERSION_KEY
from serve_app.transfer.kv_lease import Leases, LeaseScheduler, PullWorker, PushWorker, answer_replica

logger = init_logger("vllm." + __name__)

FLOOR_BYTES_PER_S = 2e9
"""Slowest good pace between cards. PCIe and RDMA give 10e9 and more, TCP 0.5e9 (vllm-project/vllm#52607)."""

ENOUGH_BYTES = 64 << 20
"""Bytes to judge by when nothing else moves: a prompt or a few. Unfinished transfers are not counted."""

PLENTY_BYTES = 1 << 30
"""Bytes to judge by while others still move."""

SLOW = (
    "KV blocks moved at %.1f GB/s (%d MB): that is TCP's pace, not that of cards, and every first token waits for it. "
    "Cards of one node need NVLink, or `UCX_CUDA_IPC_ENABLE_GET_ZCOPY: 'on'` in `prefill.env` and `decode.env`, or "
    "`kv: {connector: NixlPushConnector}`; and each replica must see the other's card (one pod). Several nodes or pods need "
    "RDMA. Without either, `prefill: null` moves no blocks at all. `UCX_PROTO_INFO: '*remote memory*(multi)*'` in the `env` "
    "of both stages makes UCX print what it takes: `cuda_ipc`, `rc_mlx5`, `tcp`."
)


@dataclass
class Pace:
    """A lower bound of the speed of transfers that are looked at once per step.

    NIXL's clock of a transfer stops at the look that finds it done, so 1 ms counts as 20 ms where steps take that long. The
    transfer surely still moved at the look before. So time counts from its start to that look, once for all that moved then.
    """

    moved_bytes: int = 0
    busy_s: float = 0.0
    _looked: float = -math.inf
    _counted: float = -math.inf

    def look(self, now: float, sizes_bytes: list[int], seconds: list[float]) -> None:
        """``sizes_bytes``, ``seconds``: NIXL's, of the transfers that this look found done."""
        if seconds:
            began = max(now - max(seconds), self._counted)
            self.busy_s += max(self._looked - began, 0.0)
            self.moved_bytes += sum(sizes_bytes)
            self._counted = self._looked
        self._looked = now

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / self.busy_s if self.busy_s else math.inf

    def restart(self) -> None:
        self.moved_bytes, self.busy_s = 0, 0.0


class Watch:
    """Logs the transfers of one worker. ``warns``: whether slow ones are worth a warning."""

    def __init__(self, warns: bool) -> None:
        self._warns = warns
        self._pace = Pace()
        self._met: set[str] = set()

    def look(
        self, now: float, peers: set[str], sizes_bytes: list[int], seconds: list[float], moving: bool = False
    ) -> None:
        """``peers``: the engines whose hand-offs ended with these transfers. ``moving``: whether other transfers go on."""
        self._pace.look(now, sizes_bytes, seconds)
        if seconds and (new := peers - self._met):
            self._met |= new
            size, took = sum(sizes_bytes), max(max(seconds), 1e-6)
            logger.info(
                "First KV blocks moved, between here and %s: %.1f MB in %.3f s, %.0f MB/s with what connecting took",
                " and ".join(sorted(new)),
                size / 1e6,
                took,
                size / took / 1e6,
            )
            self._pace.restart()
        elif self._warns and self._pace.moved_bytes >= (PLENTY_BYTES if moving else ENOUGH_BYTES):
            self._judge()

    def _judge(self) -> None:
        if self._pace.bytes_per_s < FLOOR_BYTES_PER_S:
            self._warns = False
            logger.warning(SLOW, self._pace.bytes_per_s / 1e9, self._pace.moved_bytes // 1_000_000)
        self._pace.restart()


class PromMetrics(NixlPromMetrics):
    def __init__(
        self, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, Any]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        pace = self._histogram_cls(
            name="epd:kv_transfer_mb_per_s",
            documentation="MB per second of each transfer of KV blocks, by NIXL's clock: up to a step of the engine late.",
            buckets=[10, 25, 50, 100, 250, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000],
            labelnames=labelnames,
        )
        self._pace = create_metric_per_engine(pace, per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        sizes, seconds = transfer_stats_data["bytes_transferred"], transfer_stats_data["transfer_duration"]
        for size, took in zip(sizes, seconds, strict=True):
            self._pace[engine_idx].observe(size / max(took, 1e-6) / 1e6)


class _Connector(nixl.NixlBaseConnector):
    scheduler_class: type[Any]
    worker_class: type[Leases]

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        nixl.NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = self.scheduler_class(vllm_config, self.engine_id, kv_cache_config)
        elif role == KVConnectorRole.WORKER:
            answer_replica()
            self.connector_worker = self.worker_class(vllm_config, self.engine_id, kv_cache_config)
        # A slow transfer through the machine's memory has no setting that helps.
        self._watch = Watch(warns=self.kv_transfer_config.kv_buffer_device != "cpu")
        self._peers: set[str] = set()
        self._looked = 0.0

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """vLLM looks at the transfers here, once per step, and asks for their statistics next."""
        worker = self.connector_worker
        assert worker is not None
        sources = {request: meta.remote for request, meta in worker._recving_metadata.items()}
        self._looked = time.perf_counter()
        results = super().get_transfer_results(finished_req_ids)
        pulled = [sources.get(request) for request in results.finished_recving - results.failed_recving]
        self._peers = {f"engine {of.engine_id} at {of.host}" for of in pulled if of is not None}
        if (
            results.finished_sending
        ):  # NIXL does not tell to whom; where blocks are pulled, this engine has no transfers
            self._peers.add("decode")
        return results

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        stats = super().get_kv_connector_stats()
        worker: Any = self.connector_worker
        if worker is None:
            return stats
        data = stats.data if stats is not None else {}
        self._watch.look(
            self._looked,
            self._peers,
            data.get("bytes_transferred", []),
            data.get("transfer_duration", []),
            moving=bool(worker._recving_transfers or getattr(worker, "_sending_transfers", None)),
        )
        return stats

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Add our version to vLLM's hash of what two engines must agree on, which has only the model's name."""
        super().register_kv_caches(kv_caches)
        worker: Any = self.connector_worker
        version = self.kv_transfer_config.get_from_extra_config(VERSION_KEY, "")
        worker.compat_hash = hashlib.sha256(f"{worker.compat_hash} {version}".encode()).hexdigest()
        told = dataclasses.replace(worker.xfer_handshake_metadata, compatibility_hash=worker.compat_hash)
        worker.xfer_handshake_metadata = told

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> PromMetrics:
        return PromMetrics(*args)


class NixlPullConnector(_Connector, nixl.NixlPullConnector):
    scheduler_class, worker_class = LeaseScheduler, PullWorker


class NixlPushConnector(_Connector, nixl.NixlPushConnector):
    scheduler_class, worker_class = NixlPushConnectorScheduler, PushWorker


NixlConnector = NixlPullConnector
"""vLLM's older name of it, which its checks of context parallelism use."""
