"""Items as they are pickled, that is on their way over a handle."""

import pickle
import threading
import warnings
from typing import Any

import cloudpickle
import pytest
import torch
from vllm.inputs import mm_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    MultiModalSharedField,
    PlaceholderRange,
)
from vllm.multimodal.utils import argsort_mm_positions

from serve_app.handoff.engine_input import from_engine_input
from serve_app.handoff.types import Item, Prompt

GRID = MultiModalFieldElem(data=torch.tensor([1, 4, 4]), field=MultiModalBatchedField(keep_on_cpu=True))
PIXELS = MultiModalFieldElem(
    data=torch.arange(64 * 1176, dtype=torch.float32).view(64, 1176),
    field=MultiModalFlatField(slices=[[slice(0, 64)]], dim=0),
)
KINDS = {
    "positions alone": MultiModalKwargsItem({"image_grid_thw": GRID}),
    "pixels": MultiModalKwargsItem({"pixel_values": PIXELS, "image_grid_thw": GRID}),
    "half precision": MultiModalKwargsItem(
        {"audio": MultiModalFieldElem(data=torch.randn(80, 300).bfloat16(), field=MultiModalBatchedField())}
    ),
    "a list of tensors": MultiModalKwargsItem(
        {
            "crops": MultiModalFieldElem(
                data=[torch.rand(3, 8, 8), torch.rand(3, 4, 4)], field=MultiModalBatchedField()
            ),
            "scale": MultiModalFieldElem(data=0.5, field=MultiModalSharedField(batch_size=2)),
        }
    ),
    "no data": None,
}


def by_pickle(item: Item) -> Item:
    return pickle.loads(cloudpickle.dumps(item))


def through_shared_memory(item: Item) -> Item:
    """As Ray's object store does it: what is large stays apart, and nobody may write to it."""
    apart: list[Any] = []
    words = cloudpickle.dumps(item, protocol=5, buffer_callback=apart.append)
    return pickle.loads(words, buffers=[bytes(buffer) for buffer in apart])


@pytest.mark.parametrize("ways", [by_pickle, through_shared_memory])
@pytest.mark.parametrize("kind", KINDS)
def test_an_item_is_the_same_behind_a_handle(kind: str, ways: Any) -> None:
    item = Item("image", "hash", 3, 4, torch.tensor([True, False, True, True]), KINDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's, of tensors that nobody may write to
        found = ways(item)
    assert (found.modality, found.hash, found.offset, found.length) == ("image", "hash", 3, 4)
    assert torch.equal(found.is_embed, item.is_embed)
    assert found.data == item.data


def test_large_tensors_stay_apart_and_none_is_a_file_of_pytorch() -> None:
    apart: list[Any] = []
    item = Item("image", "hash", 0, 4, None, KINDS["pixels"])
    words = cloudpickle.dumps(item, protocol=5, buffer_callback=apart.append)
    assert max(buffer.raw().nbytes for buffer in apart) == PIXELS.data.nbytes
    assert len(words) < 1000
    assert b"_load_from_bytes" not in cloudpickle.dumps(item)


def test_threads_pickle_at_the_same_time() -> None:
    """vLLM's codec keeps what it is at; Serve pickles on the loops of its own and of the user's code."""
    items = [Item("image", str(number), 0, 4, torch.ones(number + 1), KINDS["pixels"]) for number in range(8)]
    wrong: list[str] = []

    def pickles(item: Item) -> None:
        for _ in range(50):
            found = by_pickle(item)
            if not torch.equal(found.is_embed, item.is_embed) or found.data != item.data:
                wrong.append(item.hash)

    threads = [threading.Thread(target=pickles, args=[item]) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_prompts_without_media_are_taken_as_they_are() -> None:
    rendered = {"type": "token", "prompt_token_ids": [1, 2], "cache_salt": "salt"}
    assert from_engine_input(rendered) == Prompt([1, 2], cache_salt="salt")


def test_items_that_begin_at_one_place_are_in_vllms_order() -> None:
    """Of a video and its sound, whose tokens are interleaved, engines take the first for the first."""
    item = MultiModalKwargsItem.dummy()
    made = mm_input(
        [7, 8, 8],
        MultiModalKwargsItems({"audio": [item], "video": [item]}),
        {"audio": ["a"], "video": ["v"]},
        {"video": [PlaceholderRange(1, 2)], "audio": [PlaceholderRange(1, 2)]},
    )
    assert argsort_mm_positions(made["mm_placeholders"]) == [("video", 0), ("audio", 0)]
    assert [each.hash for each in from_engine_input(made).items] == ["v", "a"]
