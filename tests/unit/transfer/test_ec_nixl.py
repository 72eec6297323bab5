"""Embeddings between engines through vLLM's real ``ECCPUConnector`` schedulers, ZMQ and NIXL, on the CPU.

Only the copies between a GPU and the buffer have a stand-in (``HostCopies``).
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nixl._api import nixl_agent_config
from vllm.distributed.ec_transfer.ec_connector.cpu import scheduler as vllm_scheduler
from vllm.distributed.ec_transfer.ec_connector.cpu.common import ECCPUWorkerMetadata, create_ec_shared_region
from vllm.v1.request import Request

from serve_app.config import EPDConfig
from serve_app.launch.connectors import ec_transfer_config, side_channel_env
from serve_app.stage import Stage
from tests.unit.transfer.ec_engine import BLOCK, GRID, LENGTH, PIXELS, Engine, EngineDied, embedding, feature

MakeEngine = Callable[..., "NixlEngine"]


class HostCopies:
    """A worker's half of ``ECCPUConnector`` without a GPU. ``late``: copies into the buffer do not land yet."""

    def __init__(self, config: Any) -> None:
        self.is_producer, self.is_consumer = (
            config.ec_transfer_config.is_ec_producer,
            config.ec_transfer_config.is_ec_consumer,
        )
        self.region = create_ec_shared_region(config)
        self.dtype = config.model_config.dtype
        self.late = False
        self._done = ECCPUWorkerMetadata()

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._metadata = metadata

    def clear_connector_metadata(self) -> None:
        del self._metadata

    def start_save_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None: ...

    def get_finished(self, request_ids: set[str]) -> None: ...

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], name: str) -> None:
        if name not in self._metadata.saves:
            return
        data = encoder_cache[name].contiguous().view(-1).view(torch.int8)
        blocks = self._metadata.saves[name]
        self.region.blocks[blocks] = data.view(len(blocks), -1)
        self._done.completed_saves.append(name)

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        for name, (transfer, blocks, shape) in self._metadata.loads.items():
            encoder_cache[name] = self.region.blocks[blocks].clone().view(-1).view(self.dtype).view(shape)
            self._done.completed_loads.append(transfer)

    def build_connector_worker_meta(self) -> ECCPUWorkerMetadata | None:
        if self.late:
            return None
        done, self._done = self._done, ECCPUWorkerMetadata()
        return done

    def shutdown(self) -> None:
        self.region._is_creator = os.path.exists(self.region._mmap_path)
        self.region.cleanup()


class NixlEngine(Engine):
    """``rows``: embeddings that fit the buffer; ``own``: that fit the engine's own cache."""

    def __init__(
        self,
        vllm_config: Any,
        stage: Stage,
        *,
        rows: int = 4096,
        own: int = 4096,
        connector: str = "NixlECConnector",
        **options: Any,
    ) -> None:
        self._rows, self._own, self._connector = rows, own, connector
        super().__init__(vllm_config, Path(), stage, **options)

    def _settings(self, stage: Stage, ec: dict[str, Any]) -> dict[str, Any]:
        settings = ec_transfer_config(EPDConfig(ec={"connector": "ECCPUConnector"}), stage)
        assert settings is not None and settings["ec_connector"] == "NixlECConnector"
        return settings | {"ec_connector": self._connector}

    def _make_worker(self, config: Any) -> HostCopies:
        ec = config.ec_transfer_config
        ec.ec_connector_extra_config["ec_cpu_bytes"] = self._rows * self.width * config.model_config.dtype.itemsize
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.encoder_cache_size = self._own
        if ec.is_ec_producer:
            ec.mm_encoder_output_widths = {"image": self.width}
        self.host = HostCopies(config)
        return self.host

    @property
    def half(self) -> Any:
        return self.connector.connector_scheduler

    def encode(self, *names: str) -> dict[str, Any] | None:
        """What the encoder answers for the items."""
        request_id = f"encode-{len(self.replies)}"
        assert self.ask(request_id, *(feature(name, PIXELS) for name in names)) == "stop"
        return self.replies[request_id]


def together(*engines: Engine) -> None:
    """Step engines in turn, as processes of their own do, until no request is left."""
    deadline = time.monotonic() + 30
    while any(engine.scheduler.has_unfinished_requests() for engine in engines):
        assert time.monotonic() < deadline
        for engine in engines:
            engine.step()


