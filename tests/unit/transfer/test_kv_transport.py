"""What is certain of a transfer's speed, when that is told, and the metric."""

import inspect
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlHandshakePayload
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

from serve_app.handoff.types import VERSION_KEY
from serve_app.transfer import kv_transport
from serve_app.transfer.kv_transport import ENOUGH_BYTES, PLENTY_BYTES, NixlConnector, NixlPushConnector, Pace, Watch

MB = 1_000_000
PROMPT = 103 * MB  # of 2,800 tokens of Qwen2.5-VL-3B
PEER = {"engine p1 at 10.0.0.1"}


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """vLLM's loggers do not propagate, so pytest's own fixture would see nothing."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    level = kv_transport.logger.level
    kv_transport.logger.addHandler(handler)
    kv_transport.logger.setLevel(logging.INFO)
    yield records
    kv_transport.logger.setLevel(level)
    kv_transport.logger.removeHandler(handler)


def warnings(logged: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in logged if record.levelno == logging.WARNING]


# ---- what is certain


def test_transfer_moved_from_its_start_to_the_look_before_the_one_that_found_it_done() -> None:
    pace = Pace()
    for now in (10.00, 10.05, 10.10, 10.15):
        pace.look(now, [], [])
    pace.look(10.20, [100 * MB], [0.20])  # began at 10.00, still moved at 10.15
    assert pace.moved_bytes == 100 * MB
    assert pace.busy_s == pytest.approx(0.15)


def test_transfer_that_took_less_than_a_step_may_have_taken_nothing() -> None:
    pace = Pace()
    pace.look(10.0, [], [])
    pace.look(10.3, [100 * MB], [0.29])  # began after the look before
    assert pace.bytes_per_s == float("inf")


def test_time_in_which_several_move_counts_once() -> None:
    """Ten at a time over a fast link take as long each as one over a slow link."""
    pace = Pace()
    for step in range(11):
        pace.look(10 + step / 10, [], [])
    pace.look(11.1, [MB] * 4, [1.0, 1.1, 1.1, 0.5])
    pace.look(11.2, [MB], [1.2])
    assert pace.moved_bytes == 5 * MB
    assert pace.busy_s == pytest.approx(1.1)


def test_first_look_finds_nothing_that_is_certain() -> None:
    pace = Pace()
    pace.look(5.0, [PROMPT], [3.0])
    assert pace.busy_s == 0.0


# ---- what is told


def looks(watch: Watch, gb_per_s: float, count: int, step_s: float = 0.01, moving: bool = False) -> None:
    """Hand-offs of a prompt one after another, at so much, looked at every step."""
    now, took = 100.0, PROMPT / gb_per_s / 1e9
    for _ in range(count):
        began = now
        while now < began + took:
            watch.look(now, set(), [], [], moving=True)
            now += step_s
        watch.look(now, PEER, [PROMPT], [now - began], moving)
        now += step_s


def test_first_hand_off_of_each_peer_is_logged(logged: list[logging.LogRecord]) -> None:
    watch = Watch(warns=True)
    for peers in (PEER, PEER, {"engine p2 at 10.0.0.2"}, set[str]()):
        watch.look(1.0, peers, [PROMPT], [0.206])
    first, second = [record.getMessage() for record in logged if record.levelno == logging.INFO]
    assert "engine p1 at 10.0.0.1: 103.0 MB in 0.206 s, 500 MB/s" in first
    assert "engine p2 at 10.0.0.2" in second


def test_end_without_a_transfer_is_not_logged(logged: list[logging.LogRecord]) -> None:
    """All blocks were there: only the producer is told."""
    Watch(warns=True).look(1.0, PEER, [], [])
    assert not logged


def test_slow_hand_offs_are_warned_of_once_with_what_to_do(logged: list[logging.LogRecord]) -> None:
    looks(Watch(warns=True), 0.5, 8)
    (warning,) = warnings(logged)
    assert "moved at 0.5 GB/s (103 MB)" in warning
    for remedy in ("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "NixlPushConnector", "RDMA", "`prefill: null`", "UCX_PROTO_INFO"):
        assert remedy in warning


def test_first_hand_off_is_not_judged(logged: list[logging.LogRecord]) -> None:
    """Engines connect with it, and map each other's memory."""
    looks(Watch(warns=True), 0.5, 1)
    assert not warnings(logged)


@pytest.mark.parametrize("step_s", [0.002, 0.02, 0.3])
def test_fast_hand_offs_are_fine_however_long_steps_are(logged: list[logging.LogRecord], step_s: float) -> None:
    looks(Watch(warns=True), 10, 20, step_s)
    assert not warnings(logged)


def test_little_is_not_judged(logged: list[logging.LogRecord]) -> None:
    watch = Watch(warns=True)
    watch.look(0.0, PEER, [MB], [0.01])
    for now in range(1, 10):
        watch.look(now + 0.9, PEER, [], [])
        watch.look(now + 1.0, PEER, [MB], [0.5])
    assert 9 * MB < ENOUGH_BYTES
    assert not warnings(logged)


def test_while_something_always_moves_more_is_awaited(logged: list[logging.LogRecord]) -> None:
    """What still moves took its share of the time and is not counted yet."""
    enough = PLENTY_BYTES // PROMPT + 1
    watch = Watch(warns=True)
    looks(watch, 0.5, enough, moving=True)
    assert not warnings(logged)
    looks(watch, 0.5, 2, moving=True)
    assert len(warnings(logged)) == 1


def test_through_the_memory_of_a_machine_nothing_is_warned_of(logged: list[logging.LogRecord]) -> None:
    looks(Watch(warns=False), 0.5, 8)
    assert not warnings(logged)


# ---- on vLLM's connector


