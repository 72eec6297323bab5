"""What the folder of embeddings costs an engine's thread: ``python -m benchmarks.ec_folder [--folder F …] [--items N]``.

Calls the two halves of ``SharedFolderECConnector`` in vLLM's order, without an engine around them. Per item, in ms of the
thread that schedules and launches (with one card it is the same): wall clock and CPU. An encoder's reply is asked for right
after its step ("now"), and after the time that the next step keeps a card busy ("ahead": a sleep), as vLLM's asynchronous
scheduler does it. Needs no card, so copies to and from one are not in it.
"""

import argparse
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
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

from serve_app.config import EPDConfig
from serve_app.launch.connectors import ec_transfer_config
from serve_app.stage import Stage
from serve_app.transfer import ec_connector

ROWS = 2691
"""Tokens of an image of 1080p."""

WIDTHS = {"11 MB": 2048, "66 MB": 6 * 2048}
"""A row of Qwen2.5-VL-3B, and one of a model that packs several (DeepStack)."""

STEP_S = 0.042
"""One such image in the vision tower of Qwen2.5-VL on an H100, by arithmetic (17 TFLOP)."""

FOLDERS = [Path("/dev/shm"), Path(tempfile.gettempdir())]


@dataclass
class Times:
    """Of one thing, per item, in ms."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @contextmanager
    def take(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.thread_time()
        yield
        self.wall.append((time.perf_counter() - wall) * 1e3)
        self.cpu.append((time.thread_time() - cpu) * 1e3)

    def plus(self, other: "Times") -> "Times":
        return Times(*([a + b for a, b in zip(x, y, strict=True)] for x, y in zip(self, other, strict=True)))

    def __iter__(self) -> Iterator[list[float]]:
        return iter((self.wall, self.cpu))

    def __str__(self) -> str:
        return " | ".join(f"{min(one):7.2f} {statistics.median(one):7.2f} {max(one):7.2f}" for one in self)


class Engine:
    """Both halves of a stage's connector, and the encoder cache between them."""

    def __init__(self, stage: Stage, folder: Path, width: int) -> None:
        settings = ec_transfer_config(EPDConfig(ec={"storage_path": folder}), stage)
        assert settings is not None
        model = SimpleNamespace(dtype=torch.bfloat16, revision=None, hf_overrides={}, hf_config=None)
        model.get_inputs_embeds_size = lambda: width
        config = SimpleNamespace(ec_transfer_config=ECTransferConfig(**settings), model_config=model)
        self.worker = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
        self.scheduler: Any = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)
        self.scheduler._metadata_resolver = SimpleNamespace(fields_for=lambda modality: set())
        self.cache: dict[str, torch.Tensor] = {}

    def step(self, request: Any, encoded: torch.Tensor | None) -> None:
        """Schedule the one item of a request and run it. Without ``encoded`` the item is to be loaded."""
        name = request.mm_features[0].identifier
        assert self.scheduler.ensure_cache_available(request, 0)
        assert self.scheduler.has_cache_item(name) is (encoded is None)
        self.scheduler.update_state_after_alloc(request, 0)
        self.worker.bind_connector_metadata(
            self.scheduler.build_connector_meta(SimpleNamespace(free_encoder_mm_hashes=[]))
        )
        if encoded is None:
            self.worker.start_load_caches(self.cache)
            assert name in self.cache
        else:
            self.worker.start_save_caches(encoder_cache=self.cache)
            self.cache[name] = encoded
            self.worker.save_caches(self.cache, name)
        self.worker.get_finished(set())
        self.worker.build_connector_worker_meta()
        self.worker.clear_connector_metadata()

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


def request(name: str) -> Any:
    pixels = MultiModalFieldElem(data=torch.ones(3), field=MultiModalBatchedField())
    item = MultiModalFeatureSpec(
        MultiModalKwargsItem({"pixel_values": pixels}), "image", name, PlaceholderRange(0, ROWS)
    )
    return SimpleNamespace(request_id=uuid.uuid4().hex, mm_features=[item], status=None)


def put(folder: Path, width: int, items: int, step_s: float) -> tuple[Times, Times]:
    """An encoder's step with one item, and its reply that much later."""
    encoder, step, reply = Engine(Stage.ENCODER, folder, width), Times(), Times()
    for index in range(items):
        asked = request(f"item {index}")
        encoded = torch.full((ROWS, width), 1.0, dtype=torch.bfloat16)
        with step.take():
            encoder.step(asked, encoded)
        time.sleep(step_s)
        with reply.take():
            _, answer = encoder.scheduler.request_finished(asked)
        assert answer is not None, "the reply does not name the item"
    encoder.close()
    return step, reply


def read(folder: Path, width: int, items: int, pinned: bool) -> Times:
    """A consumer's step with one item. ``pinned``: into memory that has served before, as PyTorch's pinned memory has."""
    consumer, step = Engine(Stage.PREFILL, folder, width), Times()
    kept = torch.full((ROWS, width), 1.0, dtype=torch.bfloat16)
    with mock.patch.object(ec_connector, "host_memory", return_value=kept) if pinned else nullcontext():
        for index in range(items):
            asked = request(f"item {index}")
            with step.take():
                consumer.step(asked, None)
                consumer.scheduler.request_finished(asked)
            assert consumer.cache.popitem()[1].shape == (ROWS, width)
    consumer.close()
    return step


def measure(parent: Path, width: int, items: int) -> dict[str, Times]:
    times = {}
    for name, step_s in (("now", 0.0), ("ahead", STEP_S)):
        folder = Path(tempfile.mkdtemp(dir=parent, prefix="ec-folder-"))
        try:
            step, reply = put(folder, width, items, step_s)
            times |= {f"put, {name}: step": step, f"put, {name}: reply": reply, f"put, {name}": step.plus(reply)}
            if step_s == 0.0:
                times |= {f"read{', pinned' * pinned}": read(folder, width, items, pinned) for pinned in (False, True)}
        finally:
            shutil.rmtree(folder)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, action="append", help="where to make the folder; several times")
    parser.add_argument("--items", type=int, default=20, help="items of each size, each put once and read once")
    args = parser.parse_args()
    print(f"{'ms per item':32s} | wall: min median max     | CPU: min median max")
    for parent in args.folder or FOLDERS:
        for size, width in WIDTHS.items():
            for what, times in measure(parent, width, args.items).items():
                print(f"{parent!s:8s} {size} {what:16s} | {times}", flush=True)


if __name__ == "__main__":
    main()
