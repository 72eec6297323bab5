"""``/metrics`` of the ingress: vLLM's metrics of every engine on one page."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

PREFIXES = ("vllm:", "epd:")


def merge_metrics(pages: Iterable[tuple[str, str, str]]) -> str:
    """One page in Prometheus' text format from ``(stage, replica, page)``, its samples labelled with stage and replica.

    It has only metrics of the engines: Ray reports those of a replica's Python process.
    """
    families: dict[str, Metric] = {}
    for stage, replica, page in pages:
        for family in text_string_to_metric_families(page):
            if not family.name.startswith(PREFIXES):
                continue
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.samples.append(sample._replace(labels={"stage": stage, "replica": replica, **sample.labels}))

    class Collected:
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry()
    registry.register(Collected())
    return generate_latest(registry).decode()
