"""Ray's metrics without Ray: which are made, and what they are told."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ray.util import metrics

from serve_app.gauges import Gauges


class Told:
    """Metrics that are made while it watches, and their samples as ``(name, tags, value)``."""

    def __init__(self) -> None:
        self.made: list[metrics.Metric] = []
        self.samples: list[tuple[str, dict[str, str], float]] = []

    def sum(self, name: str, **tags: str) -> float:
        return sum(v for n, t, v in self.samples if n == name and t.items() >= tags.items())

    def values(self, name: str, **tags: str) -> list[float]:
        return [v for n, t, v in self.samples if n == name and t.items() >= tags.items()]

    def exported(self) -> dict[str, set[str]]:
        """Names on Ray's metrics port of what was made, with their labels."""
        return {name: set(metric.info["tag_keys"]) for metric in self.made for name in exported(metric)}


def exported(metric: metrics.Metric) -> list[str]:
    name = "ray_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric.info["name"])
    match metric:
        case metrics.Counter():
            return [name.removesuffix("_total") + "_total"]
        case metrics.Histogram():
            return [name + suffix for suffix in ("_bucket", "_sum", "_count")]
        case _:
            return [name]


@contextmanager
def watched() -> Iterator[Told]:
    told = Told()
    init = metrics.Metric.__init__

    def made(self: metrics.Metric, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        told.made.append(self)

    def record(self: metrics.Metric, value: float, tags: dict[str, str] | None = None) -> None:
        if not any(self is metric for metric in told.made):
            return  # a gauge of an earlier test
        final = self._get_final_tags(tags)
        self._validate_tags(final)
        told.samples.append((self.info["name"], final, value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Metric, "__init__", made)
        patch.setattr(metrics.Metric, "_record", record)
        patch.setattr(Gauges, "_run", lambda self: None)  # only tests tell
        yield told
