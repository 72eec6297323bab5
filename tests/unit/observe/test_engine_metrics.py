"""serve_app.observe.engine_metrics on vLLM's loggers: the page says what vLLM's own would, and Ray what the page says."""

import inspect
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, MultiModalCacheStats, SchedulerStats

from serve_app.observe import engine_metrics
from serve_app.observe.engine_metrics import HELD, Histogram, PageLogger
from serve_app.observe.metrics import PREFIXES
from serve_app.observe.ray_metrics import SERVE_LABELS, Teller
from serve_app.stage import Stage
from serve_app.stages.engine import StageEngine
from tests.unit.metrics_of import TellsAtOnce, Told, watched
from tests.unit.stages.llm import FakeLLM

LABELS = dict(zip(SERVE_LABELS, ("epd", "Decode", "d1"), strict=True))


@pytest.fixture
def told() -> Iterator[Told]:
    with watched() as told:
        yield told


@pytest.fixture
def clear() -> Iterator[Callable[[], None]]:
    """Leave the process's own registry as it was, in the end and when it is called."""
    before = set(REGISTRY._collector_to_names)

    def clear() -> None:
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)

    yield clear
    clear()


Step = tuple[SchedulerStats | None, IterationStats | None, MultiModalCacheStats | None, int]


def some_steps(count: int) -> list[Step]:
    """Of two engine cores, as an engine under load would tell them: some without outputs, some without a scheduler's."""
    pick = random.Random(7)
    steps: list[Step] = []
    for _ in range(count):
        scheduled = SchedulerStats(num_running_reqs=pick.randrange(9), kv_cache_usage=pick.random())
        scheduled.prefix_cache_stats.queries, scheduled.prefix_cache_stats.hits = pick.randrange(9), pick.randrange(3)
        scheduled.ec_connector_stats = {"loaded": pick.randrange(3), "load_seconds": [pick.random()]}
        moved = NixlKVConnectorStats()
        moved.data["bytes_transferred"], moved.data["transfer_duration"] = [pick.randrange(10**8)], [pick.random()]
        scheduled.kv_connector_stats = moved.data if pick.random() < 0.3 else None
        iteration = IterationStats()
        iteration.num_generation_tokens = pick.randrange(200)
        iteration.inter_token_latencies_iter = [pick.expovariate(20) for _ in range(iteration.num_generation_tokens)]
        iteration.time_to_first_tokens_iter = [0.25, pick.expovariate(1)]  # 0.25: a bound itself
        iteration.finished_requests = [
            FinishedRequestStats(FinishReason.STOP, e2e_latency=pick.expovariate(0.1), num_generation_tokens=5)
            for _ in range(pick.randrange(3))
        ]
        mm = MultiModalCacheStats(queries=pick.randrange(4), hits=1)
        core = pick.randrange(2)
        steps.append((scheduled if pick.random() < 0.9 else None, iteration if pick.random() < 0.9 else None, mm, core))
    return steps


def page() -> dict[str, float]:
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if family.name.startswith(PREFIXES) and not sample.name.endswith("_created")
    }


def test_page_says_what_vllms_own_logger_would(decode_vllm_config: Any, clear: Callable[[], None]) -> None:
    pages = []
    for kind in (PrometheusStatLogger, PageLogger):
        clear()
        logger = kind(decode_vllm_config, [0, 1])
        for step in some_steps(200):
            logger.record(*step)
        pages.append(page())
    assert pages[1] == pytest.approx(pages[0], rel=1e-9)
    assert pages[1]["vllm:inter_token_latency_seconds_count[('engine', '1'), ('model_name', 'demo')]"] > HELD


def test_ray_is_told_what_the_page_says(decode_vllm_config: Any, told: Told, clear: Callable[[], None]) -> None:
    logger, teller = PageLogger(decode_vllm_config, [0, 1]), Teller(REGISTRY, LABELS, PREFIXES)
    for number, step in enumerate(some_steps(50)):
        logger.record(*step)
        if number % 20 == 0:
            teller.tell()
    teller.tell()
    for family in REGISTRY.collect():
        for sample in family.samples if family.name.startswith(PREFIXES) else ():
            name, labels = sample.name.replace(":", "_"), sample.labels | LABELS
            if family.type == "counter" and name.endswith("_total"):
                assert told.sum(name.removesuffix("_total"), **labels) == pytest.approx(sample.value), name
            elif not name.endswith("_created"):
                assert told.values(name, **labels)[-1] == sample.value, name
    assert told.sum("vllm_generation_tokens") > 0
    assert told.values("epd_kv_transfer_mb_per_s_count")[-1] > 0
    # Serve's own may be among them, of a handle that an earlier test of this process has made.
    ours = [tags for name, tags, _ in told.samples if name.startswith(("vllm_", "epd_"))]
    assert ours and all(tags.items() >= LABELS.items() for tags in ours)


def test_each_metric_is_on_the_page_once(decode_vllm_config: Any, clear: Callable[[], None]) -> None:
    PageLogger(decode_vllm_config, [0, 1]).record(*some_steps(1)[0])
    text = generate_latest(REGISTRY).decode()
    assert text.count("# TYPE vllm:generation_tokens_total counter") == 1
    assert text.count("# TYPE epd:ec_items_total counter") == 1


