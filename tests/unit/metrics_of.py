"""Ray's metrics without Ray: which are made, and what they are told."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from ray.util import metrics

from serve_app.observe.ray_metrics import Teller

SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}


class TellsAtOnce(Teller):
    def start(self) -> None:
        self.tell()


class Told:
    """Metrics that are made while it watches, and their samples as ``(name, tags, value)``."""

    def __init__(self) -> None:
        self.made: list[metrics.Metric] = []
        self.samples: list[tuple[str, dict[str, str], float]] = []

    def sum(self, name: str, **tags: str) -> float:
        return sum(self.values(name, **tags))

    def values(self, name: str, **tags: str) -> list[float]:
        return [v for n, t, v in self.samples if n == name and t.items() >= tags.items()]

    def shown(self) -> set[str]:
        """Names on Ray's metrics port of what was made."""
        return {exported(metric) for metric in self.made}


def exported(metric: metrics.Metric) -> str:
    name: str = "ray_" + metric.info["name"]
    return name + "_total" if isinstance(metric, metrics.Counter) else name


def names_of(registry: CollectorRegistry, *more: str) -> dict[str, set[str]]:
    """Every metric of a registry as Ray's port names it once it has a sample, with its labels and those that are added."""
    names: dict[str, set[str]] = {}
    for collector in registry._collector_to_names:
        for family in getattr(collector, "describe", list)():
            labels = set(getattr(collector, "_labelnames", ())) | set(more)
            for suffix in SUFFIXES.get(family.type, []):
                name = "ray_" + re.sub(r"[^a-zA-Z0-9_]", "_", family.name) + suffix
                names[name] = labels | {"le"} if suffix == "_bucket" else labels
    return names


@contextmanager
def watched() -> Iterator[Told]:
    told = Told()
    init = metrics.Metric.__init__

    def made(self: metrics.Metric, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        told.made.append(self)

    def record(self: metrics.Metric, value: float, tags: dict[str, str] | None = None) -> None:
        final = self._get_final_tags(tags)
        self._validate_tags(final)
        told.samples.append((self.info["name"], final, value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Metric, "__init__", made)
        patch.setattr(metrics.Metric, "_record", record)
        patch.setattr(Teller, "start", lambda self: None)  # only tests tell
        yield told
