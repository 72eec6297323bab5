"""Embeddings as files, with vLLM's real scheduler around it (``ec_engine.py``).

Every test that can runs four times: with vLLM's plain scheduler, and with the asynchronous one that is a step ahead; in the
model runner V1, as on the CPU, and in V2, as on cards.
"""

import copy
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.v1.request import RequestStatus

from serve_app.config import EPDConfig
from serve_app.handoff.types import READ_S
from serve_app.launch.connectors import ec_transfer_config
from serve_app.stage import Stage
from serve_app.transfer.ec_connector import SharedFolderECConnector, weights_of
from serve_app.transfer.ec_metrics import SharedFolderStats
from serve_app.transfer.ec_store import FolderStore, Shape
from serve_app.transfer.ec_writer import Writer
from tests.unit.transfer.ec_engine import BLOCK, GRID, LENGTH, PIXELS, Engine, feature

MakeEngine = Callable[..., Engine]


@pytest.fixture(params=[False, True], ids=["plain", "ahead"])
def ahead(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["V1", "V2"])
def make(request: pytest.FixtureRequest, ahead: bool, demo_vllm_config: Any, tmp_path: Path) -> Iterator[MakeEngine]:
    """Make engines over one folder. At the end none may hold a pin or an open file, or leave a thread."""
    engines: list[Engine] = []
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()

    def make(stage: Stage, **options: Any) -> Engine:
        engines.append(Engine(demo_vllm_config, tmp_path, stage, ahead=ahead, v2=request.param, **options))
        return engines[-1]

    yield make
    for engine in engines:
        pins = dict(engine.connector._pins), dict(engine.connector._pinned_by)
        engine.close()
        assert pins == ({}, {})
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def encoder(make: MakeEngine) -> Engine:
    return make(Stage.ENCODER)


@pytest.fixture
def prefill(make: MakeEngine) -> Engine:
    return make(Stage.PREFILL)


def path(engine: Engine, name: str) -> Path:
    return engine.connector._store.path(engine.connector._prefix + name)


def lose(engine: Engine, *names: str) -> None:
    for name in names:
        path(engine, name).unlink()


def evict_all(engine: Engine) -> None:
    """As another encoder with next to no budget would, long after the last use."""
    other = FolderStore(engine.connector._store.root, max_bytes=0, lease_s=0)
    while other.evict() is None:  # an encoder's first pass, in its own thread
        os.sched_yield()


def publish(encoder: Engine, *names: str) -> None:
    for name in names:
        assert encoder.ask(f"encode-{name}-{len(encoder.replies)}", feature(name, PIXELS)) == "stop"


