"""What an item takes of memory."""

from types import SimpleNamespace
from typing import Any

import msgspec

from serve_app.handoff.types import Item, Media, Source


def test_size_counts_tensors_and_the_media_that_they_came_from() -> None:
    data: Any = {"pixels": SimpleNamespace(data=SimpleNamespace(nbytes=12)), "grid": SimpleNamespace(data=[1, 2, 2])}
    item = Item("image", "hash", 0, 4, None, data)
    assert item.size_bytes == 12
    source = Source(Media("image", b"12345", None, 1, "digest"), None)
    assert msgspec.structs.replace(item, source=source).size_bytes == 17
    assert msgspec.structs.replace(item, data=None).size_bytes == 0
