"""The counts of ``SharedFolderECConnector``, from the scheduler to Prometheus."""

from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

BYTES = "bytes."
"""Prefix of the names that count bytes; ``bytes.written`` becomes ``epd:ec_bytes_total{direction="written"}``."""

FOLDER_BYTES = "folder_bytes"
"""The one name that is a gauge."""

LOAD_SECONDS = "load_seconds"
"""The one name with a list: the seconds of each read."""


class SharedFolderStats(ECConnectorStats):
    """Counts of one interval, by name: an event of an item, ``bytes.<direction>``, ``folder_bytes`` or ``load_seconds``."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def add(self, name: str, count: int = 1) -> None:
        self.data[name] = self.data.get(name, 0) + count

    def loaded_in(self, seconds: float) -> None:
        self.data.setdefault(LOAD_SECONDS, []).append(seconds)

    def aggregate(self, other: ECConnectorStats) -> ECConnectorStats:
        for name, count in other.data.items():
            if name == FOLDER_BYTES:
                self.data[name] = count
            elif name == LOAD_SECONDS:
                self.data[name] = self.data.get(name, []) + count
            else:
                self.add(name, count)
        return self

    def reduce(self) -> dict[str, int | float]:
        reads = self.data.get(LOAD_SECONDS)
        return self.data | ({LOAD_SECONDS: sum(reads)} if reads else {})

    def is_empty(self) -> bool:
        return not self.data


class SharedFolderPromMetrics(ECConnectorPromMetrics):
    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine: dict[int, Any]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine)
        self._items = metric_types[Counter](
            "epd:ec_items", "Items by what this engine did for their embeddings.", labelnames=[*labelnames, "event"]
        )
        self._bytes = metric_types[Counter](
            "epd:ec_bytes", "Bytes of embeddings by what became of them.", labelnames=[*labelnames, "direction"]
        )
        self._folder = metric_types[Gauge](
            "epd:ec_folder_bytes", "Bytes in the folder when this engine last counted.", labelnames=labelnames
        )
        self._loads = metric_types[Histogram](
            "epd:ec_load_seconds",
            "Seconds to read an embedding from the folder.",
            labelnames=labelnames,
            buckets=[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, count in transfer_stats_data.items():
            if name == FOLDER_BYTES:
                self._folder.labels(*labels).set(count)
            elif name == LOAD_SECONDS:
                for seconds in count:
                    self._loads.labels(*labels).observe(seconds)
            elif name.startswith(BYTES):
                self._bytes.labels(*labels, name.removeprefix(BYTES)).inc(count)
            else:
                self._items.labels(*labels, name).inc(count)