@pytest.fixture
def connector(decode_vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a connector of ours around a worker that is none of NIXL's."""

    def make(cls: type[Any] = NixlConnector, device: str = "cuda", **worker: Any) -> Any:
        made = object.__new__(cls)
        base = kv_transport.nixl.NixlBaseConnector
        transfer = SimpleNamespace(kv_buffer_device=device, kv_role="kv_consumer")

        def init(self: Any, *args: Any) -> None:
            self.kv_transfer_config, self.connector_scheduler = transfer, None
            self.connector_worker = SimpleNamespace(
                **{"_recving_metadata": {}, "_recving_transfers": {}, "pcp_rank": 0} | worker
            )

        monkeypatch.setattr(base, "__init__", init)
        made.__init__(decode_vllm_config, None, None)
        return made

    return make


def stats(size: int, seconds: float) -> NixlKVConnectorStats:
    made = NixlKVConnectorStats()
    made.record_transfer(SimpleNamespace(xferDuration=seconds * 1e6, postDuration=10, totalBytes=size, descCount=3))  # type: ignore[arg-type]
    return made


def test_pulled_blocks_are_named_by_the_engine_that_had_them(
    connector: Callable[..., Any], logged: list[logging.LogRecord]
) -> None:
    remote = SimpleNamespace(engine_id="p1", host="10.0.0.1")
    waiting = {"r1": SimpleNamespace(remote=remote), "r2": SimpleNamespace(remote=remote)}

    def results() -> KVConnectorTransferResults:
        waiting.clear()  # as vLLM's worker forgets what is done
        return KVConnectorTransferResults(finished_recving={"r1", "r2"}, failed_recving={"r2"})

    moved = stats(PROMPT, 0.2)
    made = connector(_recving_metadata=waiting, get_transfer_results=results, get_kv_connector_stats=lambda: moved)
    assert made.get_transfer_results(set()).finished_recving == {"r1", "r2"}
    assert made.get_kv_connector_stats() is moved
    (record,) = logged
    assert "engine p1 at 10.0.0.1: 103.0 MB in 0.200 s" in record.getMessage()


def test_pushed_blocks_are_told_of_by_prefill(connector: Callable[..., Any], logged: list[logging.LogRecord]) -> None:
    made = connector(
        NixlPushConnector,
        _sending_transfers={},
        get_transfer_results=lambda: KVConnectorTransferResults(finished_sending={"r1"}),
        get_kv_connector_stats=lambda: stats(PROMPT, 0.2),
    )
    made.get_transfer_results(set())
    made.get_kv_connector_stats()
    assert "between here and decode: 103.0 MB" in logged[0].getMessage()


def test_step_without_transfers_is_a_look_too(connector: Callable[..., Any]) -> None:
    made = connector(get_transfer_results=KVConnectorTransferResults, get_kv_connector_stats=lambda: None)
    made.get_transfer_results(set())
    assert made.get_kv_connector_stats() is None
    assert made._watch._pace._looked == made._looked > 0


def test_schedulers_half_has_nothing_to_look_at(connector: Callable[..., Any]) -> None:
    made = connector()
    made.connector_worker = None
    assert made.get_kv_connector_stats() is None


@pytest.mark.parametrize(("device", "warns"), [("cpu", False), ("cuda", True)])
def test_only_blocks_on_cards_are_judged(connector: Callable[..., Any], device: str, warns: bool) -> None:
    assert connector(device=device)._watch._warns is warns


# ---- the metric


def test_every_transfer_is_counted_beside_vllms_metrics(
    decode_vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", lambda _: NixlConnector)
    before = set(REGISTRY._collector_to_names)
    try:
        prom = KVConnectorProm(decode_vllm_config, ["engine"], {0: ["0"]})
        prom.observe(stats(PROMPT, 0.206).aggregate(stats(MB, 0.0)).data)
        assert sample("epd:kv_transfer_mb_per_s_count") == sample("vllm:nixl_bytes_transferred_count") == 2
        assert sample("epd:kv_transfer_mb_per_s_bucket", le="500.0") == 1
    finally:
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"engine": "0", **labels})


@pytest.mark.parametrize("name", ["NixlConnector", "NixlPullConnector", "NixlPushConnector"])
def test_vllm_takes_each_connector_by_the_name_of_its_own(name: str) -> None:
    """Which its checks compare: ours must be a kind of that, or they would not apply."""
    ours, theirs = getattr(kv_transport, name), KVConnectorFactory.get_connector_class_by_name(name)
    assert issubclass(ours, theirs)  # type: ignore[arg-type]
    assert "kv_cache_config" in inspect.signature(ours).parameters


# ---- versions


@pytest.mark.parametrize("cls", [NixlConnector, NixlPushConnector])
def test_engines_of_two_versions_do_not_connect(cls: type[Any], connector: Callable[..., Any]) -> None:
    def told(version: str, theirs: str = "vllm's") -> tuple[str, str]:
        made = connector(cls)
        worker = made.connector_worker

        def register(kv_caches: Any) -> None:
            worker.compat_hash = theirs
            worker.xfer_handshake_metadata = NixlHandshakePayload(theirs, b"agent")

        worker.register_kv_caches = register
        extra = {VERSION_KEY: version}
        made.kv_transfer_config.get_from_extra_config = lambda key, default: extra.get(key, default)
        made.register_kv_caches({})
        assert worker.xfer_handshake_metadata.agent_metadata_bytes == b"agent"
        return worker.compat_hash, worker.xfer_handshake_metadata.compatibility_hash

    ours, theirs = told("a")
    assert ours == theirs
    assert len({ours, told("b")[0], told("a", "another engine's")[0]}) == 3
    assert told("a")[0] == ours
