"""What ``SharedFolderECConnector`` counts, on its way from the scheduler to Prometheus."""

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

BYTES = "bytes."
"""Prefix of the names that count bytes; ``bytes.written`` becomes ``epd:ec_bytes_total{direction="written"}``."""

FOLDER_BYTES = "folder_bytes"
"""The one name that is a level and no count."""


class SharedFolderStats(ECConnectorStats):
    """Counts of one interval, by name: an event of an item, ``bytes.<direction>`` or ``folder_bytes``."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def add(self, name: str, count: int = 1) -> None:
        self.data[name] = self.data.get(name, 0) + count

    def aggregate(self, other: ECConnectorStats) -> ECConnectorStats:
        for name, count in other.data.items():
            if name == FOLDER_BYTES:
                self.data[name] = count
            else:
                self.add(name, count)
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

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

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, count in transfer_stats_data.items():
            if name == FOLDER_BYTES:
                self._folder.labels(*labels).set(count)
            elif name.startswith(BYTES):
                self._bytes.labels(*labels, name.removeprefix(BYTES)).inc(count)
            else:
                self._items.labels(*labels, name).inc(count)
