"""Pages of several engines become one, labelled with stage and replica."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.observe.metrics import merge_metrics


def page(count: int) -> str:
    """What one engine exposes, made by the same library as vLLM's."""
    registry = CollectorRegistry()
    Counter("vllm:requests", "Requests.", ["engine"], registry=registry).labels("0").inc(count)
    Counter("epd:ec_items", "Items.", ["engine", "event"], registry=registry).labels("0", "loaded").inc(count)
    Gauge("vllm:running", "Running.", registry=registry).set(count)
    histogram = Histogram("vllm:seconds", "Latency.", registry=registry, buckets=(0.1, 1))
    for _ in range(count):
        histogram.observe(0.5)
    Gauge("process_things", "Of the Python process.", registry=registry).set(1)
    return generate_latest(registry).decode()


def samples(text: str) -> dict[tuple[str, str, str], float]:
    """(sample, replica, le or event) → value"""
    return {
        (s.name, s.labels.get("replica", ""), s.labels.get("le") or s.labels.get("event", "")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if not s.name.endswith("_created")
    }


def test_samples_of_all_replicas_are_there_with_their_values() -> None:
    merged = samples(merge_metrics([("prefill", "p1", page(2)), ("decode", "d1", page(3))]))
    assert merged["vllm:requests_total", "p1", ""] == 2
    assert merged["vllm:requests_total", "d1", ""] == 3
    assert merged["epd:ec_items_total", "d1", "loaded"] == 3
    assert merged["vllm:running", "p1", ""] == 2
    assert merged["vllm:seconds_bucket", "d1", "0.1"] == 0
    assert merged["vllm:seconds_bucket", "d1", "1.0"] == 3
    assert merged["vllm:seconds_count", "p1", ""] == 2


def test_samples_are_labelled_with_stage_and_replica_beside_their_own_labels() -> None:
    text = merge_metrics([("prefill", "p1", page(1))])
    assert 'vllm:requests_total{engine="0",replica="p1",stage="prefill"} 1.0' in text


def test_each_metric_is_declared_once() -> None:
    text = merge_metrics([("decode", "d1", page(1)), ("decode", "d2", page(1))])
    lines = text.splitlines()
    assert lines.count("# TYPE vllm:requests_total counter") == 1
    assert lines.count("# TYPE vllm:seconds histogram") == 1
    assert lines.count("# HELP vllm:running Running.") == 1


def test_only_metrics_of_the_engines_are_reported() -> None:
    assert "process_things" not in merge_metrics([("decode", "d1", page(1))])


def test_no_page_is_an_empty_page() -> None:
    assert merge_metrics([]).strip() == ""


def test_merging_changes_no_value() -> None:
    once = merge_metrics([("decode", "d1", page(2))])
    assert {key[::2]: v for key, v in samples(once).items()} == {
        key[::2]: v for key, v in samples(page(2)).items() if key[0] != "process_things"
    }
