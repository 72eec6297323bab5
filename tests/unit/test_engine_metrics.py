"""serve_app.engine_metrics on vLLM's loggers: Ray is told all, with Serve's labels, and the engine's page stays whole."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from serve_app import engine_metrics
from serve_app.config import Stage
from serve_app.engine_metrics import SERVE_LABELS, STAT_LOGGERS, RayStatLogger
from serve_app.stages.engine import StageEngine
from tests.unit.metrics_of import Told, watched
from tests.unit.stages.llm import FakeLLM


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    labels = dict(zip(SERVE_LABELS, ("epd", "Decode", "d1"), strict=True))
    monkeypatch.setattr(engine_metrics, "serve_labels", lambda: labels)
    with watched() as told:
        yield told


@pytest.fixture
def registry() -> Iterator[None]:
    """The process's own, left as it was."""
    before = set(REGISTRY._collector_to_names)
    yield
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def step(tokens: int) -> tuple[SchedulerStats, IterationStats]:
    scheduled = SchedulerStats(num_running_reqs=3, ec_connector_stats={"loaded": 2, "load_seconds": [0.5]})
    iteration = IterationStats()
    iteration.num_generation_tokens = tokens
    iteration.inter_token_latencies_iter = [0.25] * tokens
    return scheduled, iteration


def test_both_loggers_tell_the_same_and_each_metric_is_registered_once(
    decode_vllm_config: Any, told: Told, registry: None
) -> None:
    """In vLLM's order; `RayPrometheusStatLogger` alone would register the EC connector's with prometheus_client too."""
    loggers = [logger(decode_vllm_config, [0]) for logger in STAT_LOGGERS]
    for logger in loggers:
        logger.record(*step(2))

    assert told.sum("vllm_generation_tokens") == 2
    assert told.values("vllm_inter_token_latency_seconds") == [0.25, 0.25]
    assert told.sum("epd_ec_items", event="loaded") == 2
    assert told.values("epd_ec_load_seconds") == [0.5]
    page = generate_latest(REGISTRY).decode()
    assert page.count("# TYPE vllm:generation_tokens_total counter") == 1
    assert page.count("# TYPE epd:ec_items_total counter") == 1
    assert (
        REGISTRY.get_sample_value("epd:ec_items_total", {"model_name": "demo", "engine": "0", "event": "loaded"}) == 2
    )


def test_samples_have_serves_labels(decode_vllm_config: Any, told: Told) -> None:
    RayStatLogger(decode_vllm_config, [0]).record(*step(1))
    engine_metrics.Gauge.told.tell()
    for name, tags, _ in told.samples:
        assert (tags["application"], tags["deployment"], tags["replica"]) == ("epd", "Decode", "d1"), name
    assert {tags["engine"] for name, tags, _ in told.samples if name == "vllm_num_requests_running"} == {"0"}


def test_speed_of_kv_transfers_is_told_beside_vllms_metrics_of_them(decode_vllm_config: Any, told: Told) -> None:
    moved = {name: [] for name in NixlKVConnectorStats().data} | {
        "bytes_transferred": [100_000_000],
        "transfer_duration": [0.25],
    }
    scheduled = SchedulerStats(kv_connector_stats=moved)
    RayStatLogger(decode_vllm_config, [0]).record(scheduled, IterationStats())
    assert told.values("vllm_nixl_bytes_transferred") == [100_000_000]
    assert told.values("epd_kv_transfer_mb_per_s", deployment="Decode", replica="d1") == [400]


def test_labels_are_those_of_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(app_name="epd", deployment="Prefill", replica_tag="p1")
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)
    assert engine_metrics.serve_labels() == {"application": "epd", "deployment": "Prefill", "replica": "p1"}


def test_outside_a_replica_labels_are_empty() -> None:
    assert engine_metrics.serve_labels() == dict.fromkeys(SERVE_LABELS, "")


@pytest.mark.parametrize(
    ("in_ray", "args", "loggers"),
    [(True, {}, STAT_LOGGERS), (False, {}, []), (True, {"disable_log_stats": True}, [])],
    ids=["on", "off", "no statistics at all"],
)
def test_engine_tells_ray_where_that_is_on_and_statistics_are(
    monkeypatch: pytest.MonkeyPatch, in_ray: bool, args: dict[str, Any], loggers: Any
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("serve_app.stages.engine.engine_config", lambda _: None)

    def from_vllm_config(_: Any, stat_loggers: Any, **__: Any) -> FakeLLM:
        asked.append(stat_loggers)
        return FakeLLM()

    monkeypatch.setattr("serve_app.stages.engine.AsyncLLM.from_vllm_config", from_vllm_config)
    StageEngine(Stage.DECODE, {"model": "m"} | args, in_ray)
    ((own, *others),) = asked
    assert own.__self__.by_core == {}, "the logger that draining and autoscaling need, whatever is reported"
    assert others == loggers


# ---- contracts


def test_every_kind_that_vllm_counts_with_has_a_class_of_ours() -> None:
    """Every ``_…_cls`` of vLLM's logger has one of ours, or it would count past Ray."""
    kinds = {name for name in vars(PrometheusStatLogger) if name.endswith("_cls")}
    for kind in kinds:
        assert getattr(RayStatLogger, kind).__module__ == engine_metrics.__name__, f"engine_metrics.py: {kind}"


def test_a_logger_that_is_made_unregisters_the_vllm_metrics_before_it() -> None:
    """Why the page's logger comes last. Gone: any order will do."""
    assert "unregister_vllm_metrics()" in inspect.getsource(PrometheusStatLogger.__init__)
    assert STAT_LOGGERS[-1] is PrometheusStatLogger


def test_loggers_of_ones_own_take_the_place_of_the_pages() -> None:
    """`StatLoggerManager` adds one of its own unless one of ours is one; and statistics come on with any."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerManager

    assert "isinstance(global_stat_logger, PrometheusStatLogger)" in inspect.getsource(StatLoggerManager.__init__)
    assert "log_stats or has_custom_loggers" in inspect.getsource(AsyncLLM.__init__), "serve_app/engine.py"


def test_vllms_spans_are_made_of_statistics() -> None:
    """Why `disable_log_stats` is refused with tracing (serve_app/config.py): the assertion would end the engine."""
    from vllm.v1.engine.output_processor import OutputProcessor

    assert "assert iteration_stats is not None" in inspect.getsource(OutputProcessor.do_tracing)
