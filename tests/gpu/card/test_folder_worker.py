"""The folder connector's copies between a card and pinned memory: right bytes, whatever the card is busy with.

Nothing waits for the card there, so a copy is still to come while the next item is read. Memory that is given out again too
early would show in the bytes.
"""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.card import Card

ITEMS = 64
ROWS, WIDTH = 1024, 2048
BUSY_CYCLES = 200_000_000
"""Of the card's clock: 0.1 s, in which all copies queue up."""


@pytest.fixture
def torch(card: Card) -> Any:
    """With a CUDA context, as in an engine whose worker shares its process."""
    import torch

    torch.cuda.init()
    return torch


def test_items_that_are_loaded_arrive_whole(torch: Any) -> None:
    from serve_app.transfer.ec_store import Shape
    from serve_app.transfer.ec_worker import Load, host_memory

    shape = Shape(ROWS, WIDTH, "BF16")
    torch.cuda._sleep(BUSY_CYCLES)
    loaded = []
    for number in range(ITEMS):
        memory = host_memory(shape)
        assert memory.is_pinned()
        memory.fill_(number)
        loaded.append(Load(shape, memory).on("cuda"))
        del memory
    assert [tensor.float().unique().tolist() for tensor in loaded] == [[number] for number in range(ITEMS)]


def test_items_that_are_saved_are_what_the_card_has(torch: Any, tmp_path: Path) -> None:
    """The encoder's next batch may overwrite a tensor once it is freed: the copy comes before that in its stream."""
    from serve_app.transfer.ec_store import FolderStore
    from serve_app.transfer.ec_worker import FolderWorker, StepMetadata, bytes_of, host_memory
    from serve_app.transfer.ec_writer import Writer

    store = FolderStore(tmp_path / "ec")
    writer, worker = Writer(store), FolderWorker(store, "weights:")
    torch.cuda._sleep(BUSY_CYCLES)
    for number in range(ITEMS):
        cache = {f"{number}": torch.full((ROWS, WIDTH), number, dtype=torch.bfloat16, device="cuda")}
        worker.save(cache, f"{number}", StepMetadata(writer=writer))
        cache[f"{number}"].fill_(-1)
    writer.wait()
    for number in range(ITEMS):
        item = store.open(f"weights:{number}")
        assert item is not None
        with item:
            memory = host_memory(item.shape)
            item.read_into(bytes_of(memory))
        assert memory.float().unique().tolist() == [number]
