"""What a worker writes and loads, and how it crosses to one in another process and to a card."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.device_communicators import shm_broadcast

from serve_app.transfer import ec_worker
from serve_app.transfer.ec_store import FolderStore, Shape
from serve_app.transfer.ec_worker import DTYPE_NAMES, FolderWorker, Load, StepMetadata, bytes_of, host_memory, staged
from serve_app.transfer.ec_writer import Writer

MakeWorker = Callable[[], FolderWorker]


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "ec")


@pytest.fixture
def worker(store: FolderStore) -> FolderWorker:
    return FolderWorker(store, "weights:")


def save(worker: FolderWorker, tensor: torch.Tensor) -> None:
    """As in a step of an engine whose scheduler is another process."""
    step = StepMetadata()
    worker.save({"A": tensor}, "A", step)
    worker.end_step(step)
    worker.close()


def sent(step: StepMetadata) -> tuple[bytes, list[bytes], StepMetadata]:
    """A step as vLLM's queue sends it to workers in other processes: the pickled step, what goes beside it, what arrives."""
    beside: list[bytes] = []
    with io.BytesIO() as stream:
        pickler = pickle.Pickler(
            stream, pickle.HIGHEST_PROTOCOL, buffer_callback=lambda buffer: beside.append(buffer.raw())
        )
        pickler.dispatch_table = {torch.Tensor: shm_broadcast._reduce_tensor}
        pickler.dump(step)
        text = stream.getvalue()
    return text, beside, pickle.loads(text, buffers=beside)


# ---- between the folder and the encoder cache


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES))
def test_embedding_is_what_it_was_in_every_precision(
    store: FolderStore, worker: FolderWorker, dtype: torch.dtype
) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T.to(dtype)  # not contiguous
    save(worker, tensor)
    item = store.open("weights:A")
    assert item is not None
    with item:
        data = host_memory(item.shape)
        item.read_into(bytes_of(data))
    cache: dict[str, torch.Tensor] = {}
    worker.load(cache, sent(StepMetadata({"A": Load(item.shape, data)}))[2])
    assert cache["A"].dtype == dtype and torch.equal(cache["A"], tensor)


def test_zeros_have_the_shape_of_the_item(worker: FolderWorker) -> None:
    cache: dict[str, torch.Tensor] = {}
    worker.load(cache, StepMetadata({"A": Load(Shape(2, 3, "BF16"), None)}))
    assert torch.equal(cache["A"], torch.zeros(2, 3, dtype=torch.bfloat16))


def test_item_of_no_rows_is_read_too(store: FolderStore) -> None:
    store.put("A", b"", Shape(0, 3, "F32"))
    item = store.open("A")
    assert item is not None
    with item:
        data = host_memory(item.shape)
        item.read_into(bytes_of(data))
    assert data.shape == (0, 3)


@pytest.mark.parametrize("tensor", [torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int32)], ids=["3-d", "int"])
def test_what_is_no_embedding_is_not_written_and_fails_no_step(
    store: FolderStore, worker: FolderWorker, tensor: torch.Tensor
) -> None:
    save(worker, tensor)
    assert not store.root.exists()


def test_step_after_shutdown_writes_nothing_and_does_not_fail(store: FolderStore, worker: FolderWorker) -> None:
    writer = Writer(store)
    writer.close()
    worker.save({"A": torch.ones(2, 3)}, "A", StepMetadata(writer=writer))
    assert not store.root.exists() and not writer.is_writing("weights:A")


@pytest.mark.parametrize(("tensor", "context"), [(0, 1), (1, 0)], ids=["tensor parallel", "context parallel"])
def test_only_the_first_rank_writes(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, tensor: int, context: int
) -> None:
    put, puts = FolderStore.put, []
    monkeypatch.setattr(FolderStore, "put", lambda self, *args: puts.append(rank) or put(self, *args))
    monkeypatch.setattr(ec_worker, "model_parallel_is_initialized", lambda: True)
    for rank in ((tensor, context), (0, 0)):
        monkeypatch.setattr(ec_worker, "get_tensor_model_parallel_rank", lambda: rank[0])  # noqa: B023
        monkeypatch.setattr(ec_worker, "get_pcp_group", lambda: SimpleNamespace(rank_in_group=rank[1]))  # noqa: B023
        save(FolderWorker(store, "weights:"), torch.ones(2, 3))
    assert puts == [(0, 0)]


# ---- to another process


def test_embedding_goes_beside_the_pickled_step_and_not_in_it(store: FolderStore) -> None:
    shape = Shape(1024, 1024, "BF16")
    data = host_memory(shape)
    data.fill_(3)
    step = StepMetadata({"A": Load(shape, data)}, {"B"}, Writer(store))
    text, beside, arrived = sent(step)
    assert len(text) < 1000 and [len(buffer) for buffer in beside] == [shape.size_bytes]
    assert torch.equal(arrived.loads["A"].on("cpu"), data)
    assert (arrived.writes, arrived.writer) == ({"B"}, None)
    assert step.writer is not None, "it stays with a worker in this process"


# ---- to and from a card


class OnCard(torch.Tensor):
    """A tensor that says it is on a card. It is on the CPU."""

    is_cpu = False
    __torch_function__ = torch._C._disabled_torch_function_impl


class Event:
    """Of a copy that is never done by itself."""

    def __init__(self, blocking: bool) -> None:
        assert blocking, "a waiter that spins takes a core from the engine"

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


def test_save_copies_to_pinned_memory_and_leaves_the_waiting_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []

    class Pinned(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        def is_pinned(self) -> bool:  # type: ignore[override]
            return True

        def copy_(self, tensor: torch.Tensor, non_blocking: bool = False) -> Any:  # type: ignore[override]
            copies.append(non_blocking)
            return super().copy_(tensor)

    monkeypatch.setattr(ec_worker, "host_memory", lambda shape: torch.zeros(2, 3).as_subclass(Pinned))
    monkeypatch.setattr(torch, "Event", Event)
    data, ready = staged(torch.ones(2, 3).as_subclass(OnCard), Shape(2, 3, "F32"))
    assert copies == [True]
    assert ready is not None
    ready()
    assert bytes(data) == torch.ones(2, 3).numpy().tobytes()


def test_save_waits_for_a_copy_to_memory_that_cannot_be_pinned() -> None:
    data, ready = staged(torch.ones(2, 3).as_subclass(OnCard), Shape(2, 3, "F32"))
    assert (bytes(data), ready) == (torch.ones(2, 3).numpy().tobytes(), None)


def test_load_does_not_wait_for_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    data: Any = SimpleNamespace(to=lambda device, non_blocking=False: asked.append((device, non_blocking)))
    Load(Shape(2, 3, "F32"), data).on("cuda:1")
    assert asked == [("cuda:1", True)]


@pytest.mark.parametrize(("in_use", "can", "pinned"), [(True, True, True), (True, False, False), (False, True, False)])
def test_memory_is_pinned_only_where_cuda_is_in_use_already(
    monkeypatch: pytest.MonkeyPatch, in_use: bool, can: bool, pinned: bool
) -> None:
    """A scheduler whose workers are other processes must not make a context on the first card."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(ec_worker, "is_pin_memory_available", lambda: can)
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **options: asked.append(pin_memory))
    host_memory(Shape(2, 3, "F32"))
    assert asked == [pinned]


def test_nothing_is_left_open(store: FolderStore, worker: FolderWorker) -> None:
    before = len(os.listdir("/proc/self/fd"))
    save(worker, torch.ones(2, 3))
    assert len(os.listdir("/proc/self/fd")) <= before
