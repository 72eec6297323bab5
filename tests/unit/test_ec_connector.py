"""serve_app.ec_connector: embeddings as files. What vLLM 0.32.0 hands a connector is real or has its fields."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from serve_app.config import EPDConfig, Stage
from serve_app.ec_connector import SharedFolderECConnector, SharedFolderStats
from serve_app.transfer import ec_transfer_config

SCHEDULER, WORKER = ECConnectorRole.SCHEDULER, ECConnectorRole.WORKER
GRID = {"image_grid_thw": True}
PIXELS = {"pixel_values": False, **GRID}


class Engines:
    """Connectors of an encoder and of its consumers over one folder, made as vLLM makes them."""

    def __init__(self, model_config: Any, folder: Path) -> None:
        self._model_config = model_config
        self._config = EPDConfig(ec={"storage_path": folder})

    def vllm_config(self, stage: Stage) -> Any:
        settings = ec_transfer_config(self._config, stage)
        assert settings is not None
        return SimpleNamespace(model_config=self._model_config, ec_transfer_config=ECTransferConfig(**settings))

    def connector(self, stage: Stage, role: ECConnectorRole) -> SharedFolderECConnector:
        connector = ECConnectorFactory.create_connector(self.vllm_config(stage), role)
        assert isinstance(connector, SharedFolderECConnector)
        return connector

    def save(self, name: str, tensor: torch.Tensor) -> None:
        self.connector(Stage.ENCODER, WORKER).save_caches({name: tensor}, name)


@pytest.fixture
def engines(demo_vllm_config: Any, tmp_path: Path) -> Engines:
    return Engines(demo_vllm_config.model_config, tmp_path)


def feature(name: str, fields: dict[str, bool] | None, offset: int = 0, length: int = 4) -> MultiModalFeatureSpec:
    """An item with fields (name → kept on the CPU), or without data as after a cache hit."""
    data = None
    if fields is not None:
        data = MultiModalKwargsItem(
            {
                key: MultiModalFieldElem(data=torch.ones(3), field=MultiModalBatchedField(keep_on_cpu=kept))
                for key, kept in fields.items()
            }
        )
    return MultiModalFeatureSpec(data, "image", name, PlaceholderRange(offset, length))


def request(*features: MultiModalFeatureSpec, request_id: str = "r") -> Any:
    return SimpleNamespace(
        request_id=request_id,
        mm_features=list(features),
        get_num_encoder_embeds=lambda index: features[index].mm_position.get_num_embeds(),
    )


def test_saved_embedding_is_found_and_loaded_by_the_consumers(engines: Engines) -> None:
    embedding = torch.arange(12.0).reshape(3, 4).T  # not contiguous
    assert not embedding.is_contiguous()
    engines.save("A", embedding)
    for stage in (Stage.PREFILL, Stage.DECODE):
        scheduler, worker = engines.connector(stage, SCHEDULER), engines.connector(stage, WORKER)
        assert scheduler.has_cache_item("A") and not scheduler.has_cache_item("B")
        scheduler.update_state_after_alloc(request(feature("A", GRID)), 0)
        worker.bind_connector_metadata(scheduler.build_connector_meta(SimpleNamespace()))  # type: ignore[arg-type]
        cache: dict[str, torch.Tensor] = {}
        worker.start_load_caches(cache)
        assert torch.equal(cache["A"], embedding)


def test_only_the_encoder_writes(engines: Engines, tmp_path: Path) -> None:
    engines.connector(Stage.DECODE, WORKER).save_caches({"A": torch.ones(2)}, "A")
    assert list(tmp_path.rglob("*.safetensors*")) == []


def test_file_is_complete_whenever_it_can_be_seen(engines: Engines, tmp_path: Path) -> None:
    """Readers load as fast as they can while it is written over and over; a torn file would raise."""
    first, second = torch.zeros(256, 256), torch.ones(256, 256)
    path = tmp_path / "A" / "encoder_cache.safetensors"
    scheduler = engines.connector(Stage.DECODE, SCHEDULER)
    assert not scheduler.has_cache_item("A")
    engines.save("A", first)
    done = threading.Event()

    def write() -> None:
        for round in range(40):
            engines.save("A", second if round % 2 else first)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    loads = 0
    while not done.is_set() or loads == 0:
        assert scheduler.has_cache_item("A")
        values = safetensors.torch.load_file(path)["ec_cache"]
        assert values.shape == (256, 256) and values.min() == values.max()
        loads += 1
    writer.join()
    assert os.listdir(path.parent) == [path.name]  # nothing is left beside it


def test_place_of_an_item_is_taken_only_by_a_finished_file(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system sees a whole file under another name first, in the same folder."""
    moves: list[tuple[Path, Path]] = []
    replace = os.replace

    def watch(source: str, target: str) -> None:
        assert torch.equal(safetensors.torch.load_file(source)["ec_cache"], torch.ones(2))
        assert not os.path.exists(target)
        moves.append((Path(source), Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    engines.save("A", torch.ones(2))
    ((source, target),) = moves
    assert target == tmp_path / "A" / "encoder_cache.safetensors"
    assert source.parent == target.parent


def test_looking_an_item_up_makes_no_folder(engines: Engines, tmp_path: Path) -> None:
    assert not engines.connector(Stage.DECODE, SCHEDULER).has_cache_item("A")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fields", [GRID, None, {"other_meta": True}], ids=["grid", "no data", "kept on the CPU"])
def test_item_with_neither_file_nor_pixels_fails_its_own_request_once(
    engines: Engines, fields: dict[str, bool] | None
) -> None:
    scheduler = engines.connector(Stage.DECODE, SCHEDULER)
    lost, well = request(feature("A", fields), request_id="lost"), request(request_id="well")
    assert not scheduler.ensure_cache_available(lost, 0)
    assert scheduler.ensure_cache_available(well, 0)
    assert scheduler.take_unavailable_requests() == {"lost"}
    assert scheduler.take_unavailable_requests() == set()


def test_item_with_pixels_is_encoded_where_its_file_is_gone(engines: Engines) -> None:
    scheduler = engines.connector(Stage.DECODE, SCHEDULER)
    assert scheduler.ensure_cache_available(request(feature("A", PIXELS)), 0)
    assert scheduler.take_unavailable_requests() == set()


def test_item_with_a_file_needs_no_pixels(engines: Engines) -> None:
    engines.save("A", torch.ones(2))
    assert engines.connector(Stage.DECODE, SCHEDULER).ensure_cache_available(request(feature("A", GRID)), 0)


@pytest.mark.parametrize(("computed", "available"), [(0, False), (6, False), (7, True), (99, True)])
def test_item_that_is_computed_already_needs_nothing(engines: Engines, computed: int, available: bool) -> None:
    scheduler = engines.connector(Stage.DECODE, SCHEDULER)
    item = feature("A", GRID, offset=3, length=4)  # positions 3 to 6
    assert scheduler.ensure_cache_available(request(item), computed) is available


def test_one_missing_item_among_good_ones_is_found(engines: Engines) -> None:
    engines.save("A", torch.ones(2))
    scheduler = engines.connector(Stage.DECODE, SCHEDULER)
    items = feature("A", GRID), feature("P", PIXELS, offset=4), feature("B", GRID, offset=8)
    assert not scheduler.ensure_cache_available(request(*items), 0)


def counts(connector: SharedFolderECConnector) -> dict[str, int]:
    stats = connector.get_ec_connector_stats()
    return {} if stats is None else stats.data


def test_counts_tell_what_became_of_the_items_and_start_over(engines: Engines) -> None:
    engines.save("A", torch.ones(2))
    scheduler = engines.connector(Stage.DECODE, SCHEDULER)
    assert scheduler.get_ec_connector_stats() is None
    items = request(feature("A", GRID), feature("P", PIXELS), feature("A", GRID))
    for index in range(3):
        scheduler.update_state_after_alloc(items, index)
    scheduler.ensure_cache_available(request(feature("B", GRID)), 0)
    assert counts(scheduler) == {"loaded": 2, "encoded": 1, "missing": 1}
    assert counts(scheduler) == {}


def test_encoder_counts_what_it_encoded(engines: Engines) -> None:
    engines.save("A", torch.ones(2))
    scheduler = engines.connector(Stage.ENCODER, SCHEDULER)
    scheduler.update_state_after_alloc(request(feature("A", PIXELS)), 0)
    assert counts(scheduler) == {"encoded": 1}


def test_workers_count_nothing(engines: Engines) -> None:
    assert engines.connector(Stage.DECODE, WORKER).get_ec_connector_stats() is None


def test_counts_add_up_and_travel_as_data() -> None:
    total = SharedFolderStats(data={"loaded": 1})
    total.aggregate(SharedFolderECConnector.build_ec_connector_stats({"loaded": 2, "missing": 1}))
    assert total.reduce() == {"loaded": 3, "missing": 1}
    total.reset()
    assert total.is_empty()
    assert SharedFolderECConnector.build_ec_connector_stats().is_empty()


def test_counts_are_a_metric_per_engine(engines: Engines) -> None:
    registry = CollectorRegistry()

    def counter(name: str, text: str, labelnames: list[str]) -> Counter:
        return Counter(name, text, labelnames, registry=registry)

    metrics = SharedFolderECConnector.build_prom_metrics(
        engines.vllm_config(Stage.DECODE),
        {Counter: counter, Gauge: Gauge, Histogram: Histogram},
        ["model_name", "engine"],
        {0: ["demo", "0"], 1: ["demo", "1"]},
    )
    metrics.observe({"loaded": 2}, 0)
    metrics.observe({"loaded": 3, "missing": 1}, 1)

    def value(engine: str, event: str) -> float | None:
        labels = {"model_name": "demo", "engine": engine, "event": event}
        return registry.get_sample_value("epd:ec_items_total", labels)

    assert (value("0", "loaded"), value("1", "loaded"), value("1", "missing")) == (2, 3, 1)