def test_values_that_nobody_reads_do_not_pile_up() -> None:
    histogram = Histogram("a", "what", buckets=[1.0], registry=None)
    for _ in range(HELD * 2 + 1):
        histogram.observe(0.5)
    assert len(histogram._held) == 1
    assert histogram._sum.get() == HELD


def test_nothing_is_lost_between_who_observes_and_who_reads() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("a", "what", buckets=[1.0], registry=registry)
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            registry.get_sample_value("a_count")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(100_000):
        histogram.observe(0.5)
    ended.set()
    for reader in readers:
        reader.join()
    assert registry.get_sample_value("a_bucket", {"le": "1.0"}) == registry.get_sample_value("a_count") == 100_000
    assert registry.get_sample_value("a_sum") == 50_000


@pytest.mark.parametrize(
    ("in_ray", "args", "tells"),
    [(True, {}, 1), (False, {}, 0), (True, {"disable_log_stats": True}, 0)],
    ids=["on", "off", "no statistics at all"],
)
def test_engine_tells_ray_where_that_is_on_and_statistics_are(
    monkeypatch: pytest.MonkeyPatch, in_ray: bool, args: dict[str, Any], tells: int
) -> None:
    asked: list[Any] = []
    calls: Counter[str] = Counter()
    monkeypatch.setattr("serve_app.stages.engine.engine_config", lambda _: None)

    def from_vllm_config(_: Any, stat_loggers: Any, **__: Any) -> FakeLLM:
        asked.append(stat_loggers)
        return FakeLLM()

    monkeypatch.setattr("serve_app.stages.engine.AsyncLLM.from_vllm_config", from_vllm_config)
    monkeypatch.setattr(envs, "enable_envs_cache", lambda: calls.update(["envs"]))
    monkeypatch.setattr("serve_app.stages.engine.tell_ray", lambda: calls.update(["ray"]))
    monkeypatch.setattr("serve_app.stages.engine.freeze_gc_heap", lambda: calls.update(["frozen"]))
    StageEngine(Stage.DECODE, {"model": "m"} | args, in_ray)
    ((own, page),) = asked
    assert own.__self__.by_core == {}, "the logger that draining and autoscaling need, whatever is reported"
    assert page is PageLogger
    assert (calls["ray"], calls["envs"], calls["frozen"]) == (tells, 1, 1)


def test_what_an_engine_tells_has_the_labels_of_its_replica(
    monkeypatch: pytest.MonkeyPatch, decode_vllm_config: Any, told: Told, clear: Callable[[], None]
) -> None:
    monkeypatch.setattr(engine_metrics, "serve_labels", lambda: LABELS)
    monkeypatch.setattr(engine_metrics, "Teller", TellsAtOnce)
    PageLogger(decode_vllm_config, [0])
    engine_metrics.tell_ray()
    assert told.samples
    for name, tags, _ in told.samples:
        assert name.startswith(("vllm_", "epd_"))
        assert tags.items() >= (LABELS | {"ReplicaId": "d1"}).items(), name


# ---- contracts


def test_vllms_logger_counts_with_the_class_of_ours() -> None:
    """And calls nothing of a histogram but `observe`, with one value."""
    source = inspect.getsource(PrometheusStatLogger)
    assert source.count("self._histogram_cls(") > 10, "engine_metrics.py: PageLogger"
    assert not {"Histogram(", ".time()"} & set(source.split()), "engine_metrics.py: Histogram"
    assert "exemplar" not in source, "engine_metrics.py: Histogram.observe"


def test_a_histogram_of_prometheus_client_keeps_its_values_where_ours_puts_them() -> None:
    """`_sum`, and in `_buckets` how many values are at most a bound of `_upper_bounds` and above the one before."""
    import prometheus_client

    theirs, ours = (
        kind("a", "what", ["of"], buckets=[1, 2], registry=None).labels("x")
        for kind in (prometheus_client.Histogram, Histogram)
    )
    for value in (-1, 0.5, 1, 1.5, 2, 9):
        theirs.observe(value)
        ours.observe(value)
    assert ours._child_samples()[:5] == theirs._child_samples()[:5]
    assert [sample.name for sample in ours._child_samples()[:5]] == ["_bucket"] * 3 + ["_count", "_sum"]


def test_a_logger_of_ones_own_takes_the_place_of_the_pages() -> None:
    """`StatLoggerManager` adds one of its own unless one of ours is one; and statistics come on with any."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerManager

    assert "isinstance(global_stat_logger, PrometheusStatLogger)" in inspect.getsource(StatLoggerManager.__init__)
    assert "log_stats or has_custom_loggers" in inspect.getsource(AsyncLLM.__init__), "serve_app/engine.py"


def test_vllms_spans_are_made_of_statistics() -> None:
    """Why `disable_log_stats` is refused with tracing (serve_app/config/stages.py): the assertion would end the engine."""
    from vllm.v1.engine.output_processor import OutputProcessor

    assert "assert iteration_stats is not None" in inspect.getsource(OutputProcessor.do_tracing)


def test_vllm_asks_for_a_variable_of_the_environment_with_every_token() -> None:
    """Why StageEngine has them cached. Gone: so can that go."""
    assert "envs.VLLM_COMPUTE_NANS_IN_LOGITS" in inspect.getsource(IterationStats.update_from_output)
    envs.enable_envs_cache()
    assert hasattr(envs.__getattr__, "cache_info"), "serve_app/engine.py: what is asked for again is remembered"