def before_read(engine: Engine, do: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something after the files have been looked at, while the request is being scheduled."""
    has_cache_item = engine.connector.has_cache_item

    def late(identifier: str) -> bool:
        do(identifier)
        return has_cache_item(identifier)

    monkeypatch.setattr(engine.connector, "has_cache_item", late)


def truncate(engine: Engine, name: str) -> None:
    if path(engine, name).exists():
        os.truncate(path(engine, name), path(engine, name).stat().st_size - 1)


# ---- the way of an embedding


def test_encoded_once_and_loaded_by_every_consumer(make: MakeEngine, encoder: Engine) -> None:
    publish(encoder, "A", "B")
    size_bytes = LENGTH * encoder.width * 4
    assert encoder.replies["encode-A-0"] == {
        "A": {"item_indices": [0], "metadata": {"image_grid_thw": [1.0, 1.0, 1.0]}}
    }
    assert encoder.counts.items() >= {"encoded": 2, "bytes.written": 2 * size_bytes}.items()
    for stage in (Stage.PREFILL, Stage.DECODE):
        consumer = make(stage)
        assert consumer.ask("r", feature("A", GRID), feature("B", GRID), feature("A", GRID)) == "length"
        assert consumer.tokens["r"] == [consumer.answer("A", "B", "A")]
        assert consumer.counts == {"loaded": 2, "bytes.loaded": 2 * size_bytes}


def test_consumer_answers_with_the_time_that_reading_took_for_a_request(encoder: Engine, prefill: Engine) -> None:
    publish(encoder, "A", "B")
    for name, items in (("both", "AB"), ("one, read before", "A"), ("text", "")):
        prefill.ask(name, *(feature(item, GRID) for item in items))
    assert set(prefill.replies["both"]) == {READ_S}
    assert 0 < prefill.replies["both"][READ_S] < 5
    assert prefill.replies["one, read before"] is prefill.replies["text"] is None
    assert not prefill.connector._read_s


def test_encoder_loads_what_another_has_encoded(make: MakeEngine, encoder: Engine) -> None:
    publish(encoder, "A")
    other = make(Stage.ENCODER)
    publish(other, "A")
    assert other.encodings == [] and "A" in other.encoder_cache
    assert other.counts["loaded"] == 1 and "encoded" not in other.counts


def test_requests_of_one_step_share_an_item(encoder: Engine, prefill: Engine) -> None:
    publish(encoder, "A")
    for name in ("r1", "r2"):
        prefill.add(name, feature("A", GRID))
    prefill.run()
    assert prefill.tokens == {"r1": [prefill.answer("A")], "r2": [prefill.answer("A")]}
    assert prefill.counts["loaded"] == 1


def test_consumer_that_got_pixels_encodes_what_has_no_file(prefill: Engine) -> None:
    """Items of a model that declares no placeholder metadata keep them."""
    assert prefill.ask("r", feature("A", PIXELS)) == "length"
    assert prefill.tokens["r"] == [prefill.answer("A")]
    assert prefill.counts == {"encoded": 1}
    assert not path(prefill, "A").exists()  # only encoders write


def test_prompt_in_several_steps_gets_all_its_items(encoder: Engine, prefill: Engine) -> None:
    names = [f"item {index}" for index in range(6)]
    publish(encoder, *names)
    prefill.scheduler.max_num_scheduled_tokens = 10  # two and a half items
    assert prefill.ask("r", *(feature(name, GRID) for name in names)) == "length"
    assert prefill.counts["loaded"] == 6


# ---- files that are gone or wrong, seen before the request is scheduled


@pytest.mark.parametrize("fields", [GRID, None, {"other_meta": True}], ids=["grid", "no data", "kept on the CPU"])
def test_lost_item_fails_its_request_and_no_other(
    encoder: Engine, prefill: Engine, fields: dict[str, bool] | None
) -> None:
    publish(encoder, "A", "B")
    lose(encoder, "B")
    prefill.add("well", feature("A", GRID))
    prefill.add("lost", feature("A", GRID), feature("B", fields))
    prefill.add("text")
    prefill.run()
    assert prefill.reasons == {"well": "length", "lost": "error", "text": "length"}
    assert prefill.tokens["lost"] == []
    assert prefill.counts["missing"] == 1


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_truncated_file_fails_its_request_and_no_other(encoder: Engine, prefill: Engine, cut: int) -> None:
    publish(encoder, "A", "B")
    os.truncate(path(encoder, "B"), cut % path(encoder, "B").stat().st_size)
    prefill.add("lost", feature("B", GRID))
    prefill.add("well", feature("A", GRID))
    prefill.run()
    assert prefill.reasons == {"well": "length", "lost": "error"}
    assert (prefill.counts["missing"], prefill.counts["broken"]) == (1, 1)
    publish(encoder, "B")  # the client sends it again
    assert prefill.ask("again", feature("B", GRID)) == "length"
    assert prefill.tokens["again"] == [prefill.answer("B")]


@pytest.mark.parametrize("shape", [(LENGTH + 1, 1), (LENGTH, 0.5), (LENGTH, 0), (0, 1)], ids=str)
def test_embedding_of_a_wrong_shape_fails_its_request_and_no_other(
    encoder: Engine, prefill: Engine, shape: tuple[int, float]
) -> None:
    publish(encoder, "A")
    wrong = Shape(shape[0], int(shape[1] * prefill.width), "F32")
    store = prefill.connector._store
    store.put(prefill.connector._prefix + "B", bytes(wrong.size_bytes), wrong)
    prefill.add("lost", feature("B", GRID))
    prefill.add("well", feature("A", GRID))
    prefill.run()
    assert prefill.reasons == {"well": "length", "lost": "error"}
    publish(encoder, "B")  # the encoder does not take it for an embedding either
    assert encoder.encodings == ["A", "B"]
    assert prefill.ask("again", feature("B", GRID)) == "length"


def test_file_of_integers_fails_its_request(encoder: Engine, prefill: Engine) -> None:
    publish(encoder, "A")
    text = path(encoder, "A").read_bytes().replace(b'"F32"', b'"I32"')
    path(encoder, "A").write_bytes(text)
    assert prefill.ask("r", feature("A", GRID)) == "error"


def test_metadata_only_item_on_an_encoder_fails_its_request(encoder: Engine) -> None:
    assert encoder.ask("r", feature("A", GRID)) == "error"
    publish(encoder, "B")


def test_embedding_of_another_precision_is_another_item(encoder: Engine, prefill: Engine) -> None:
    publish(encoder, "A")
    prefill.connector._prefix = "torch.bfloat16:"
    assert prefill.ask("r", feature("A", GRID)) == "error"


# ---- files that are lost later


def test_file_that_is_deleted_while_its_request_is_scheduled_is_loaded(
    encoder: Engine, prefill: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(encoder, "A")
    before_read(prefill, lambda name: lose(prefill, name), monkeypatch)
    assert prefill.ask("r", feature("A", GRID)) == "length"
    assert prefill.tokens["r"] == [prefill.answer("A")]


def test_file_of_a_waiting_request_is_not_evicted(make: MakeEngine, encoder: Engine) -> None:
    """It was looked at, and then there were no KV blocks."""
    publish(encoder, "A", "B")
    prefill = make(Stage.PREFILL, blocks=2)  # one of them is vLLM's null block
    prefill.add("first", feature("A", GRID), max_tokens=4)
    prefill.add("second", feature("B", GRID))
    prefill.step()
    evict_all(prefill)
    assert path(prefill, "B").exists()
    prefill.run()
    assert prefill.tokens["second"] == [prefill.answer("B")]
    assert prefill.counts["loaded"] == 2
    evict_all(prefill)
    assert not path(prefill, "A").exists() and not path(prefill, "B").exists()


def test_preempted_request_still_has_its_items(make: MakeEngine, encoder: Engine) -> None:
    """It is prefilled again, its item is no longer in the engine's own cache, and the folder was emptied meanwhile."""
    names = ["A", "B", "C"]
    publish(encoder, *names)
    decode = make(Stage.DECODE, blocks=6, cache=LENGTH)
    requests = [decode.add(name, feature(name, GRID), max_tokens=35) for name in names]
    for _ in range(6):
        decode.step()
    evict_all(decode)
    decode.run(300)
    assert decode.reasons == dict.fromkeys(names, "length")
    assert sum(request.num_preemptions for request in requests) > 1
    assert decode.counts["loaded"] > 3


def test_request_whose_blocks_came_from_prefill_has_its_items_pinned(encoder: Engine, prefill: Engine) -> None:
    """As on decode: nothing is to be read, unless it is preempted."""
    publish(encoder, "A")
    waiting = SimpleNamespace(request_id="r", mm_features=[feature("A", GRID), feature("B", GRID, offset=LENGTH)])
    assert prefill.connector.ensure_cache_available(waiting, 2 * LENGTH)  # B is gone: not its fault
    evict_all(prefill)
    assert path(prefill, "A").exists()
    prefill.connector.request_finished(waiting)
    evict_all(prefill)
    assert not path(prefill, "A").exists()
    assert prefill.counts == {}


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_request_whose_file_fails_while_it_is_scheduled_ends_without_a_token(
    encoder: Engine, prefill: Engine, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    """The step cannot be stopped any more. It runs on zeros, and nobody sees what comes of them, now or later."""
    publish(encoder, "A", "B")
    with monkeypatch.context() as patch:
        before_read(prefill, lambda name: truncate(prefill, name) if name == "A" else None, patch)
        prefill.add("well", feature("B", GRID), max_tokens=max_tokens)
        prefill.add("spoiled", feature("B", GRID), feature("A", GRID), max_tokens=max_tokens)
        prefill.add("text", max_tokens=max_tokens)
        prefill.run()
    assert prefill.reasons == {"well": "length", "spoiled": "error", "text": "length"}
    assert prefill.tokens["spoiled"] == [] and prefill.tokens["well"][0] == prefill.answer("B")
    assert not prefill.encoder_cache["A"].any()
    assert prefill.ask("too early", feature("A", GRID)) == "error"
    assert prefill.ask("with pixels", feature("A", PIXELS)) == "error"  # vLLM would not encode what it believes it has
    publish(encoder, "A")
    assert prefill.ask("again", feature("A", GRID)) == "length"
    assert prefill.tokens["again"] == [prefill.answer("A")]


def test_request_with_pixels_is_encoded_when_its_file_fails_late(
    encoder: Engine, prefill: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(encoder, "A")
    before_read(prefill, lambda name: truncate(prefill, name), monkeypatch)
    assert prefill.ask("r", feature("A", PIXELS)) == "length"
    assert prefill.tokens["r"] == [prefill.answer("A")]


def test_item_in_the_engines_own_cache_needs_no_file(encoder: Engine, prefill: Engine) -> None:
    publish(encoder, "A")
    assert prefill.ask("first", feature("A", GRID)) == "length"
    lose(prefill, "A")
    assert prefill.ask("second", feature("A", GRID)) == "length"
    assert prefill.tokens["second"] == [prefill.answer("A")]
    assert prefill.counts["loaded"] == 1 and "missing" not in prefill.counts


def test_item_that_leaves_the_engines_own_cache_needs_its_file_again(make: MakeEngine, encoder: Engine) -> None:
    publish(encoder, "A", "B")
    prefill = make(Stage.PREFILL, cache=LENGTH)
    for name in ("A", "B", "A"):
        assert prefill.ask(f"{name}-{len(prefill.reasons)}", feature(name, GRID)) == "length"
    lose(prefill, "B")
    assert prefill.ask("lost", feature("B", GRID)) == "error"
    assert prefill.counts["loaded"] == 3


def test_item_that_leaves_the_engines_own_cache_while_its_request_is_scheduled(
    make: MakeEngine, encoder: Engine
) -> None:
    """vLLM makes room for one item of a request by dropping another of it, whose file is gone."""
    publish(encoder, "A", "B", "C")
    prefill = make(Stage.PREFILL, cache=2 * LENGTH)
    assert prefill.ask("fill", feature("A", GRID), feature("B", GRID)) == "length"
    lose(prefill, "A", "B")
    assert prefill.ask("r", feature("C", GRID), feature("A", GRID)) == "error"
    assert prefill.tokens["r"] == []
    assert prefill.ask("well", feature("C", GRID)) == "length"
    assert prefill.tokens["well"] == [prefill.answer("C")]


def test_cache_that_vllm_resets_is_filled_again(encoder: Engine, prefill: Engine) -> None:
    publish(encoder, "A")
    assert prefill.ask("first", feature("A", GRID)) == "length"
    prefill.scheduler.reset_encoder_cache()
    prefill.encoder_cache.clear()
    assert prefill.ask("second", feature("A", GRID)) == "length"
    prefill.scheduler.reset_encoder_cache()
    prefill.encoder_cache.clear()
    lose(prefill, "A")
    assert prefill.ask("third", feature("A", GRID)) == "error"


def test_item_that_is_left_to_the_prefix_cache_needs_no_file_while_its_tokens_are_there(
    make: MakeEngine, encoder: Engine
) -> None:
    publish(encoder, "A")
    prefill = make(Stage.PREFILL, prefixes=True)
    assert prefill.ask("first", feature("A", GRID), text=3 * BLOCK) == "length"
    lose(prefill, "A")
    for request in ("in the cache", "there still"):
        prefill.scheduler.reset_encoder_cache()
        prefill.encoder_cache.clear()
        assert prefill.ask(request, feature("A", GRID), text=3 * BLOCK) == "length"
    assert prefill.counts["loaded"] == 1
    prefill.scheduler.reset_prefix_cache()
    prefill.scheduler.reset_encoder_cache()
    prefill.encoder_cache.clear()
    assert prefill.ask("not any more", feature("A", GRID), text=3 * BLOCK) == "error"
    assert prefill.tokens["not any more"] == []


def test_requests_that_are_aborted_let_go_of_their_files(make: MakeEngine, encoder: Engine) -> None:
    publish(encoder, "A", "B")
    prefill = make(Stage.PREFILL, blocks=2)
    prefill.add("running", feature("A", GRID), max_tokens=5)
    prefill.add("waiting", feature("B", GRID))
    prefill.step()
    assert set(prefill.connector._pins) == {"A", "B"}
    prefill.scheduler.finish_requests(["running", "waiting"], RequestStatus.FINISHED_ABORTED)
    assert prefill.connector._pins == {}


def test_more_items_than_files_may_be_open(encoder: Engine, prefill: Engine) -> None:
    names = [f"item {index}" for index in range(5)]
    publish(encoder, *names)
    prefill.connector._max_files = 2
    for name in names:
        prefill.add(name, feature(name, GRID))
    prefill.run()
    assert prefill.tokens == {name: [prefill.answer(name)] for name in names}


# ---- encoders publish what they are asked for


def test_encoder_writes_again_what_it_holds_and_the_folder_lost(encoder: Engine, prefill: Engine) -> None:
    publish(encoder, "A")
    evict_all(encoder)
    publish(encoder, "A")
    assert encoder.encodings == ["A"]
    assert prefill.ask("r", feature("A", GRID)) == "length"


def test_encoder_writes_again_what_it_had_only_loaded(make: MakeEngine, encoder: Engine, prefill: Engine) -> None:
    publish(encoder, "A")
    other = make(Stage.ENCODER)
    publish(other, "A")
    evict_all(encoder)
    publish(other, "A")
    assert other.encodings == []
    assert prefill.ask("r", feature("A", GRID)) == "length"
    assert prefill.tokens["r"] == [prefill.answer("A")]


def test_encoder_writes_again_what_is_broken(encoder: Engine, prefill: Engine) -> None:
    publish(encoder, "A")
    truncate(encoder, "A")
    publish(encoder, "A")
    assert prefill.ask("r", feature("A", GRID)) == "length"


def test_encoder_encodes_again_what_its_own_cache_has_dropped_too(make: MakeEngine) -> None:
    encoder = make(Stage.ENCODER, cache=LENGTH)
    publish(encoder, "A", "B")
    evict_all(encoder)
    publish(encoder, "A")
    assert encoder.encodings == ["A", "B", "A"]
    assert path(encoder, "A").exists()


def test_reply_names_only_items_whose_file_is_there(encoder: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk neither kills the encoder nor sends a consumer to look for nothing."""

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "put", full)
        assert encoder.ask("full", feature("A", PIXELS)) == "stop"
    assert encoder.replies["full"] is None
    assert encoder.ask("again", feature("A", PIXELS)) == "stop"
    assert set(encoder.replies["again"] or {}) == {"A"}
    assert path(encoder, "A").exists()


@pytest.fixture
def written_late(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files are written when the scheduler waits for them, and not before. The items whose writing began."""
    put, wait, awaited, begun = FolderStore.put, Writer.wait, threading.Event(), []

    def put_late(store: FolderStore, identifier: str, data: memoryview, shape: Shape) -> int:
        begun.append(identifier.rsplit(":", 1)[1])
        assert awaited.wait(10), "nobody waits for it"
        return put(store, identifier, data, shape)

    def waits(writer: Writer, *keys: str) -> None:
        awaited.set()
        wait(writer, *keys)

    monkeypatch.setattr(FolderStore, "put", put_late)
    monkeypatch.setattr(Writer, "wait", waits)
    return begun


def test_reply_waits_for_the_files_of_its_items(encoder: Engine, written_late: list[str]) -> None:
    assert encoder.ask("r", feature("A", PIXELS), feature("B", PIXELS)) == "stop"
    assert set(encoder.replies["r"] or {}) == {"A", "B"} == set(written_late)


def test_reply_waits_for_files_that_a_worker_in_another_process_writes(
    make: MakeEngine, written_late: list[str]
) -> None:
    encoder = make(Stage.ENCODER, apart=True)
    assert encoder.ask("r", feature("A", PIXELS), feature("B", PIXELS)) == "stop"
    assert set(encoder.replies["r"] or {}) == {"A", "B"} == set(written_late)


def test_item_whose_file_is_under_way_is_not_written_again(encoder: Engine, written_late: list[str]) -> None:
    """An encoder holds it, the folder not yet, when the next request for it is scheduled."""
    encoder.add("first", feature("A", PIXELS))
    encoder.step()
    encoder.add("second", feature("A", PIXELS))
    encoder.run()
    assert [set(encoder.replies[name] or {}) for name in ("first", "second")] == [{"A"}, {"A"}]
    assert written_late == ["A"]
    assert encoder.counts["encoded"] == 1


def test_consumer_whose_worker_is_another_process_gets_its_items(make: MakeEngine, encoder: Engine) -> None:
    publish(encoder, "A", "B")
    prefill = make(Stage.PREFILL, apart=True)
    assert prefill.ask("r", feature("A", GRID), feature("B", GRID)) == "length"
    assert prefill.tokens["r"] == [prefill.answer("A", "B")]


def test_encoder_evicts_and_says_so(make: MakeEngine, tmp_path: Path) -> None:
    half = Shape(64, 1024, "F64")
    for index in range(3):
        FolderStore(tmp_path).put(str(index), bytes(half.size_bytes), half)
    encoder = make(Stage.ENCODER, max_bytes=1024**2, lease_s=0)
    encoder.connector._evictor.close()  # waits for the first pass
    publish(encoder, "A")
    assert encoder.counts["evicted"] == 2
    assert 2 * half.size_bytes < encoder.counts["bytes.evicted"] < 2 * half.size_bytes + 1000
    assert half.size_bytes < encoder.counts["folder_bytes"] < half.size_bytes + 1000


def test_embeddings_of_other_weights_are_others(demo_vllm_config: Any, tmp_path: Path) -> None:
    """A folder outlives a deployment, and vLLM's hash of an item does not cover the model's revision."""
    engines = []
    for revision in ("v1", "v2", "v1"):
        config = copy.copy(demo_vllm_config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.revision = revision
        engines.append(Engine(config, tmp_path, Stage.ENCODER, ahead=False))
        publish(engines[-1], "A")
    for engine in engines:
        engine.close()
    assert [len(engine.encodings) for engine in engines] == [1, 1, 0]


def test_precision_commit_and_version_name_the_weights() -> None:
    def named(dtype: str = "bf16", commit: str | None = None, version: str = "", **more: Any) -> str:
        hf_config = SimpleNamespace() if commit is None else SimpleNamespace(_commit_hash=commit)
        values = {"dtype": dtype, "revision": None, "hf_config": hf_config} | more
        return weights_of(SimpleNamespace(**values), version)

    others = [named("f32"), named(commit="c"), named(revision="r"), named(version="v")]
    assert len({named(), *others}) == 5
    assert named() == named()


def test_consumer_that_encodes_by_itself_keeps_nothing_of_it(prefill: Engine) -> None:
    for index in range(3):
        assert prefill.ask(f"r{index}", feature(f"A{index}", PIXELS)) == "length"
    assert not prefill.connector._encoded


# ---- halves


def connector(config: Any, folder: Path, stage: Stage, role: ECConnectorRole, **extra: Any) -> SharedFolderECConnector:
    settings = ec_transfer_config(EPDConfig(ec={"storage_path": folder}), stage)
    assert settings is not None
    settings["ec_connector_extra_config"] |= extra
    vllm_config = SimpleNamespace(model_config=config.model_config, ec_transfer_config=ECTransferConfig(**settings))
    made = ECConnectorFactory.create_connector(vllm_config, role)
    assert isinstance(made, SharedFolderECConnector)
    return made


def test_only_the_scheduler_of_an_encoder_evicts(demo_vllm_config: Any, tmp_path: Path) -> None:
    for stage, role in ((Stage.ENCODER, ECConnectorRole.WORKER), (Stage.DECODE, ECConnectorRole.SCHEDULER)):
        assert connector(demo_vllm_config, tmp_path, stage, role)._evictor is None
    scheduler = connector(demo_vllm_config, tmp_path, Stage.ENCODER, ECConnectorRole.SCHEDULER)
    assert scheduler._evictor is not None
    scheduler.shutdown()
    assert not scheduler._evictor._thread.is_alive()


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_in_memory_goes_with_the_last_scheduler_that_uses_it(
    demo_vllm_config: Any, tmp_path: Path, in_memory: bool
) -> None:
    roles = [
        (Stage.ENCODER, ECConnectorRole.WORKER),
        (Stage.ENCODER, ECConnectorRole.SCHEDULER),
        (Stage.DECODE, ECConnectorRole.SCHEDULER),
    ]
    halves = [connector(demo_vllm_config, tmp_path / "ec", *role, in_memory=in_memory) for role in roles]
    halves[1]._store.put("A", bytes(24), Shape(2, 3, "F32"))
    for half in halves:
        assert (tmp_path / "ec").exists()
        half.shutdown()
    assert (tmp_path / "ec").exists() is not in_memory


def test_workers_count_nothing(demo_vllm_config: Any, tmp_path: Path) -> None:
    worker = connector(demo_vllm_config, tmp_path, Stage.DECODE, ECConnectorRole.WORKER)
    assert worker.get_ec_connector_stats() is None


# ---- counts


def test_counts_add_up_and_travel_as_data() -> None:
    total = SharedFolderStats(data={"loaded": 1, "folder_bytes": 7, "load_seconds": [1.0]})
    more = {"loaded": 2, "missing": 1, "folder_bytes": 5, "load_seconds": [2.0, 3.0]}
    total.aggregate(SharedFolderECConnector.build_ec_connector_stats(more))
    assert total.data["load_seconds"] == [1.0, 2.0, 3.0]
    assert total.reduce() == {"loaded": 3, "missing": 1, "folder_bytes": 5, "load_seconds": 6.0}
    total.reset()
    assert total.is_empty()
    assert SharedFolderECConnector.build_ec_connector_stats().is_empty()


def test_counts_are_metrics_per_engine(demo_vllm_config: Any) -> None:
    registry = CollectorRegistry()

    def metric(kind: type[Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: kind(*args, **kwargs, registry=registry)

    metrics = SharedFolderECConnector.build_prom_metrics(
        SimpleNamespace(ec_transfer_config=None),
        {Counter: metric(Counter), Gauge: metric(Gauge), Histogram: metric(Histogram)},  # type: ignore[dict-item]
        ["model_name", "engine"],
        {0: ["demo", "0"], 1: ["demo", "1"]},
    )
    metrics.observe({"loaded": 2, "bytes.loaded": 100, "folder_bytes": 9}, 0)
    metrics.observe({"loaded": 3, "missing": 1, "folder_bytes": 8, "load_seconds": [0.5, 0.25]}, 1)
    metrics.observe({"folder_bytes": 7}, 1)

    def value(name: str, engine: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "demo", "engine": engine, **labels})

    assert value("epd:ec_items_total", "0", event="loaded") == 2
    assert value("epd:ec_items_total", "1", event="loaded") == 3
    assert value("epd:ec_items_total", "1", event="missing") == 1
    assert value("epd:ec_bytes_total", "0", direction="loaded") == 100
    assert [value("epd:ec_folder_bytes", engine) for engine in "01"] == [9, 7]
    assert (value("epd:ec_load_seconds_count", "1"), value("epd:ec_load_seconds_sum", "1")) == (2, 0.75)