@pytest.fixture
def make(demo_vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEngine]:
    engines: list[NixlEngine] = []
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    start = nixl_agent_config.__init__
    # Without the thread that spins, as on every CPU replica (``vllm_plugin.py``).
    monkeypatch.setattr(
        nixl_agent_config, "__init__", lambda self, *args, **options: start(self, False, *args, **options)
    )
    before = set(os.listdir("/dev/shm"))

    def make(stage: Stage, **options: Any) -> NixlEngine:
        for key, value in side_channel_env("127.0.0.1").items():
            monkeypatch.setenv(key, value)
        engines.append(NixlEngine(demo_vllm_config, stage, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("vllm_ec_")} == set()


@pytest.fixture
def encoder(make: MakeEngine) -> NixlEngine:
    return make(Stage.ENCODER)


@pytest.fixture
def prefill(make: MakeEngine) -> NixlEngine:
    return make(Stage.PREFILL)


def add(engine: Engine, request_id: str, answer: Any, *names: str, fields: Any = GRID, **options: Any) -> Request:
    return engine.add(request_id, *(feature(name, fields) for name in names), ec_params=answer, **options)


# ---- the way of an embedding


def test_encoded_once_and_read_by_every_consumer(make: MakeEngine, encoder: NixlEngine, prefill: NixlEngine) -> None:
    decode = make(Stage.DECODE)
    answer = encoder.encode("A", "B")
    for engine in (prefill, decode, prefill):
        add(engine, f"r{len(engine.tokens)}", answer, "A", "B")
        together(engine, encoder)
    assert prefill.tokens == {"r0": [prefill.answer("A", "B")], "r1": [prefill.answer("A", "B")]}
    assert decode.tokens == {"r0": [decode.answer("A", "B")]}
    assert encoder.encodings == ["A", "B"] and not prefill.encodings and not decode.encodings


def test_answer_says_where_the_encoder_listens(encoder: NixlEngine) -> None:
    answer = encoder.encode("A")
    assert answer is not None
    item = answer["A"]
    assert (item["peer_host"], str(item["peer_port"])) == ("127.0.0.1", os.environ["VLLM_EC_SIDE_CHANNEL_PORT"])
    assert (item["shape"], item["item_indices"]) == ([LENGTH, encoder.width], [0])


def test_consumer_that_comes_before_the_copy_has_landed_waits_for_it(encoder: NixlEngine, prefill: NixlEngine) -> None:
    encoder.host.late = True
    answer = encoder.encode("A")
    request = add(prefill, "r", answer, "A")
    for _ in range(200):
        prefill.step()
        encoder.step()
    assert not request.is_finished()
    encoder.host.late = False
    together(prefill, encoder)
    assert prefill.tokens == {"r": [prefill.answer("A")]}


def test_what_a_consumer_has_read_it_needs_no_encoder_for(encoder: NixlEngine, prefill: NixlEngine) -> None:
    answer = encoder.encode("A")
    add(prefill, "first", answer, "A")
    together(prefill, encoder)
    prefill.scheduler.reset_encoder_cache()
    prefill.encoder_cache.clear()
    encoder.close()
    add(prefill, "second", answer, "A")
    together(prefill)
    assert prefill.tokens["second"] == [prefill.answer("A")]


# ---- lost embeddings


def test_embedding_that_left_the_encoder_fails_its_request_and_no_other(make: MakeEngine, prefill: NixlEngine) -> None:
    encoder = make(Stage.ENCODER)
    answer = encoder.encode("A")
    encoder.half._cache._evict_until(encoder.half._cache._num_blocks)
    add(prefill, "lost", answer, "A")
    add(prefill, "other", None, text=8)
    together(prefill, encoder)
    assert prefill.reasons == {"lost": "error", "other": "length"}
    add(prefill, "again", make(Stage.ENCODER).encode("B"), "A", fields=PIXELS)  # with pixels, as prefill encodes
    together(prefill, encoder)
    assert prefill.tokens["again"] == [prefill.answer("A")]


def test_item_that_is_left_to_the_prefix_cache_needs_no_address_while_its_tokens_are_there(
    make: MakeEngine, encoder: NixlEngine
) -> None:
    prefill = make(Stage.PREFILL, prefixes=True)

    def ask(request_id: str, answer: Any) -> Any:
        add(prefill, request_id, answer, "A", text=3 * BLOCK)
        together(prefill, encoder)
        prefill.scheduler.reset_encoder_cache()
        prefill.encoder_cache.clear()
        prefill.half._cache._evict_until(prefill.half._cache._num_blocks)
        return prefill.reasons[request_id]

    assert ask("first", encoder.encode("A")) == "length"
    assert ask("in the cache", None) == "length"
    prefill.scheduler.reset_prefix_cache()
    assert ask("not any more", None) == "error"
    assert ask("encoded after all", encoder.encode("A")) == "length"


def test_encoder_that_is_gone_fails_the_requests_that_need_it(
    encoder: NixlEngine, prefill: NixlEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_scheduler, "_ADMIT_DEFER_TIMEOUT_S", 0.3)
    answer = encoder.encode("A")
    encoder.close()
    add(prefill, "lost", answer, "A")
    add(prefill, "own pixels", answer, "A", fields=PIXELS)
    add(prefill, "other", None, text=8)
    together(prefill)
    assert prefill.reasons == {"lost": "error", "own pixels": "length", "other": "length"}
    assert prefill.encodings == ["A"]


def test_preempted_request_whose_embedding_is_gone_ends_with_an_error(
    make: MakeEngine, encoder: NixlEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_scheduler, "_ADMIT_DEFER_TIMEOUT_S", 0.3)
    decode = make(Stage.DECODE)
    request = add(decode, "r", encoder.encode("A"), "A", max_tokens=8)
    while not decode.tokens.get("r"):
        decode.step()
        encoder.step()
    encoder.close()
    decode.scheduler.reset_prefix_cache(reset_running_requests=True)
    decode.scheduler.reset_encoder_cache()
    decode.encoder_cache.clear()
    decode.half._cache._evict_until(decode.half._cache._num_blocks)
    assert request.num_preemptions == 1
    together(decode)
    assert decode.reasons == {"r": "error"}


# ---- what is ours


@pytest.mark.parametrize("connector", ["NixlECConnector", "ECCPUConnector"])
def test_what_the_full_buffer_does_not_take_is_not_named(make: MakeEngine, prefill: NixlEngine, connector: str) -> None:
    """vLLM's own names it, without an address, and the consumer dies of it: the reason for ``request_finished``."""
    encoder = make(Stage.ENCODER, connector=connector)
    encoder.half._cache.alloc("copies that have not landed", encoder.half._cache._num_blocks)
    answer = encoder.encode("A")
    if connector == "NixlECConnector":
        assert answer is None
        return
    add(prefill, "r", answer, "A")
    with pytest.raises(EngineDied):
        together(prefill, encoder)


def test_buffer_too_small_for_a_prompt_is_refused_at_start(make: MakeEngine) -> None:
    with pytest.raises(ValueError, match=r"`ec.max_bytes` holds .* `max_model_len: 4096`"):
        make(Stage.ENCODER, rows=4095)


def test_buffer_smaller_than_the_encoders_own_cache_is_refused_at_start(make: MakeEngine) -> None:
    """An item that is in that and no longer in the buffer would not be saved again, and could not be read."""
    with pytest.raises(ValueError, match=r"`ec.max_bytes` holds .* `encoder.engine_args.max_num_batched_tokens: 8000`"):
        make(Stage.ENCODER, own=8000)


def test_item_that_is_asked_for_again_outlives_others_in_the_buffer(make: MakeEngine) -> None:
    encoder = make(Stage.ENCODER)
    encoder.half._cache = vllm_scheduler.EmbeddingCache(3 * LENGTH)
    for name in ("A", "B", "C", "A", "D"):
        encoder.encode(name)
    assert encoder.encodings == ["A", "B", "C", "D"]
    assert set(encoder.encode("A") or {}) == {"A"}
    assert encoder.encode("B") is None  # in the encoder's own cache, and not in the buffer any more


def test_buffer_has_no_name_by_the_time_the_engine_runs(make: MakeEngine) -> None:
    before = set(os.listdir("/dev/shm"))
    encoder = make(Stage.ENCODER)
    assert not os.path.exists(encoder.half._region._mmap_path)
    assert set(os.listdir("/dev/shm")) - before == set()
    encoder.encode("A")
    entry = encoder.half._cache.get("A")
    read = encoder.half._region.blocks[list(entry.block_ids)].view(-1).view(torch.float32)
    assert torch.equal(read.view(entry.shape), embedding("A", encoder.width))
